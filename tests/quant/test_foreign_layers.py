"""Linear layers of other libraries: Conv1D of transformers, whose weight is transposed, and the parallel linear classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quant.configs import CONFIGS
from torch import nn
from torch.nn import functional as F

from vramkit.casting import NarrowTensor, apply_layerwise_casting
from vramkit.errors import UnsupportedTensorError
from vramkit.offload import apply_group_offloading
from vramkit.quant import dequantize, load_quantized, quantize, save_quantized, sqnr_db


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """A Conv1D and the linear layer that it is, both quantized."""
    from transformers.pytorch_utils import Conv1D

    turned, linear = Conv1D(96, 64), nn.Linear(64, 96)
    turned.weight.data.normal_()
    linear.weight.data.copy_(turned.weight.t())
    linear.bias.data.copy_(turned.bias)
    nets = nn.Sequential(turned).requires_grad_(False), nn.Sequential(linear).requires_grad_(False)
    for net in nets:
        quantize(net, CONFIGS[kind])
    assert type(nets[0][0]) is Conv1D
    return nets


@pytest.mark.parametrize("way", ["eager", "inference", "compiled"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_turned_layer_is_its_linear_layer(kind: str, way: str) -> None:
    turned, linear = pair(kind)
    assert turned[0].weight.shape == (64, 96)
    assert torch.equal(turned[0].weight.dequantize(), linear[0].weight.dequantize().t())
    x = torch.randn(2, 5, 64)
    for autocast in (False, True):
        run = torch.compile(turned, fullgraph=True, backend="aot_eager") if way == "compiled" else turned
        with torch.inference_mode(way == "inference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = run(x), linear(x)
        assert found.dtype == expected.dtype
        assert sqnr_db(expected.float(), found.float()) > (40 if autocast else 100)
        if not kind.startswith("fp8"):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_turned_weight_is_moved_copied_saved_and_refused_as_others(kind: str, tmp_path: Path) -> None:
    turned, _ = pair(kind)
    x, weight = torch.randn(3, 64), turned[0].weight
    expected = turned(x)
    assert torch.equal(copy.deepcopy(turned)(x), expected)
    again = copy.deepcopy(turned)
    again.load_state_dict(turned.state_dict())
    assert torch.equal(again(x), expected)
    assert type(weight.to(torch.bfloat16)) is type(weight)
    assert torch.equal(x @ weight, x @ weight.dequantize())
    with pytest.raises(UnsupportedTensorError, match="would be lost"):
        weight.add_(1)
    save_quantized(turned, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    load_quantized(again, tmp_path / "model.safetensors", saved)
    assert torch.equal(again(x), expected)
    load_quantized(again, tmp_path / "model.safetensors", saved, dtype=torch.bfloat16)
    assert again(x.bfloat16()).dtype == torch.bfloat16
    dequantize(turned)
    assert torch.equal(turned[0].weight, weight.dequantize())


@pytest.mark.parametrize("kind", [*CONFIGS, "cast"])
def test_gpt2(kind: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    original = GPT2LMHeadModel(GPT2Config(**sizes)).eval().requires_grad_(False)
    own = copy.deepcopy(original)
    if kind == "cast":
        covered = apply_layerwise_casting(own, torch.float8_e4m3fn, torch.float32).coverage
    else:
        covered = quantize(own, CONFIGS[kind]).coverage
    assert covered.share > 0.9
    ids = torch.randint(0, 64, (2, 9))
    resident = own(ids, use_cache=False).logits
    assert sqnr_db(original(ids, use_cache=False).logits, resident) > (0 if kind in ("quanto_int2", "fp4") else 10)
    for level in ("block_level", "leaf_level"):
        offload = apply_group_offloading(own, "cpu", offload_type=level)
        assert torch.equal(own(ids, use_cache=False).logits, resident)
        offload.remove()


def test_scales_of_a_turned_layer_are_per_output() -> None:
    from transformers.pytorch_utils import Conv1D

    net = nn.Sequential(Conv1D(96, 64)).requires_grad_(False)
    net[0].weight.mul_(torch.logspace(-6, 6, 96))
    exact = net[0].weight.clone()
    apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32)
    stored = net[0].weight
    assert isinstance(stored, NarrowTensor)
    assert stored.scale is not None
    assert stored.scale.shape == (1, 96)
    assert min(sqnr_db(one, other) for one, other in zip(exact.t(), stored.dequantize().t(), strict=True)) > 29
    new = torch.randn(64, 96)
    stored.copy_(new)
    assert sqnr_db(new, stored) > 31


@pytest.mark.parametrize("kind", [*CONFIGS, "cast"])
def test_parallel_linear_classes_are_known_by_name(kind: str) -> None:
    class ColumnParallelLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight)

    class MergedColumnParallelLinear(ColumnParallelLinear):
        pass

    net = nn.Sequential(MergedColumnParallelLinear()).requires_grad_(False)
    linear = nn.Sequential(nn.Linear(64, 96, bias=False)).requires_grad_(False)
    linear[0].weight.copy_(net[0].weight)
    for each in (net, linear):
        if kind == "cast":
            apply_layerwise_casting(each, torch.float8_e4m3fn, torch.float32)
        else:
            quantize(each, CONFIGS[kind])
    x = torch.randn(3, 64)
    assert torch.equal(net(x), linear(x))
