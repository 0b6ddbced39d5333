"""The table of families and features in docs/video.md: each of its cells is a test here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_oracle, write_lora
from documents import DOCS, tables
from families import FAMILIES, WHOLE, Family, Stock, compare, frames, load, models_of, relative_error
from sweeps import sweep

import vramkit
from vramkit.offload import apply_group_offloading, offload_of
from vramkit.quant import BitsAndBytes4bitConfig, quantize


@dataclass(frozen=True)
class Case:
    """A family, its checkpoints and a folder for what a test writes."""

    name: str
    stock: Stock
    scratch: Path

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def load(self, **options: Any) -> Any:
        return load(self.name, self.stock.folder(self.name), **options)

    def clip(self, pipeline: Any, **options: Any) -> Any:
        return frames(pipeline, **{**self.family.clip, "num_inference_steps": 2} | options)

    def expected(self, **options: Any) -> Any:
        """The clip of a pipeline that lies in memory as it was loaded; to be read, not changed."""
        make = self.stock.pipeline
        return self.stock.once(f"clip {self.name} {options}", lambda: self.clip(make(self.name, **options)))

    def narrow(self) -> Any:
        """The same of one in 16 bits."""
        return self.stock.once(f"narrow {self.name}", lambda: self.clip(self.load(torch_dtype=torch.bfloat16)))


def same_clip_as_diffusers(case: Case) -> None:
    compare(case.stock.pipeline(case.name), case.stock.oracle(case.name), **case.family.clip)


def saved_and_loaded(case: Case) -> None:
    case.load().save_pretrained(case.scratch)
    np.testing.assert_array_equal(case.clip(load(case.name, case.scratch)), case.expected())
    compare(load_oracle(case.scratch, case.family.pipeline), case.stock.oracle(case.name), **case.family.clip)


def streamed(case: Case, store: str, *offload_types: str) -> None:
    expected = case.expected()
    for offload_type in offload_types:
        pipeline = case.load()
        for model in models_of(pipeline).values():
            apply_group_offloading(model, "cpu", offload_type=offload_type, store=store)
        for _ in range(1 if case.family.is_variant else 2):
            np.testing.assert_array_equal(case.clip(pipeline), expected)


def streamed_blocks(case: Case) -> None:
    streamed(case, "pageable", "block_level")


def streamed_leaves(case: Case) -> None:
    streamed(case, "pageable", "leaf_level")


def streamed_from_disk(case: Case) -> None:
    streamed(case, "disk", "block_level", "leaf_level")


def whole_models(case: Case) -> None:
    pipeline = case.load()
    pipeline.enable_model_cpu_offload("cpu")
    pipeline.enable_model_cpu_offload("cpu")  # again is harmless
    assert all(offload_of(model) is not None for model in models_of(pipeline).values())
    np.testing.assert_array_equal(case.clip(pipeline), case.expected())


def resident_and_streamed(case: Case, make: Callable[[], Any]) -> None:
    """The transformer changes the clip as little in memory as streamed, and does change it."""
    clips = []
    for offloaded in (False, True):
        pipeline = make()
        if offloaded:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        clips.append(case.clip(pipeline))
    np.testing.assert_array_equal(*clips)
    assert 1e-5 < relative_error(clips[0], case.narrow()) < 0.5


def fp8_casting(case: Case) -> None:
    def make() -> Any:
        pipeline = case.load(torch_dtype=torch.bfloat16)
        pipeline.transformer.enable_layerwise_casting()
        return pipeline

    resident_and_streamed(case, make)


def four_bits(case: Case) -> None:
    config = vramkit.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        components_to_quantize=["transformer"],
    )
    resident_and_streamed(case, lambda: case.load(torch_dtype=torch.bfloat16, quantization_config=config))


def lora(case: Case) -> None:
    expected = case.expected()
    path = write_lora(case.stock.pipeline(case.name).transformer, case.scratch)
    clips = []
    for offloaded in (False, True):
        pipeline = case.load()
        if offloaded:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        pipeline.load_lora_weights(path, adapter_name="style")
        pipeline.set_adapters("style", 0.5)
        clips.append(case.clip(pipeline))
    np.testing.assert_array_equal(*clips)
    assert not np.array_equal(clips[0], expected)
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(case.clip(pipeline), expected)


def paired_guidance(case: Case) -> None:
    """Both prompts pass through a layer while it is there, whatever its weights are, and make the same clip."""
    adapter = write_lora(case.stock.pipeline(case.name).transformer, case.scratch)
    prompts = {"prompt": ["a cat", "a dog in the deep snow"], "negative_prompt": "dark, blurry, of low quality"}

    def with_adapter(pipeline: Any) -> None:
        pipeline.load_lora_weights(adapter)

    def in_fp8(pipeline: Any) -> None:
        pipeline.transformer.enable_layerwise_casting()

    def in_nf4(pipeline: Any) -> None:
        quantize(pipeline.transformer, BitsAndBytes4bitConfig(quant_type="nf4"))

    for change in (with_adapter, in_fp8, in_nf4):
        pipeline = case.load()
        change(pipeline)
        pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        in_turn = case.clip(pipeline, **prompts, **case.family.guided)
        pipeline.guidance = "paired"
        np.testing.assert_array_equal(case.clip(pipeline, **prompts, **case.family.guided), in_turn)


def tiled_decode(case: Case) -> None:
    ours, oracle = case.load(), load_oracle(case.stock.folder(case.name), case.family.pipeline)
    for pipeline in (ours, oracle):
        pipeline.vae.enable_tiling(**case.family.tiles)
    compare(ours, oracle, **case.family.clip)
    assert relative_error(case.clip(ours), case.expected()) > 1e-4


def compiled(case: Case) -> None:
    shallow = {"transformer": {"num_layers": 1}}
    pipeline = case.stock.pipeline(case.name, **shallow)
    expected = case.clip(pipeline, guidance_scale=1.0)  # of each text there is a graph
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, backend="eager")
    assert relative_error(case.clip(pipeline, guidance_scale=1.0), expected) <= 1e-5
    torch._dynamo.reset()


FEATURES: dict[str, Callable[[Case], None]] = {
    "the clip of diffusers": same_clip_as_diffusers,
    "saved and loaded": saved_and_loaded,
    "blocks streamed": streamed_blocks,
    "leaves streamed": streamed_leaves,
    "from disk": streamed_from_disk,
    "whole models on demand": whole_models,
    "fp8 casting": fp8_casting,
    "4-bit weights": four_bits,
    "LoRA": lora,
    "paired guidance": paired_guidance,
    "tiled decode": tiled_decode,
    "compiled": compiled,
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", WHOLE)
def test_cell(family: str, feature: str, stock: Stock, tmp_path: Path) -> None:
    FEATURES[feature](Case(family, stock, tmp_path))


@sweep("family feature", product((name for name in FAMILIES if name not in WHOLE), FEATURES), together=1)
def test_cell_of_a_variant(family: str, feature: str, stock: Stock, tmp_path: Path) -> None:
    FEATURES[feature](Case(family, stock, tmp_path))


def test_the_table_shows_these_cells() -> None:
    rows = tables((DOCS / "video.md").read_text(encoding="utf-8"))
    header = next(row for row in rows if row[0] == "Family")
    shown = {row[0]: row[1:] for row in rows if row[0] in FAMILIES}
    assert header[1:] == list(FEATURES)
    assert shown == {name: ["yes"] * len(FEATURES) for name in FAMILIES}
