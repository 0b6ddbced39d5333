"""Numbers of the backends beside the modules of bitsandbytes and quanto, and what a quantized weight is to others."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from modules import BlockNet, tokens
from quant.configs import CONFIGS
from torch import nn

from vramkit.casting import apply_layerwise_casting
from vramkit.errors import ConfigError, ConflictError, UnsupportedTensorError
from vramkit.offload import apply_group_offloading
from vramkit.quant import (
    BitsAndBytes4bitConfig,
    BitsAndBytes8bitConfig,
    QuantConfig,
    QuantoConfig,
    dequantize,
    quantization_of,
    quantize,
    sqnr_db,
)

LEAST_DB = {"nf4": 20, "nf4_double": 20, "fp4": 18, "int8": 40, "int8_no_outliers": 40}
LEAST_DB |= {"quanto_int8": 40, "quanto_int4": 20, "quanto_int2": 7, "quanto_float8": 31, "fp8": 31}


def layer(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(256, 96, bias=bias, dtype=dtype).requires_grad_(False).eval()


def quantized(original: nn.Linear, config: QuantConfig) -> nn.Linear:
    net = nn.Sequential(copy.deepcopy(original))
    quantize(net, config, skip_modules=())
    found = net[0]
    assert type(found) is nn.Linear
    return found


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    many = torch.randn(2, 7, 256, dtype=dtype)
    many[0, 3, 17] = 11.0  # an outlier to LLM.int8
    return [many, many[0, :1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_and_products_are_near_the_exact_ones(kind: str, dtype: torch.dtype) -> None:
    original = layer(dtype)
    own = quantized(original, CONFIGS[kind])
    assert own.weight.dtype == dtype
    assert isinstance(own.weight, nn.Parameter)
    assert sqnr_db(original.weight, own.weight) >= LEAST_DB[kind]
    for x in inputs(dtype):
        assert own(x).dtype == dtype
        assert sqnr_db(original(x), own(x)) >= LEAST_DB[kind] - 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [96, 32, 100])
def test_4_bit_blocks_may_run_on_into_the_next_row(columns: int, dtype: torch.dtype) -> None:
    original = nn.Linear(columns, 40, dtype=dtype).requires_grad_(False)
    own = quantized(original, BitsAndBytes4bitConfig(quant_type="nf4"))
    assert sqnr_db(original.weight, own.weight) > 20
    x = torch.randn(3, columns, dtype=dtype)
    assert sqnr_db(original(x), own(x)) > 16


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_zeros_stay_zeros(kind: str) -> None:
    original = layer(torch.float32, bias=False)
    original.weight[3:5] = 0
    own = quantized(original, CONFIGS[kind])
    out = own(inputs(torch.float32)[0])
    assert not out[..., 3:5].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [None, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(
    kind: str, double: bool, compute: Any, dtype: torch.dtype, bias: bool
) -> None:
    import bitsandbytes

    original = layer(dtype, bias=bias)
    theirs = bitsandbytes.nn.Linear4bit(
        256, 96, bias=bias, quant_type=kind, compress_statistics=double, compute_dtype=compute
    )
    theirs.load_state_dict(original.state_dict())
    theirs = theirs.to(dtype).to("cpu").train()  # in evaluation it repacks its weight for some CPUs, with other sums
    own = quantized(original, BitsAndBytes4bitConfig(quant_type=kind, double_quant=double, compute_dtype=compute))
    for x in inputs(dtype):
        assert torch.equal(own(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8_bits_are_those_of_bitsandbytes(threshold: float, dtype: torch.dtype, bias: bool) -> None:
    import bitsandbytes

    original = layer(dtype, bias=bias)
    theirs = bitsandbytes.nn.Linear8bitLt(256, 96, bias=bias, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(original.state_dict())
    theirs = theirs.to("cpu").eval()
    theirs.state.is_training = False
    own = quantized(original, BitsAndBytes8bitConfig(threshold=threshold))
    for x in inputs(dtype):
        assert torch.equal(own(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("columns", [256, 96, 160])
@pytest.mark.usefixtures("quanto_in_python")
def test_quanto_is_quanto(columns: int, weights: str, dtype: torch.dtype) -> None:
    from optimum import quanto

    original = nn.Linear(columns, 48, dtype=dtype).requires_grad_(False)
    theirs = nn.Sequential(copy.deepcopy(original))
    quanto.quantize(theirs, weights=getattr(quanto, "qfloat8" if weights == "float8" else f"q{weights}"))
    quanto.freeze(theirs)
    own = quantized(original, QuantoConfig(weights=weights))
    x = torch.randn(2, 5, columns, dtype=dtype)
    assert torch.equal(own.weight.dequantize(), theirs[0].weight.dequantize())
    assert torch.equal(own(x), theirs(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", CONFIGS)
def test_moves_keep_the_parts_and_other_operations_see_values(kind: str, mode: Any) -> None:
    own = quantized(layer(torch.float32), CONFIGS[kind])
    with mode():
        check_moves(own.weight)
        assert type(own.to("meta").weight) is type(own.to(torch.bfloat16).weight)
    assert (own.weight.dtype, own.weight.device.type) == (torch.bfloat16, "meta")


def check_moves(weight: Any) -> None:
    for moved in (weight.detach(), weight.clone(), weight.to("cpu", copy=True), weight.to(torch.bfloat16)):
        assert type(moved) is type(weight)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert type(weight + 0) is torch.Tensor
    assert torch.equal(weight + 0, weight.dequantize())
    assert torch.equal(weight.t() @ torch.eye(96), weight.dequantize().t())
    with pytest.raises(UnsupportedTensorError, match="would be lost"):
        weight.add_(1)
    assert str(tuple(weight.shape)).strip("()") in repr(weight)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantized_module_is_copied_cast_and_dequantized(kind: str) -> None:
    net, x = BlockNet(blocks=2, width=128).eval().requires_grad_(False), tokens(8)
    done = quantize(net, CONFIGS[kind])
    first = net(x)
    assert torch.equal(copy.deepcopy(net)(x), first)
    again = BlockNet(blocks=2, width=128).eval().requires_grad_(False)
    quantize(again, CONFIGS[kind])
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), first)
    assert net.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert done.quantized_bytes < done.original_bytes
    dequantize(again)
    assert all(type(parameter) is nn.Parameter for parameter in again.parameters())
    dequantize(net)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
    assert quantization_of(again) is None
    assert sqnr_db(first, again(x)) > 20  # inputs of LLM.int8 are rounded too


def test_what_is_skipped_is_shown_and_can_be_chosen() -> None:
    net = BlockNet(blocks=2, width=64)
    done = quantize(copy.deepcopy(net), QuantoConfig())
    assert set(done.quantized) == {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")}
    assert set(done.skipped) == {"embed", "head"}
    assert "norm" in (done.config.skip_modules or ())
    assert "4 weights" in str(done)
    done = quantize(copy.deepcopy(net), QuantoConfig(), skip_modules=[r"blocks\.0", "up$"])
    assert set(done.quantized) == {"embed", "head", "blocks.1.down"}
    done = quantize(net, QuantoConfig(skip_modules=("blocks",)))
    assert set(done.quantized) == {"embed", "head"}


def test_adapters_stay_as_they_are() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    net = BlockNet(blocks=2, width=64)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["up"]), net)
    done = quantize(net, CONFIGS["nf4"])
    names = {f"blocks.{i}.{name}" for i in range(2) for name in ("up.base_layer", "down")}
    assert set(done.quantized) == names
    assert type(net.blocks[0].up.lora_A["default"].weight) is nn.Parameter


def test_a_layer_in_two_places_is_quantized_once() -> None:
    layer = nn.Linear(64, 64)
    net = nn.Sequential(layer, nn.Sequential(layer))
    assert quantize(net, CONFIGS["nf4"]).quantized == ("0",)
    assert net[1][0] is net[0]


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    net[1].weight = net[0].weight
    quantize(net, CONFIGS["nf4"])
    assert net[0].weight is net[1].weight
    dequantize(net)
    assert net[0].weight is net[1].weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitsAndBytes4bitConfig(quant_type="nf5"), "quant_type='nf5'; expected one of 'nf4', 'fp4'"),
        (lambda: BitsAndBytes4bitConfig(block_size=3), "block_size=3"),
        (lambda: BitsAndBytes4bitConfig(compute_dtype=torch.int8), "compute_dtype='int8'"),
        (lambda: BitsAndBytes4bitConfig(double_quant="yes"), "double_quant='yes'; expected True or False"),
        (lambda: BitsAndBytes4bitConfig(storage=torch.bfloat16), "storage='bfloat16'"),
        (lambda: BitsAndBytes8bitConfig(threshold=-1), "threshold=-1; expected a number >= 0"),
        (lambda: QuantoConfig(weights="int3"), "weights='int3'; expected one of 'int8'"),
        (lambda: QuantoConfig.from_options({"bits": 4}), "quanto has no option 'bits'"),
        (lambda: QuantoConfig.from_options({"weights_dtype": "int3"}), "quanto: weights_dtype='int3'; expected one of"),
        (lambda: quantize(nn.Linear(4, 4), "nf4"), "was given as str"),
        (lambda: quantize(nn.Linear(4, 4), {"backend": "exl2"}), "quant_backend='exl2'; expected one of"),
        (lambda: quantize(nn.Linear(4, 4, device="meta"), QuantoConfig()), "meta device"),
        (lambda: quantize(nn.LayerNorm(4), QuantoConfig()), "no layer to quantize"),
        (lambda: quantize(nn.Linear(4, 4), QuantoConfig(), skip_modules=["("]), "not a regular expression"),
    ],
)
def test_wrong_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vramkit.quant.quanto", raising=False)
    monkeypatch.setitem(sys.modules, "optimum", None)
    with pytest.raises(ConfigError, match=r'pip install "vramkit\[quant\]"'):
        quantize(nn.Linear(64, 64), QuantoConfig())


def test_quantizing_twice_or_over_a_casting_is_refused() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    quantize(net, CONFIGS["nf4"])
    with pytest.raises(ConflictError, match="already"):
        quantize(net, CONFIGS["quanto_int8"])
    net = nn.Sequential(nn.Linear(64, 64))
    apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ConflictError, match="NarrowTensor already"):
        quantize(net, CONFIGS["nf4"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_compute_with_weights_of_their_own_class_while_these_stream(kind: str) -> None:
    """Not of the class of those at rest, which torch asks before every operation."""
    net = nn.Sequential(*(layer(torch.float32) for _ in range(4))).requires_grad_(False)
    quantize(net, CONFIGS[kind], skip_modules=())
    own, seen = type(net[0].weight), []
    offload = apply_group_offloading(net, "cpu", offload_type="leaf_level", unit_bytes=1, slots=1)
    for each in net:
        each.register_forward_pre_hook(lambda module, args: seen.append(type(module.weight)))
    with torch.no_grad():
        for each in net:
            each(torch.randn(2, 256))
    offload.remove()
    assert len(seen) == 4
    assert all(kind is own for kind in seen)
