"""Weights that others stored in less become ordinary ones: those that the layers computed with, of the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from modules import BlockNet, tokens
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vramkit.casting import NarrowTensor, apply_layerwise_casting
from vramkit.errors import ConflictError, UnsupportedTensorError
from vramkit.offload import apply_group_offloading
from vramkit.pipelines.lora.merged import MergedTensor
from vramkit.quant import QuantoConfig, adopt, dequantize, quantization_of, quantize

DTYPE = torch.bfloat16


def network() -> nn.Module:
    torch.manual_seed(0)
    return BlockNet(blocks=2, width=64).eval().requires_grad_(False).to(DTYPE)


def replaced(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for block in net.blocks:
        for name in ("up", "down"):
            setattr(block, name, make(getattr(block, name)))
    return net.to("cpu").requires_grad_(False)


def bits(kind: str, *, bias: bool) -> nn.Module:
    def make(old: nn.Linear) -> nn.Module:
        options: dict[str, Any] = {"bias": bias}
        if kind == "int8":
            new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False, **options)
        else:
            new = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, quant_type="nf4", compute_dtype=DTYPE, **options
            )
        new.load_state_dict({key: value for key, value in old.state_dict().items() if bias or key == "weight"})
        return new.to(DTYPE)

    return replaced(network(), make)


def adopted(kind: str, *, bias: bool) -> nn.Module:
    net = bits(kind, bias=bias)
    adopt(net)
    return net


def of_quanto() -> nn.Module:
    """Weights of quanto in plain layers, as a model has them that took another one's."""
    from optimum import quanto

    def make(old: nn.Linear) -> nn.Module:
        scale = quanto.AbsmaxOptimizer()(old.weight, qtype=quanto.qint8, axis=0)
        weight = quanto.quantize_weight(old.weight, qtype=quanto.qint8, axis=0, scale=scale, optimized=False)
        old.weight = nn.Parameter(weight, requires_grad=False)
        return old

    return replaced(network(), make)


def cast() -> nn.Module:
    net = network()
    apply_layerwise_casting(net, torch.float8_e4m3fn, DTYPE)
    return net


def given() -> nn.Module:
    """Values in fp8 without scales, as files have them, beside weights of another kind."""
    net = cast()
    weight = net.blocks[0].up.weight.dequantize()
    net.blocks[0].up.weight = nn.Parameter(
        NarrowTensor(weight.to(torch.float8_e4m3fn), None, DTYPE, is_given=True), requires_grad=False
    )
    quantized = nn.Sequential(nn.Linear(64, 64, dtype=DTYPE)).requires_grad_(False)
    quantize(quantized, QuantoConfig())
    net.blocks[1].head = quantized[0]
    return net


STORED: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: adopted("nf4", bias=True),
    "nf4_no_bias": lambda: adopted("nf4", bias=False),
    "int8": lambda: adopted("int8", bias=True),
    "int8_no_bias": lambda: adopted("int8", bias=False),
    "quanto": of_quanto,
    "cast": cast,
    "given": given,
}


@pytest.mark.parametrize("is_offloaded", [False, True])
@pytest.mark.parametrize("kind", STORED)
def test_weights_that_others_stored_become_ordinary(kind: str, is_offloaded: bool) -> None:
    net, x = STORED[kind](), tokens(8).to(DTYPE)
    values = {name: weight + 0 for name, weight in net.named_parameters()}
    with torch.no_grad():
        before = net(x)
        offload = apply_group_offloading(net, "cpu") if is_offloaded else None
        dequantize(net)
        after = net(x)
    if offload is not None:
        offload.remove()
    assert {type(weight) for weight in net.parameters()} == {nn.Parameter}
    assert {weight.dtype for weight in net.parameters()} == {DTYPE}
    state = net.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert state.keys() == values.keys()
    assert all(torch.equal(state[name], value) for name, value in values.items())
    if kind.startswith(("nf4", "cast")):  # whose products are of the widened weight
        assert torch.equal(after, before)
    quantize(net, QuantoConfig())  # as any other model


def test_what_cannot_be_widened_is_refused_before_anything_is() -> None:
    net = bits("nf4", bias=True)
    apply_layerwise_casting(net, torch.float8_e4m3fn, DTYPE, skip_modules_pattern=["up", "down"])
    stored = net.head.weight
    assert isinstance(stored, NarrowTensor)
    with pytest.raises(UnsupportedTensorError, match=r"blocks\.0\.up\.weight is a Params4bit.*adopt\(module\)"):
        dequantize(net)
    assert net.head.weight is stored
    adopt(net)
    dequantize(net)
    assert {type(weight) for weight in net.parameters()} == {nn.Parameter}


def test_layers_of_quanto_are_refused() -> None:
    from optimum import quanto

    net = network()
    quanto.quantize(net, weights=quanto.qint8)
    quanto.freeze(net)
    with pytest.raises(UnsupportedTensorError, match="belongs to a QLinear of quanto"):
        dequantize(net)


def test_a_part_is_widened_by_itself_unless_its_model_is_offloaded() -> None:
    net = network()
    quantize(net, QuantoConfig())
    offload = apply_group_offloading(net, "cpu")
    with pytest.raises(ConflictError, match="belongs to a larger module that is offloaded"):
        dequantize(net.blocks[0])
    offload.remove()
    dequantize(net.blocks[0])
    assert {type(weight) for weight in net.blocks[0].parameters()} == {nn.Parameter}
    assert type(net.blocks[1].up.weight) is not nn.Parameter
    dequantize(net)
    assert {type(weight) for weight in net.parameters()} == {nn.Parameter}
    assert quantization_of(net) is None


def test_adapters_stay() -> None:
    net = network()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["up"]), net)
    quantize(net, QuantoConfig())
    down = net.blocks[0].down
    products = [(torch.ones(down.out_features, 2), torch.ones(2, down.in_features), 0.5)]
    down.weight = nn.Parameter(MergedTensor(down.weight.dequantize(), products), requires_grad=False)
    dequantize(net)
    assert isinstance(down.weight, MergedTensor)
    assert type(net.blocks[0].up.base_layer.weight) is nn.Parameter
    assert type(net.blocks[0].up.lora_A["default"].weight) is nn.Parameter
