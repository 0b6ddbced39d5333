"""fp8 as a backend: what is stored, who multiplies how, and what is refused before anything changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from modules import BlockNet, tokens
from quant.emulation import emulated
from torch import nn

from vramkit.casting import NarrowTensor, apply_layerwise_casting
from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.quant import Fp8Config, dequantize, quantize, report, sqnr_db
from vramkit.quant.registry import handler_for
from vramkit.quant.scaled_linear import ScaledLinear, scaled_mm_problem

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _computing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if scaled_mm_problem(torch.device("cpu")) is not None:  # an older torch
        monkeypatch.setattr(torch, "_scaled_mm", emulated)


@pytest.fixture
def net() -> BlockNet:
    return BlockNet(blocks=3).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [E4M3, E5M2])
def test_storage_is_the_same_as_layerwise_casting(net, dtype, stored):
    x, cast = tokens(8).to(dtype), copy.deepcopy(net.to(dtype))
    apply_layerwise_casting(cast, stored, dtype)
    quantize(net, Fp8Config(dtype=str(stored)))
    weight = net.blocks[0].up.weight
    assert isinstance(weight, NarrowTensor)
    assert isinstance(weight, nn.Parameter)
    assert (weight.stored.dtype, weight.dtype) == (stored, dtype)
    assert torch.equal(net(x), cast(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_mm_multiplies_in_fp8_and_costs_what_it_says(net, dtype):
    original, x = copy.deepcopy(net.to(dtype)), tokens(8).to(dtype)
    quantize(net, Fp8Config(compute="scaled_mm"))
    assert all(isinstance(block.up, ScaledLinear) for block in net.blocks)
    found = report(net, x, reference=original)
    assert all(layer.kind == "float8_e4m3fn, scaled_mm" for layer in found.layers)
    assert all(26 < (layer.output_db or 0) < 32 for layer in found.layers)
    stored = report(original, x, config=Fp8Config())
    assert found.forward_db < stored.forward_db
    assert net(x).dtype == dtype


def test_sizes_that_no_kernel_takes_are_stored_only_and_the_report_says_so():
    net = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 32), nn.Linear(32, 32), nn.Linear(32, 8)).requires_grad_(False)
    original, x = copy.deepcopy(net), torch.randn(3, 32)
    quantize(net, Fp8Config(compute="scaled_mm"))
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear, ScaledLinear, nn.Linear]
    assert all(isinstance(layer.weight, NarrowTensor) for layer in net)
    text = str(report(net, x, reference=original))
    line = next(line for line in text.splitlines() if line.startswith("widened at use"))
    assert sorted(line.split(": ")[1].split(", ")) == ["0", "1", "3"]


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
@pytest.mark.parametrize("compute", ["storage", "scaled_mm"])
def test_streamed_is_the_same_bytes_as_resident(net, level, compute, tmp_path):
    x = tokens(8)
    quantize(net, Fp8Config(compute=compute))
    resident = net(x)
    offload = apply_group_offloading(net, "cpu", offload_type=level, offload_to_disk_path=tmp_path)
    for _ in range(2):
        assert torch.equal(net(x), resident)
    assert 0 < offload.stats().streamed_bytes < 0.4 * 4 * sum(p.numel() for p in net.parameters())
    offload.remove()
    assert torch.equal(net(x), resident)


def test_products_in_fp8_end_with_the_quantization_that_asked_for_them(net):
    x, stored = tokens(8), copy.deepcopy(net)
    quantize(net, Fp8Config(compute="scaled_mm"))
    dequantize(net)
    wide = net(x)
    quantize(stored, Fp8Config())
    assert sqnr_db(wide, stored(x)) > 100  # nothing is narrowed on the way any more
    quantize(net, Fp8Config(dtype="float8_e5m2"))
    assert not any(isinstance(module, ScaledLinear) for module in net.modules())
    assert 15 < sqnr_db(wide, net(x)) < 40


def test_blocks_compile_fullgraph_once(net):
    x = tokens(8)
    quantize(net, Fp8Config(compute="scaled_mm"))
    eager = net(x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    apply_group_offloading(net, "cpu")
    for block in net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert sqnr_db(eager, net(x)) > 60
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    net(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_device_without_the_kernel_is_refused_before_anything_changes(net, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("'_scaled_mm' is not there")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ConfigError, match=r"'_scaled_mm' is not there; use compute='storage'"):
        quantize(net, Fp8Config(compute="scaled_mm"))
    assert not any(isinstance(p, NarrowTensor) for p in net.parameters())
    quantize(net, Fp8Config())
    assert isinstance(net.blocks[0].up.weight, NarrowTensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_taken_apart_for_a_file_and_put_together(dtype):
    handler = handler_for(Fp8Config())
    weight = handler.quantize(torch.randn(48, 32, dtype=dtype))
    parts, notes = handler.pack(weight)
    assert {type(part) for part in parts.values()} == {torch.Tensor}
    again = handler.put_together(parts, json.loads(json.dumps(notes)), (48, 32))
    assert again.dtype == dtype
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(net, value):
    net.blocks[2].down.weight[0, 0] = value
    with pytest.raises(ConfigError, match=r"\[48, 96\] holds infinities or NaN"):
        quantize(net, Fp8Config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'; expected one of 'float8_e4m3fn'"),
        ({"compute": "fast"}, "compute='fast'; expected one of 'storage', 'scaled_mm'"),
        ({"dtype": E5M2, "compute": "scaled_mm"}, "multiplies in float8_e4m3fn"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Fp8Config(**options)
