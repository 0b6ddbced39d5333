"""Quantized weights on a CUDA device: acceptance 9 there, numbers of the libraries behind, and memory while quantizing."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, save
from quant.configs import CONFIGS
from torch import nn

from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading, apply_model_offload, offload_of
from vramkit.quant import (
    BitsAndBytes4bitConfig,
    BitsAndBytes8bitConfig,
    QuantoConfig,
    adopt,
    load_quantized,
    quantization_of,
    quantize,
    save_quantized,
    sqnr_db,
)
from vramkit.quant.files import load_quantizing

pytestmark = pytest.mark.gpu

WIDTH, BLOCKS = 512, 24
WAYS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "block_pageable": {"offload_type": "block_level", "store": "pageable"},
    "block_one_slot": {"offload_type": "block_level", "slots": 1},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 400_000},
    "disk": {"offload_type": "block_level"},
    "half_resident": {"offload_type": "block_level", "resident": "2MiB"},
}


@pytest.fixture(autouse=True)
def _clean_device() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()
    torch._dynamo.reset()


def network(dtype: torch.dtype = torch.bfloat16, blocks: int = BLOCKS) -> nn.Module:
    torch.manual_seed(0)
    return BlockNet(blocks=blocks, width=WIDTH).to(dtype).eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Many tokens, a few, and one: the libraries have a kernel for each."""
    return [torch.randn(1, length, 8, dtype=dtype, device="cuda") for length in (2000, 40, 1)]


def resident_results(net: nn.Module, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    resident = copy.deepcopy(net).cuda()
    with torch.inference_mode():
        return [resident(x) for x in xs]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_streamed_bytes_are_resident_bytes_in_less_memory(kind: str, way: str, tmp_path: Path) -> None:
    net, xs = network(), inputs()
    wide_bytes = module_bytes(net)
    quantize(net, CONFIGS[kind])
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())  # quantized there, at rest here
    quantized_bytes = module_bytes(net)
    assert quantized_bytes < 0.6 * wide_bytes
    expected = resident_results(net, xs)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    offload = apply_group_offloading(net, "cuda", offload_to_disk_path=tmp_path if way == "disk" else None, **WAYS[way])
    with torch.inference_mode():
        net(xs[1])
        torch.cuda.synchronize()
        peak_bytes = torch.cuda.max_memory_allocated() - before
        for _ in range(2):
            for x, y in zip(xs, expected, strict=True):
                assert torch.equal(net(x), y)
    stats = offload.stats()
    assert 0 < stats.streamed_bytes <= quantized_bytes + 4096 * stats.groups
    assert stats.returned_bytes == 0
    if way != "half_resident":
        assert peak_bytes < 0.9 * quantized_bytes
    offload.remove()
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_turns_on_the_device_and_moves(kind: str) -> None:
    net, xs = network(blocks=4), inputs()
    quantize(net, CONFIGS[kind])
    expected = resident_results(net, xs)
    turns = apply_model_offload({"net": net}, "cuda")
    with torch.inference_mode():
        for x, y in zip(xs, expected, strict=True):
            assert torch.equal(net(x), y)
    turns.remove()
    with torch.inference_mode():
        assert torch.equal(net.cuda().cpu().cuda()(xs[0]), expected[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_blocks_stream_the_bytes_of_the_compiled_resident_run(kind: str) -> None:
    net, x = network(blocks=6), inputs()[1]
    quantize(net, CONFIGS[kind])
    resident = copy.deepcopy(net).cuda()
    for module in (net, resident):
        for block in module.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    apply_group_offloading(net, "cuda")
    with torch.no_grad():
        expected = resident(x)
        for _ in range(3):
            assert torch.equal(net(x), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_is_quantized_on_the_device_weight_by_weight(kind: str, tmp_path: Path) -> None:
    net, xs = network(), inputs()
    path = save(net, tmp_path / "net.safetensors")
    weight_bytes = 2 * WIDTH * 2 * WIDTH
    with torch.device("meta"):
        empty = BlockNet(blocks=BLOCKS, width=WIDTH).to(torch.bfloat16).eval()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    load_quantizing(empty, path, CONFIGS[kind])
    assert torch.cuda.max_memory_allocated() - before < 16 * weight_bytes  # of 48
    assert torch.cuda.memory_allocated() - before < 2**20
    quantize(net, CONFIGS[kind])
    assert quantization_of(empty) == quantization_of(net)

    save_quantized(empty, tmp_path / "saved")
    expected = resident_results(net, xs)
    with torch.device("meta"):
        again = BlockNet(blocks=BLOCKS, width=WIDTH).to(torch.bfloat16).eval()
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    load_quantized(again, tmp_path / "saved" / "model.safetensors", saved)
    apply_group_offloading(again, "cuda")
    stats = offload_of(again)
    assert stats is not None
    assert stats.stats().stores.keys() <= {"mapped", "pageable"}  # straight from the file
    with torch.inference_mode():
        for x, y in zip(xs, expected, strict=True):
            assert torch.equal(again(x), y)


def layers(dtype: torch.dtype) -> tuple[nn.Linear, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer = nn.Linear(512, 256, dtype=dtype).requires_grad_(False).eval()
    many = torch.randn(2, 1000, 512, dtype=dtype, device="cuda")
    many[0, 3, 17] = 11.0  # an outlier to LLM.int8
    return layer, [many, many[:1, :40], many[0, :1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(kind: str, double: bool, dtype: torch.dtype) -> None:
    import bitsandbytes

    layer, xs = layers(dtype)
    theirs = bitsandbytes.nn.Linear4bit(512, 256, quant_type=kind, compress_statistics=double, compute_dtype=dtype)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to(dtype).cuda()
    own = nn.Sequential(layer)
    quantize(own, BitsAndBytes4bitConfig(quant_type=kind, double_quant=double), skip_modules=())
    own.cuda()
    with torch.inference_mode():
        for x in xs:
            assert torch.equal(own(x), theirs(x))
    held = nn.Sequential(theirs)
    assert adopt(held) == ("0",)
    with torch.inference_mode():
        for x in xs:
            assert torch.equal(held(x), own(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8_bits_are_those_of_bitsandbytes(threshold: float, dtype: torch.dtype) -> None:
    import bitsandbytes

    layer, xs = layers(dtype)
    theirs = bitsandbytes.nn.Linear8bitLt(512, 256, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.cuda().eval()
    own = nn.Sequential(layer)
    quantize(own, BitsAndBytes8bitConfig(threshold=threshold), skip_modules=())
    own.cuda()
    with torch.inference_mode():
        for x in xs:
            assert torch.equal(own(x), theirs(x))
    held = nn.Sequential(theirs)
    adopt(held)
    with torch.inference_mode():
        for x in xs:
            assert torch.equal(held(x), own(x))


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
def test_quanto_is_quanto(weights: str) -> None:
    from optimum import quanto

    layer, xs = layers(torch.float32)  # in which quanto has no layout of its own for the device
    theirs = nn.Sequential(copy.deepcopy(layer)).cuda()
    quanto.quantize(theirs, weights=getattr(quanto, "qfloat8" if weights == "float8" else f"q{weights}"))
    quanto.freeze(theirs)
    own = nn.Sequential(layer)
    quantize(own, QuantoConfig(weights=weights), skip_modules=())
    own.cuda()
    with torch.no_grad():  # in inference mode torch cannot make the views that theirs makes of its weights
        for x in xs:
            assert torch.equal(own(x), theirs(x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_device_and_the_host_store_nearly_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layers(torch.bfloat16)
    there, here = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
    quantize(there, CONFIGS[kind], skip_modules=())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    quantize(here, CONFIGS[kind], skip_modules=())
    assert sqnr_db(here[0].weight, there[0].weight) > 30
