"""What quantization costs, measured two ways: with the original beside the quantized module, and predicted from a config."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from modules import BlockNet, OrderNet, TwiceNet, mapped_copy, tokens
from torch import nn

from vramkit.casting import NarrowTensor, narrowed
from vramkit.errors import ConfigError
from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading
from vramkit.quant import Fp8Config, quantize, report

E4M3 = torch.float8_e4m3fn


def quantized_copy(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    quantize(twin, Fp8Config())
    return twin


@pytest.fixture
def net() -> BlockNet:
    return BlockNet(blocks=3).eval().requires_grad_(False)


@pytest.fixture
def quantized(net: BlockNet) -> nn.Module:
    return quantized_copy(net)


def stored_wrong(layer: nn.Linear, factor: float) -> None:
    """Store a weight in fp8 that is `factor` times what it was."""
    exact = narrowed(layer.weight, E4M3, torch.float32).dequantize()
    layer.weight = nn.Parameter(narrowed(exact * factor, E4M3, torch.float32), requires_grad=False)


def test_half_the_signal_as_error_is_six_decibels_in_weights_and_outputs():
    layers = [nn.Linear(32, 32, bias=False) for _ in range(3)]
    exact = nn.Sequential(*layers).requires_grad_(False)
    for layer in exact:
        layer.weight.copy_(narrowed(layer.weight, E4M3, torch.float32).dequantize())
    other = copy.deepcopy(exact)
    stored_wrong(other[0], 1)
    stored_wrong(other[1], 0.5)  # exact in fp8
    found = report(other, torch.randn(5, 32), reference=exact)
    assert [layer.name for layer in found.layers] == ["1", "0"]  # worst first
    six = 20 * math.log10(2)
    assert found.layers[0].weight_db == pytest.approx(six)
    assert found.layers[0].output_db == pytest.approx(six)
    assert found.layers[1].weight_db == found.layers[1].output_db == math.inf
    assert found.forward_db == pytest.approx(six)
    assert found.skipped == ("2",)


def test_both_ways_give_the_same_figures(net, quantized):
    x = tokens(8)
    measured = report(quantized, x, reference=net)
    assert measured == report(net, x, config=Fp8Config())
    assert {layer.name for layer in measured.layers} == {f"blocks.{i}.{k}" for i in range(3) for k in ("up", "down")}
    assert all(layer.weight_db > 31 and layer.output_db > 28 for layer in measured.layers)
    outputs = [layer.output_db for layer in measured.layers]
    assert outputs == sorted(outputs)
    assert 20 < measured.forward_db < 40
    assert measured.skipped == ("embed", "head")
    assert measured.bytes_before == module_bytes(net)
    assert measured.bytes_after == module_bytes(quantized)


def test_errors_grow_with_fewer_bits(net):
    reports = [report(net, tokens(8), config=Fp8Config(dtype=dtype)) for dtype in ("float8_e4m3fn", "float8_e5m2")]
    assert reports[0].forward_db > reports[1].forward_db + 4


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_offloaded_modules_and_mapped_references(net, quantized, level, tmp_path: Path):
    x = tokens(8)
    expected = report(quantized, x, reference=net)
    offload = apply_group_offloading(quantized, "cpu", offload_type=level)
    reference = mapped_copy(net, tmp_path)
    assert report(quantized, x, reference=reference) == expected
    apply_group_offloading(reference, "cpu", offload_type=level)
    assert report(quantized, x, reference=reference) == expected
    assert offload.is_active


def test_every_call_of_a_layer_counts_and_layers_without_a_call_come_last():
    net = OrderNet(blocks=2).eval().requires_grad_(False)
    found = report(net, {"x": tokens(48), "order": [0, 0]}, config=Fp8Config())
    called = {layer.name for layer in found.layers if layer.output_db is not None}
    assert called == {"blocks.0.up", "blocks.0.down"}
    assert [layer.output_db is None for layer in found.layers] == [False] * 2 + [True] * (len(found.layers) - 2)
    assert "not called" in str(found)
    once = report(net, {"x": tokens(48), "order": [0]}, config=Fp8Config())
    assert once.layers[0].output_db != found.layers[0].output_db


def test_shared_modules_are_listed_once():
    net = TwiceNet().eval().requires_grad_(False)
    x = tokens(48)
    measured = report(quantized_copy(net), x, reference=net)
    names = [layer.name for layer in measured.layers]
    assert len(names) == len(set(names)) == 10  # two layers each of five distinct blocks
    assert measured == report(net, x, config=Fp8Config())


def test_inputs_and_outputs_may_be_nested():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 32)

        def forward(self, x, *, scale):
            return OrderedDict(out=self.up(x) * scale, count=torch.tensor(3), more=[x])

    net = Pair().requires_grad_(False)
    x = torch.randn(4, 16)
    by_name = report(net, {"x": x, "scale": 2.0}, config=Fp8Config())
    assert by_name.forward_db > 30
    double = nn.Sequential(OrderedDict(up=nn.Linear(16, 16))).requires_grad_(False)
    assert report(double, (x,), config=Fp8Config()) == report(double, x, config=Fp8Config())


def test_the_modules_stay_as_they_were_also_after_an_error(net, quantized):
    before = {name: id(p) for name, p in (*net.named_parameters(), *quantized.named_parameters())}
    report(net, tokens(8), config=Fp8Config())
    report(quantized, tokens(8), reference=net)
    with pytest.raises(RuntimeError, match="shape"):
        report(quantized, tokens(9), reference=net)
    with pytest.raises(RuntimeError, match="shape"):
        report(net, tokens(9), config=Fp8Config())
    assert before == {name: id(p) for name, p in (*net.named_parameters(), *quantized.named_parameters())}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *quantized.modules()))
    assert not any(isinstance(p, NarrowTensor) for p in net.parameters())


def test_the_table_names_the_worst_first_and_the_bytes(net, quantized):
    found = report(quantized, tokens(8), reference=net)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "weight", "dB", "output", "dB", "before", "after"]
    assert lines[1].startswith(found.layers[0].name)
    assert lines[-3] == f"forward: {found.forward_db:.1f} dB"
    assert "KiB before" in lines[-2]
    assert lines[-1] == "not quantized: embed, head"


def test_what_cannot_be_compared_is_named(net, quantized):
    x = tokens(8)
    for options in ({}, {"reference": net, "config": Fp8Config()}):
        with pytest.raises(ConfigError, match="reference=original_module"):
            report(quantized, x, **options)
    with pytest.raises(ConfigError, match=r"no module 'blocks\.0\.up'"):
        report(quantized, x, reference=nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="no layer of the module is quantized"):
        report(net, x, reference=net)

    class Silent(nn.Linear):
        def forward(self, x):
            super().forward(x)

    with pytest.raises(ConfigError, match="no floating tensor, but NoneType"):
        report(Silent(8, 8).requires_grad_(False), x, config=Fp8Config())
