"""The README's table of families and features: each of its cells is a test here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import numpy as np
import pytest
import torch

import vramkit
from vramkit.offload import apply_group_offloading

README = Path(__file__).parents[2] / "README.md"


@dataclass(frozen=True, kw_only=True)
class Family:
    pipeline: str
    write: Callable[[Path], Path]
    clip: dict[str, Any]
    latent_key: str = "latent_channels"  # of the VAE's config
    tiles: dict[str, Any]  # arguments of enable_tiling


_TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 32,
    "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 16,
}
FAMILIES = {
    "Wan2.1": Family(
        pipeline="WanPipeline",
        write=checkpoints.write_wan_checkpoint,
        clip={"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16},
        latent_key="z_dim",
        tiles=_TILES,
    ),
    "HunyuanVideo": Family(
        pipeline="HunyuanVideoPipeline",
        write=checkpoints.write_hunyuan_checkpoint,
        clip={"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16},
        tiles=_TILES,
    ),
    "LTX-Video": Family(
        pipeline="LTXPipeline",
        write=checkpoints.write_ltx_checkpoint,
        clip={"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16},
        tiles={name: 2 * size for name, size in _TILES.items()},
    ),
    "CogVideoX": Family(
        pipeline="CogVideoXPipeline",
        write=checkpoints.write_cogvideox_checkpoint,
        clip={"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 16},
        tiles={
            "tile_sample_min_height": 32,
            "tile_sample_min_width": 32,
            "tile_overlap_factor_height": 0.25,
            "tile_overlap_factor_width": 0.25,
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """A family, its checkpoint and a folder for what a test writes."""

    family: Family
    folder: Path
    scratch: Path

    def load(self, **options: Any) -> Any:
        pipeline = getattr(vramkit, self.family.pipeline).from_pretrained(self.folder, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def clip(self, pipeline: Any, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        arguments = {"num_inference_steps": 2, "output_type": "np", "generator": generator}
        return pipeline("a cat on a log", **self.family.clip | arguments | options).frames


def same_clip_as_diffusers(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = getattr(diffusers, case.family.pipeline).from_pretrained(case.folder, torch_dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    ours, theirs = (case.clip(pipeline, num_inference_steps=5) for pipeline in (case.load(), oracle))
    assert np.abs(ours - theirs).max() <= 1e-4


def saved_and_loaded(case: Case) -> None:
    pipeline = case.load()
    pipeline.save_pretrained(case.scratch / "saved")
    again = Case(case.family, case.scratch / "saved", case.scratch).load()
    np.testing.assert_array_equal(case.clip(again), case.clip(pipeline))


def streamed(case: Case, offload_type: str, store: str) -> None:
    pipeline = case.load()
    models = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    for model in models:
        apply_group_offloading(model, "cpu", offload_type=offload_type, store=store)
    np.testing.assert_array_equal(case.clip(pipeline), case.clip(case.load()))


def streamed_blocks(case: Case) -> None:
    streamed(case, "block_level", "pageable")


def streamed_leaves(case: Case) -> None:
    streamed(case, "leaf_level", "pageable")


def streamed_from_disk(case: Case) -> None:
    streamed(case, "leaf_level", "disk")


def whole_models(case: Case) -> None:
    pipeline = case.load()
    pipeline.enable_model_cpu_offload("cpu")
    np.testing.assert_array_equal(case.clip(pipeline), case.clip(case.load()))


def fp8_casting(case: Case) -> None:
    clips = []
    for offloaded in (False, True):
        pipeline = case.load(torch_dtype=torch.bfloat16)
        pipeline.transformer.enable_layerwise_casting()
        if offloaded:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        clips.append(case.clip(pipeline))
    np.testing.assert_array_equal(*clips)
    assert not np.array_equal(clips[0], case.clip(case.load(torch_dtype=torch.bfloat16)))


def four_bits(case: Case) -> None:
    clips = []
    for offloaded in (False, True):
        config = vramkit.PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit",
            quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            components_to_quantize=["transformer"],
        )
        pipeline = case.load(torch_dtype=torch.bfloat16, quantization_config=config)
        if offloaded:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        clips.append(case.clip(pipeline))
    np.testing.assert_array_equal(*clips)
    assert not np.array_equal(clips[0], case.clip(case.load(torch_dtype=torch.bfloat16)))


def lora(case: Case) -> None:
    plain = case.load()
    path = checkpoints.write_lora(plain.transformer, case.scratch)
    clips = []
    for offloaded in (False, True):
        pipeline = case.load()
        if offloaded:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        pipeline.load_lora_weights(path, adapter_name="style")
        pipeline.set_adapters("style", 0.5)
        clips.append(case.clip(pipeline))
    np.testing.assert_array_equal(*clips)
    assert not np.array_equal(clips[0], case.clip(plain))
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(case.clip(pipeline), case.clip(plain))


def tiled_decode(case: Case) -> None:
    pipeline = case.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = getattr(diffusers, type(pipeline.vae).__name__).from_pretrained(case.folder, subfolder="vae")
    latents = torch.randn(1, oracle.config[case.family.latent_key], 3, 6, 8)
    whole = pipeline.vae.decode(latents).sample
    for vae in (pipeline.vae, oracle):
        vae.enable_tiling(**case.family.tiles)
    ours, theirs = pipeline.vae.decode(latents).sample, oracle.decode(latents).sample
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not torch.equal(ours, whole)


def compiled(case: Case) -> None:
    pipeline = case.load()
    expected = case.clip(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, backend="eager")
    assert np.abs(case.clip(pipeline) - expected).max() <= 1e-5
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
    "tiled decode": tiled_decode,
    "compiled": compiled,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in written:
            written[name] = FAMILIES[name].write(tmp_path_factory.mktemp("checkpoint"))
        return written[name]

    return find


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family: str, feature: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    FEATURES[feature](Case(FAMILIES[family], folder_of(family), tmp_path))


def test_the_table_shows_these_cells() -> None:
    text = README.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| .*\|$", text, re.MULTILINE)
    ]
    header = next(row for row in rows if row[0] == "Family")
    shown = {row[0]: row[1:] for row in rows if row[0] in FAMILIES}
    assert header[1:] == list(FEATURES)
    assert shown == {name: ["yes"] * len(FEATURES) for name in FAMILIES}
