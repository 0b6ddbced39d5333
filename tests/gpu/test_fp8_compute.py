"""fp8 products on a CUDA device: the kernel against what it is asked to do, memory, streaming, compiled blocks, reports."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from modules import BlockNet, tokens
from torch import nn
from torch.nn import functional as F

from vramkit.casting import narrowed
from vramkit.errors import ConfigError
from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading
from vramkit.quant import Fp8Config, quantize, report, sqnr_db
from vramkit.quant.scaled_linear import _PIECE, ScaledLinear, narrow_rows, scaled_mm_problem

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
MIB = 2**20


@pytest.fixture(autouse=True)
def _able() -> None:
    problem = scaled_mm_problem(torch.device("cuda", 0))
    if problem is not None:  # then this is what the user is told
        with pytest.raises(ConfigError, match="compute='storage'"):
            quantize(nn.Linear(32, 32).cuda(), Fp8Config(compute="scaled_mm"))
        pytest.skip(f"fp8 products: {problem}")


def layer(dtype: torch.dtype, inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias, device="cuda", dtype=dtype).requires_grad_(False)
    made.weight = nn.Parameter(narrowed(made.weight, E4M3, dtype), requires_grad=False)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 256), (17, 256), (2, 130, 256), (3120, 256)])
def test_products_are_those_of_the_narrow_numbers(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    stored, x = layer(dtype, 256, 528, bias=bias), torch.randn(shape, device="cuda", dtype=dtype)
    out = ScaledLinear.of(stored, "cuda")(x)
    narrow, scale = narrow_rows(x.reshape(-1, 256))
    expected = F.linear(narrow.double() * scale, stored.weight.dequantize().double())
    expected = expected + stored.bias.double() if bias else expected
    assert out.dtype == dtype
    assert sqnr_db(expected.view_as(out), out) > 40  # one rounding to bfloat16, and sums of fewer bits
    assert sqnr_db(F.linear(x, stored.weight, stored.bias), out) > 27


def test_nothing_zeros_and_what_is_not_finite() -> None:
    scaled = ScaledLinear.of(layer(torch.bfloat16, 64, 48), "cuda")
    assert scaled(torch.empty(2, 0, 64, device="cuda", dtype=torch.bfloat16)).shape == (2, 0, 48)
    x = torch.zeros(3, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(scaled(x), scaled.bias.expand(3, 48))
    x[1, 5] = float("inf")
    assert scaled(x)[1].isnan().all()
    assert torch.equal(scaled(x)[0], scaled.bias)


def test_temporaries_are_the_narrow_inputs_and_a_piece() -> None:
    stored = layer(torch.bfloat16, 4096, 4096)
    scaled, x = ScaledLinear.of(stored, "cuda"), torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)
    scaled(x[:32])
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = scaled(x)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= max(x.numel() + 2 * _PIECE, x.numel() + out.nbytes) + 40 * MIB  # workspaces


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_streamed_is_the_same_bytes_as_resident(level: str) -> None:
    net = BlockNet().bfloat16().eval().requires_grad_(False)
    quantize(net, Fp8Config(compute="scaled_mm"))
    assert any(isinstance(module, ScaledLinear) for module in net.modules())
    resident, x = copy.deepcopy(net).cuda(), tokens(8).bfloat16().cuda()
    offload = apply_group_offloading(net, "cuda", offload_type=level)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(net(x), resident(x))
    offload.remove()


def test_compiled_blocks_stream_without_recompiles() -> None:
    net = BlockNet().bfloat16().eval().requires_grad_(False)
    quantize(net, Fp8Config(compute="scaled_mm"))
    eager, x = copy.deepcopy(net).cuda(), tokens(8).bfloat16().cuda()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    offload = apply_group_offloading(net, "cuda")
    for block in net.blocks:
        block.compile(fullgraph=True)
    with torch.no_grad():
        first = net(x)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(net(x), first)
        assert sqnr_db(eager(x), first) > 25
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    offload.remove()


@pytest.mark.parametrize("compute", ["storage", "scaled_mm"])
def test_a_report_holds_no_second_model_on_the_device(compute: str) -> None:
    original = BlockNet(blocks=16, width=2048).bfloat16().eval().requires_grad_(False)
    quantized = copy.deepcopy(original).cuda()
    quantize(quantized, Fp8Config(compute=compute))
    x = tokens(8).bfloat16().cuda()
    report(quantized, x, reference=original)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = report(quantized, x, reference=original)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < module_bytes(original) / 2
    assert all(parameter.device.type == "cpu" for parameter in original.parameters())
    assert all(layer.weight_db > 31 for layer in found.layers)
    assert all((layer.output_db or 0) > (30 if compute == "storage" else 26) for layer in found.layers)
