"""Under autocast, layers with stored weights compute in its dtype and give what plain layers with the same values give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from quant.configs import CONFIGS
from quant.emulation import emulated
from torch import nn
from torch.nn import functional as F

from vramkit.casting import apply_layerwise_casting
from vramkit.quant import BitsAndBytes4bitConfig, Fp8Config, quantize, sqnr_db
from vramkit.quant.scaled_linear import scaled_mm_problem

# Whose products are of dequantized weights: bitwise those of plain layers. The others have kernels of their own.
DEQUANTIZE = {"fp8", "nf4", "nf4_double", "fp4"}
LEAST_DB = 40  # beside a plain layer with the same values: bfloat16 rounds at 48, LLM.int8 rounds inputs to 8 bits
USES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "linear": lambda net, x: net[0](x),
    "matmul": lambda net, x: x @ net[0].weight.t(),
    "mm": lambda net, x: torch.mm(net[0].weight, x.t()),
    "einsum": lambda net, x: torch.einsum("bi,oi->bo", x, net[0].weight),
    "chain": lambda net, x: net(x),  # a norm between the layers, whose results are fp32
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A quantized network and a plain one with the same values."""
    own = nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 64)).to(dtype).requires_grad_(False)
    plain = copy.deepcopy(own)
    quantize(own, CONFIGS[kind], skip_modules=())
    for i in (0, 2):
        plain[i].weight = nn.Parameter(own[i].weight.dequantize(), requires_grad=False)
    return own, plain


def called(use: Callable[..., torch.Tensor], way: str, *args: Any) -> torch.Tensor:
    if way == "compiled":
        return torch.compile(use, fullgraph=True, backend="aot_eager")(*args)
    with torch.inference_mode(way == "inference"):
        return use(*args)


@pytest.mark.parametrize("way", ["eager", "inference", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_use_is_in_autocasts_dtype(kind: str, dtype: torch.dtype, way: str) -> None:
    own, plain = pair(kind, dtype)
    x = torch.randn(4, 128)
    for name, use in USES.items():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected, found = use(plain, x), called(use, way, own, x)
        assert found.dtype == expected.dtype == torch.bfloat16, name
        if kind in DEQUANTIZE or name in ("matmul", "mm", "einsum"):
            assert torch.equal(found, expected), name
        else:
            assert sqnr_db(expected.float(), found.float()) >= LEAST_DB - 5 * (name == "chain"), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_dtypes_nested_regions_and_float64(kind: str) -> None:
    own, plain = pair(kind, torch.float32)
    x = torch.randn(4, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert own(x).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert own(x).dtype == torch.float32
        assert own(x).dtype == torch.float16
        assert own(x.bfloat16()).dtype == torch.float16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sqnr_db(plain(x).float(), own(x).float()) >= LEAST_DB - 5


def test_a_compute_dtype_that_was_asked_for_is_kept_inside() -> None:
    net = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False)
    quantize(net, BitsAndBytes4bitConfig(quant_type="nf4", compute_dtype=torch.float32), skip_modules=())
    x = torch.randn(4, 128).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    assert found.dtype == torch.bfloat16
    bias = net[0].bias.bfloat16().float()
    assert torch.equal(found, F.linear(x.float(), net[0].weight.dequantize(), bias).bfloat16())


@pytest.mark.parametrize("way", ["eager", "inference", "compiled"])
@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_storage_of_every_layer_is_what_plain_layers_give(scaled: bool, way: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 32)
            self.conv = nn.Conv1d(32, 32, 3)
            self.up = nn.ConvTranspose1d(32, 16, 3)
            self.out = nn.Linear(16, 8)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = self.table(ids)
            conv = self.conv(found.mT)
            up = self.up(conv)
            return found, conv, up, self.out(up.mT)

    own = Net().eval().requires_grad_(False)
    apply_layerwise_casting(own, torch.float8_e4m3fn, torch.float32, scaled=scaled)
    plain = copy.deepcopy(own)
    for layer in plain.children():
        for key, parameter in list(layer.named_parameters()):
            setattr(layer, key, nn.Parameter(parameter + 0, requires_grad=False))
    ids = torch.randint(0, 20, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for expected, found in zip(plain(ids), called(Net.forward, way, own, ids), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["eager", "inference", "compiled"])
def test_fp8_products(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if scaled_mm_problem(torch.device("cpu")) is not None:
        monkeypatch.setattr(torch, "_scaled_mm", emulated)
    net = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    quantize(net, Fp8Config(compute="scaled_mm"), skip_modules=())
    x = torch.randn(3, 64)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = called(lambda net, x: net(x), way, net, x)
        assert found.dtype == torch.bfloat16
        assert sqnr_db(net(x.bfloat16()).float(), found.float()) > 40
