"""Pipelines that others wrote run on offloaded components: the same bytes, on the device that they are told, not moved."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from foreign_pipelines import PIPELINES
from peft import LoraConfig, get_peft_model_state_dict
from sweeps import sweep
from torch import nn

from vramkit import hooks
from vramkit.errors import ConflictError
from vramkit.offload import Turns, apply_group_offloading, apply_model_offload, load_mapped
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.offload.facade import _answer_for

WAYS: dict[str, dict[str, Any]] = {
    "block": {"slots": 1},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 3000, "slots": 2},
}


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def quietly(name: str, pipe: Any) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
        return PIPELINES[name].call(pipe)


@sweep("name way", itertools.product(PIPELINES, [*WAYS, "model"]), together=1)
def test_pipeline_gives_the_same_bytes(name: str, way: str) -> None:
    pipe = PIPELINES[name].make(name)
    expected = quietly(name, pipe)
    assert expected
    if way == "model":
        offloads = list(apply_model_offload(pipe, "cpu").offloads.values())
    else:
        offloads = [apply_group_offloading(part, "cpu", **WAYS[way]) for part in modules_of(pipe).values()]
    assert sum(offload.stats().groups > 0 for offload in offloads) >= min(2, len(offloads))
    for _ in range(2):
        assert_equal(quietly(name, pipe), expected, way)
    for offload in offloads:
        offload.remove()
    assert_equal(quietly(name, pipe), expected, "removed")


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor], way: str = "") -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True)), way


# --- where it computes, and what moves it


def test_pipeline_is_where_its_models_compute() -> None:
    """The device need not be there: diffusers asks the models in both of its ways."""
    pipe = PIPELINES["WanPipeline"].make("WanPipeline")
    record: list[hooks.Attachment] = []
    for part in modules_of(pipe).values():
        _answer_for(part, torch.device("cuda", 1), record)
    assert pipe.device == pipe._execution_device == torch.device("cuda", 1)
    for attachment in reversed(record):
        attachment.remove()
    assert pipe.device == pipe._execution_device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_pipeline_makes_its_latents_on_the_device(way: str) -> None:
    for name in ("WanPipeline", "LTXPipeline", "StableDiffusionXLPipeline"):
        pipe, resident = (PIPELINES[name].make(name) for _ in range(2))
        for part in modules_of(pipe).values():
            apply_group_offloading(part, "cuda", **WAYS[way])
        assert pipe.device.type == pipe._execution_device.type == "cuda"
        with pytest.warns(RuntimeWarning, match="moving it does nothing"):
            pipe.to("cuda")
        assert all(parameter.device.type == "cpu" for parameter in pipe.vae.parameters() if parameter.nbytes > 2**16)
        assert_equal(quietly(name, pipe), quietly(name, resident.to("cuda")), name)


@pytest.mark.parametrize("way", WAYS)
def test_moving_a_pipeline_is_answered_with_a_warning(way: str) -> None:
    name = "FluxPipeline"
    pipe = PIPELINES[name].make(name)
    expected = quietly(name, pipe)
    for part in modules_of(pipe).values():
        apply_group_offloading(part, "cpu", **WAYS[way])
    for time in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pipe.to("meta")  # stands for any device that is not the host
        said = [str(warning.message) for warning in told if "moving it does nothing" in str(warning.message)]
        assert time > 0 or len(said) == len(modules_of(pipe))  # said once
        assert_equal(quietly(name, pipe), expected, way)
    with pytest.raises(ConflictError, match=r"offload_of\(module\)\.edit\(\)"):
        pipe.to(torch.float16)
    assert_equal(quietly(name, pipe), expected, way)


# --- adapters

Step = Callable[[Any, Path], Any]
ADAPTER_STEPS: dict[str, Step] = {
    "load": lambda pipe, folder: pipe.load_lora_weights(folder, adapter_name="first"),
    "scale": lambda pipe, _: pipe.set_adapters(["first"], [0.5]),
    "disable": lambda pipe, _: pipe.transformer.disable_lora(),
    "enable": lambda pipe, _: pipe.transformer.enable_lora(),
    "fuse": lambda pipe, _: pipe.fuse_lora(),
    "unfuse": lambda pipe, _: pipe.unfuse_lora(),
    "load another": lambda pipe, folder: pipe.load_lora_weights(folder, adapter_name="second"),
    "both": lambda pipe, _: pipe.set_adapters(["first", "second"], [0.5, -0.7]),
    "delete": lambda pipe, _: pipe.delete_adapters("first"),
    "unload": lambda pipe, _: pipe.unload_lora_weights(),
}


def saved_adapter(name: str, folder: Path) -> Path:
    pipe = PIPELINES[name].make(name)
    torch.manual_seed(7)
    layers = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_out.0"])
    pipe.transformer.add_adapter(layers)
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("FluxPipeline", "block"),
        ("WanPipeline", "model"),
        ("LTXPipeline", "leaf"),
        pytest.param("FluxPipeline", "model", marks=pytest.mark.thorough),
        pytest.param("WanPipeline", "block", marks=pytest.mark.thorough),
    ],
)
def test_adapters_are_loaded_and_changed_while_the_transformer_is_offloaded(
    name: str, way: str, tmp_path: Path
) -> None:
    saved_adapter(name, tmp_path)
    pipe, resident = (PIPELINES[name].make(name) for _ in range(2))
    offload = apply_group_offloading(pipe.transformer, "cpu", **WAYS.get(way, {"offload_type": "model_level"}))
    found = [quietly(name, pipe)]
    with torch.no_grad():
        for step, take in ADAPTER_STEPS.items():
            take(pipe, tmp_path)
            take(resident, tmp_path)
            found.append(quietly(name, pipe))
            assert_equal(found[-1], quietly(name, resident), step)
    changed = [not torch.equal(before[0], after[0]) for before, after in itertools.pairwise(found)]
    assert dict(zip(ADAPTER_STEPS, changed, strict=True))["load"]
    assert sum(changed) >= 7
    offload.remove()
    assert_equal(quietly(name, pipe), quietly(name, resident), "removed")


def test_fusing_into_weights_of_a_file_is_refused_until_they_are_taken_in(tmp_path: Path) -> None:
    name = "FluxPipeline"
    saved_adapter(name, tmp_path)
    pipe, resident = (PIPELINES[name].make(name) for _ in range(2))
    write_checkpoint(tmp_path / "model.safetensors", pipe.transformer.state_dict())
    load_mapped(pipe.transformer, tmp_path / "model.safetensors")
    offload = apply_group_offloading(pipe.transformer, "cpu", slots=1)
    for each in (pipe, resident):
        each.load_lora_weights(tmp_path)
    assert_equal(quietly(name, pipe), quietly(name, resident))
    for each in (pipe, resident):
        each.fuse_lora()
    for _ in range(2):
        with pytest.raises(ConflictError, match=r"offload_of\(module\)\.edit\(\)"):
            quietly(name, pipe)
    with offload.edit():
        pass
    for _ in range(2):
        assert_equal(quietly(name, pipe), quietly(name, resident))
    for each in (pipe, resident):
        with offload.edit():
            each.unfuse_lora()
    assert_equal(quietly(name, pipe), quietly(name, resident))
    offload.remove()


# --- turns


def test_another_pipeline_of_a_model_that_keeps_some_weights_wide_is_made_of_its_components(
    tmp_path: Path,
) -> None:
    """`from_pipe` of diffusers would round them, also with the pipeline's own dtype."""
    pipe = PIPELINES["WanPipeline"].make("WanPipeline")
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    expected = quietly("WanPipeline", pipe)
    offload = apply_group_offloading(pipe.transformer, "cpu", slots=1)
    second = type(pipe)(**pipe.components)
    second.set_progress_bar_config(disable=True)
    assert second.transformer is pipe.transformer
    assert_equal(quietly("WanPipeline", second), expected)
    with pytest.raises(ConflictError, match="cannot be cast"):
        type(pipe).from_pipe(pipe, torch_dtype=torch.bfloat16)
    offload.remove()


def test_components_of_a_loaded_pipeline_take_turns_and_keep_a_budget(tmp_path: Path) -> None:
    made = PIPELINES["WanPipeline"].make("WanPipeline")
    made.save_pretrained(tmp_path)
    pipe, other = (type(made).from_pretrained(tmp_path) for _ in range(2))
    for each in (pipe, other):
        each.set_progress_bar_config(disable=True)
    expected = quietly("WanPipeline", other)
    turns = Turns()
    offloads = {
        name: apply_group_offloading(part, "cpu", slots=1, turns=turns) for name, part in modules_of(pipe).items()
    }
    seen: list[tuple[str, ...]] = []
    for part in modules_of(pipe).values():
        part.register_forward_hook(
            lambda *_: seen.append(tuple(n for n, o in offloads.items() if o.stats().slots and not o.is_at_rest))
        )
    assert_equal(quietly("WanPipeline", pipe), expected, "in turn")
    assert {("text_encoder",), ("transformer",)} <= set(seen), {n: o.stats().slots for n, o in offloads.items()}
    assert max(map(len, seen)) == 1
    turns.budget_bytes = max(offload.wanted_bytes for offload in offloads.values())
    held: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: held.append(sum(o.held_bytes for o in offloads.values())))
    for _ in range(2):
        assert_equal(quietly("WanPipeline", pipe), expected, "within a budget")
    assert 0 < max(held) <= turns.budget_bytes
    for offload in offloads.values():
        offload.remove()
    assert_equal(quietly("WanPipeline", pipe), expected, "removed")


def test_another_librarys_offloading_is_refused_over_ours() -> None:
    pipe = PIPELINES["WanPipeline"].make("WanPipeline")
    offload = apply_group_offloading(pipe.transformer, "cpu")
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(
            ConflictError, match=r"model/sequential CPU offloading to WanTransformer3DModel.*remove\(\)"
        ):
            enable(device="cpu")
    assert not any(hasattr(part, "_hf_hook") for part in pipe.transformer.modules())
    pipe.remove_all_hooks()
    offload.remove()
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")


@pytest.mark.parametrize(
    "way", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offloading_of_diffusers_is_refused_over_ours_at_once(way: dict[str, Any]) -> None:
    name = "WanPipeline"
    pipe, resident = (PIPELINES[name].make(name) for _ in range(2))
    offload = apply_group_offloading(pipe.transformer, "cpu", slots=1)
    device = torch.device("cpu")
    applied: list[Callable[[], object]] = [
        lambda: pipe.transformer.enable_group_offload(device, **way),
        lambda: diffusers.hooks.apply_group_offloading(pipe.transformer, device, **way),
        lambda: diffusers.hooks.apply_group_offloading(nn.ModuleDict({"of": pipe.transformer}), device, **way),
    ]
    for apply in applied:
        with pytest.raises(ConflictError, match=r"group offloading of diffusers to WanTransformer3DModel.*remove\(\)"):
            apply()
    assert not any(hasattr(part, "_diffusers_hook") or hasattr(part, "_hf_hook") for part in pipe.transformer.modules())
    assert_equal(quietly(name, pipe), quietly(name, resident))
    offload.remove()
    pipe.transformer.enable_group_offload(device, **way)
    assert_equal(quietly(name, pipe), quietly(name, resident), "removed")
