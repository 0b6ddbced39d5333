"""Adapters of a pipeline: the clips of diffusers from the same files, and the same bytes however weights are kept."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    load_oracle,
    write_cogvideox_checkpoint,
    write_hunyuan_checkpoint,
    write_lora,
)
from safetensors.torch import load_file

from vramkit import CogVideoXPipeline, HunyuanVideoPipeline, WanPipeline

FILE = "pytorch_lora_weights.safetensors"
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 5, "output_type": "pt"}


@pytest.fixture(scope="module")
def loras(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the Wan checkpoint, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("loras")
    transformer = WanPipeline.from_pretrained(wan_folder).transformer
    write_lora(transformer, folder / "cat", rank=4, seed=5)
    write_lora(transformer, folder / "dog", rank=2, seed=6)
    return {"cat": folder / "cat", "dog": folder / "dog"}


@pytest.fixture
def pipeline(wan_folder: Path) -> WanPipeline:
    return load(wan_folder)


def load(folder: Path, pipeline_class: Any = WanPipeline, **options: Any) -> Any:
    pipeline = pipeline_class.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_transformer(folder: Path, **options: Any) -> WanPipeline:
    pipeline: WanPipeline = load(folder, text_encoder=None, tokenizer=None, vae=None, **options)
    return pipeline


def clip(pipeline: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline("a cat on a log", **SMALL | options, generator=generator).frames)


def flow(pipeline: WanPipeline) -> torch.Tensor:
    """One prediction of the transformer."""
    generator = torch.Generator().manual_seed(1)
    dtype = pipeline.transformer.dtype
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator).to(dtype)
    text = torch.randn(1, 7, 32, generator=generator).to(dtype)
    sample: torch.Tensor = pipeline.transformer(latents, torch.tensor([500.0]), text).sample
    return sample


def load_both(pipeline: Any, loras: dict[str, Path]) -> None:
    for name, folder in loras.items():
        pipeline.load_lora_weights(folder, adapter_name=name)


@contextlib.contextmanager
def warnings_of_diffusers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|Adapter .* was active")
        yield


def test_each_step_is_the_clip_of_diffusers(pipeline: WanPipeline, wan_folder: Path, loras: dict[str, Path]) -> None:
    oracle = load_oracle(wan_folder)
    steps: dict[str, Callable[[Any], object]] = {
        "load": lambda p: p.load_lora_weights(str(loras["cat"]), adapter_name="cat"),
        "load another": lambda p: p.load_lora_weights(str(loras["dog"]), adapter_name="dog"),
        "weigh both": lambda p: p.set_adapters(["cat", "dog"], [0.3, 1.4]),
        "one weight": lambda p: p.set_adapters(["cat", "dog"], 0.5),
        "switch": lambda p: p.set_adapters("cat"),
        "fuse": lambda p: p.fuse_lora(lora_scale=0.7),
        "unload what is fused": lambda p: p.unload_lora_weights(),
    }
    clips = {"nothing": clip(pipeline)}
    for name, step in steps.items():
        step(pipeline)
        with warnings_of_diffusers():
            step(oracle)
        assert pipeline.get_active_adapters() == oracle.get_active_adapters()
        assert pipeline.get_list_adapters() == oracle.get_list_adapters()
        clips[name] = clip(pipeline)
        assert (clips[name] - clip(oracle)).abs().max() <= 1e-4, name
        assert (clips[name] - clips["nothing"]).abs().max() > 0.01, name


FAMILIES: list[tuple[Any, Callable[[Path], Path], dict[str, Any]]] = [
    (HunyuanVideoPipeline, write_hunyuan_checkpoint, {"max_sequence_length": 16}),
    (CogVideoXPipeline, write_cogvideox_checkpoint, {"num_frames": 9, "max_sequence_length": 16}),
]


@pytest.mark.parametrize(("pipeline_class", "write", "options"), FAMILIES, ids=lambda x: getattr(x, "__name__", ""))
def test_families_load_switch_and_unload_while_streamed(
    pipeline_class: Any, write: Callable[[Path], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "checkpoint")
    theirs, ours, streamed = load_oracle(folder), load(folder, pipeline_class), load(folder, pipeline_class)
    plain = clip(ours, **options)
    path = write_lora(ours.transformer, tmp_path / "lora")
    streamed.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable")
    for each in (theirs, ours, streamed):
        each.load_lora_weights(str(path), adapter_name="style")
        each.set_adapters("style", 0.8)
    styled = clip(ours, **options)
    assert (styled - clip(theirs, **options)).abs().max() <= 1e-4
    assert (styled - plain).abs().max() > 0.01
    assert torch.equal(clip(streamed, **options), styled)
    streamed.unload_lora_weights()
    assert torch.equal(clip(streamed, **options), plain)


OFFLOADS: dict[str, Callable[[WanPipeline, Path], object]] = {
    "resident": lambda p, _: None,
    "block level": lambda p, _: p.transformer.enable_group_offload("cpu", store="pageable"),
    "leaf level": lambda p, _: p.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable"),
    "cut leaves": lambda p, _: p.transformer.enable_group_offload(
        "cpu", offload_type="leaf_level", store="pageable", unit_bytes=1024
    ),
    "spilled": lambda p, folder: p.transformer.enable_group_offload("cpu", offload_to_disk_path=folder),
    "model level": lambda p, _: p.enable_model_cpu_offload("cpu"),
}


@pytest.mark.parametrize("order", ["adapters first", "adapters last"])
@pytest.mark.parametrize("casting", ["plain", "fp8"])
@pytest.mark.parametrize("offload", [name for name in OFFLOADS if name != "resident"])
def test_streamed_is_resident(
    offload: str, casting: str, order: str, wan_folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    def prepared(name: str) -> WanPipeline:
        pipeline = load_transformer(wan_folder, torch_dtype=torch.bfloat16)
        if order == "adapters first":
            load_both(pipeline, loras)
        if casting == "fp8":
            pipeline.transformer.enable_layerwise_casting()
        OFFLOADS[name](pipeline, tmp_path)
        if order == "adapters last":
            load_both(pipeline, loras)
        return pipeline

    resident, streamed = prepared("resident"), prepared(offload)
    weight = streamed.transformer.blocks[0].attn1.to_q.lora_A["cat"].weight
    assert type(weight) is torch.nn.Parameter
    assert weight.dtype == torch.bfloat16
    flows = []
    for weights in ([1.0, 0.0], [0.4, 1.2], [0.0, 1.0]):
        for pipeline in (resident, streamed):
            pipeline.set_adapters(["cat", "dog"], weights)
        flows.append(flow(streamed))
        assert torch.equal(flows[-1], flow(resident))
        assert torch.equal(flows[-1], flow(streamed))
    assert not torch.equal(flows[0], flows[2])
    for pipeline in (resident, streamed):
        pipeline.unload_lora_weights()
    assert torch.equal(flow(streamed), flow(resident))
    assert not torch.equal(flow(streamed), flows[0])


def test_adapters_rest_in_their_file_or_in_memory_beside_weights_on_disk(
    wan_folder: Path, loras: dict[str, Path]
) -> None:
    resident, streamed = load_transformer(wan_folder), load_transformer(wan_folder)
    streamed.transformer.enable_group_offload("cpu", store="disk")
    for pipeline in (resident, streamed):
        pipeline.load_lora_weights(loras["cat"])
        from_memory = {key: tensor.clone() for key, tensor in load_file(loras["dog"] / FILE).items()}
        pipeline.load_lora_weights(from_memory)
        pipeline.set_adapters(pipeline.get_list_adapters()["transformer"])
    assert torch.equal(flow(streamed), flow(resident))
