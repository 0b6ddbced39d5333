"""Acceptance 9: every kind of weight under every way of offloading gives the bytes of its own resident run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, tokens
from peft import LoraConfig, inject_adapter_in_model
from quant.configs import ALIKE_COMPILED, CONFIGS
from torch import nn

from vramkit.errors import ConfigError, ConflictError, UnsupportedTensorError
from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading, offload_of
from vramkit.quant import adopt, quantize, save_quantized

WAYS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 20_000},
    "model": {"offload_type": "model_level"},
    "disk": {"offload_type": "block_level"},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(*, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    net = BlockNet(blocks=3, width=128).eval().requires_grad_(False)
    if lora:
        options = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
        inject_adapter_in_model(options, net)
    return net.eval()


def compiled(net: nn.Module, *, whole: bool) -> None:
    for block in net.blocks:
        block.compile(fullgraph=whole, backend="aot_eager")


@pytest.mark.parametrize(
    ("kind", "compiles", "lora"),
    [
        pytest.param(
            kind,
            compiles,
            lora,
            marks=pytest.mark.thorough if compiles and (not lora or kind in ALIKE_COMPILED) else (),
        )
        for kind, compiles, lora in product(CONFIGS, (False, True), (False, True))
    ],
)
def test_streamed_bytes_are_resident_bytes(kind: str, compiles: bool, lora: bool, tmp_path: Path) -> None:
    net = network(lora=lora)
    wide_bytes = module_bytes(net)
    quantize(net, CONFIGS[kind])
    assert module_bytes(net) < 0.75 * wide_bytes
    inputs = [tokens(8, batch=1, length=length) for length in (9, 9)]
    resident = copy.deepcopy(net)
    if compiles:
        compiled(resident, whole=True)
    with torch.no_grad():
        expected = [resident(x) for x in inputs]
        for way, options in WAYS.items():
            streamed = copy.deepcopy(net)
            if compiles:
                compiled(streamed, whole=way != "leaf")  # hooks inside a block break its graph
            folder = tmp_path if way == "disk" else None
            offload = apply_group_offloading(streamed, "cpu", offload_to_disk_path=folder, **options)
            for x, y in zip(inputs, expected, strict=True):
                assert torch.equal(streamed(x), y), way
            assert 0 < offload.stats().streamed_bytes < 0.75 * wide_bytes, way  # what travels is what is stored
            offload.remove()
            assert torch.equal(streamed(inputs[0]), expected[0]), way


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantizing_after_offloading_is_the_same(kind: str) -> None:
    net, x = network(lora=False), tokens(8)
    late = copy.deepcopy(net)
    quantize(net, CONFIGS[kind])
    offload = apply_group_offloading(late, "cpu")
    wide_bytes = offload.stats().streamed_bytes
    quantize(late, CONFIGS[kind])
    assert offload.stats().streamed_bytes < 0.6 * wide_bytes
    with torch.no_grad():
        assert torch.equal(late(x), net(x))


def test_quantizing_a_part_of_an_offloaded_module_is_refused() -> None:
    net, x = network(lora=False), tokens(8)
    apply_group_offloading(net, "cpu")
    with pytest.raises(ConflictError, match="edit"):
        quantize(net.blocks, CONFIGS["nf4"])
    handle = offload_of(net)
    assert handle is not None
    with handle.edit():
        quantize(net.blocks, CONFIGS["nf4"])
    with torch.no_grad():
        assert net(x).isfinite().all()


def bitsandbytes_network(kind: str) -> nn.Module:
    import bitsandbytes

    net = network(lora=False)
    for block in net.blocks:
        for name in ("up", "down"):
            old = getattr(block, name)
            sizes = (old.in_features, old.out_features)
            new: Any
            if kind == "int8":
                new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            else:
                new = bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4", compress_statistics=kind == "nf4_double")
            new.load_state_dict(old.state_dict())
            setattr(block, name, new)
    return net.to("cpu").requires_grad_(False).eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])
def test_modules_of_bitsandbytes_are_adopted(kind: str, way: str, tmp_path: Path) -> None:
    net, x = bitsandbytes_network(kind), tokens(8)
    folder = tmp_path if way == "disk" else None
    with pytest.raises(UnsupportedTensorError, match="adopt"):
        apply_group_offloading(net, "cpu", offload_to_disk_path=folder, **WAYS[way])
    own = network(lora=False)
    quantize(own, CONFIGS[kind])
    assert len(adopt(net)) == 6
    with pytest.raises(ConfigError, match="quantized elsewhere"):
        save_quantized(net, tmp_path / "saved")
    apply_group_offloading(net, "cpu", offload_to_disk_path=folder, **WAYS[way])
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(net(x), own(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", ["qint8", "qint4", "qfloat8"])
@pytest.mark.usefixtures("quanto_in_python")
def test_weights_of_quanto_that_a_user_brings(weights: str, way: str, tmp_path: Path) -> None:
    from optimum import quanto

    net, x = network(lora=False), tokens(8)
    quanto.quantize(net, weights=getattr(quanto, weights), exclude=["embed", "head", "*norm*"])
    quanto.freeze(net)
    net.requires_grad_(False)
    with torch.no_grad():
        expected = net(x)
        apply_group_offloading(net, "cpu", offload_to_disk_path=tmp_path if way == "disk" else None, **WAYS[way])
        for _ in range(2):
            assert torch.equal(net(x), expected)


def test_weights_of_quanto_that_are_packed_for_a_device_are_refused_by_name() -> None:
    from optimum import quanto

    net = BlockNet(blocks=4, width=256).to(torch.bfloat16).eval()
    quanto.quantize(net, weights=quanto.qint4, exclude=["embed", "head", "*norm*"])
    quanto.freeze(net)
    with pytest.raises(UnsupportedTensorError, match=r"blocks\.0\.up\.weight: a TinyGemm.* one kind of device"):
        apply_group_offloading(net, "cpu")


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_torchao_that_a_user_brings(way: str, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net, x = network(lora=False), tokens(8)
    quantize_(net.blocks, Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = net(x)
        offload = apply_group_offloading(
            net, "cpu", offload_to_disk_path=tmp_path if way == "disk" else None, **WAYS[way]
        )
        for _ in range(2):
            assert torch.equal(net(x), expected)
    assert 0 < offload.stats().streamed_bytes < 0.4 * module_bytes(network(lora=False))
