"""The table of compatibility: pipelines of diffusers within a budget, each a row and a test, the same bytes as without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from allocated_bytes import AllocatedBytes, is_planned_well
from foreign_pipelines import MORE_PIPELINES, PIPELINES

from vramkit import Plan, PlanInfeasible, fit, plan
from vramkit.memory import GIB

ROWS = PIPELINES | MORE_PIPELINES
# Tables of positions that models keep as plain attributes are counted as made by a call, where they were there before.
_KEPT_BESIDE_WEIGHTS = {"QwenImagePipeline", "QwenImageImg2ImgPipeline"}
# Nobody knows which experts a router takes: it is planned for all tokens going to the same ones.
_ROUTED = {"HiDreamImagePipeline"}


def given(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"num_inference_steps": 2, "output_type": "pt", **ROWS[name].inputs()}


def called(name: str, pipe: Any) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
        return ROWS[name].call(pipe)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return bool(expected) and all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:a whole decode does not fit")
@pytest.mark.parametrize("name", ROWS)
def test_the_same_bytes_within_a_budget(name: str) -> None:
    pipe = ROWS[name].make(name)
    with AllocatedBytes() as count:
        expected = called(name, pipe)
    ample = plan(pipe, GIB, device="cpu", **given(name))
    predicted = max(phase.activation_bytes for phase in ample.phases)
    if name not in _KEPT_BESIDE_WEIGHTS:
        assert is_planned_well(predicted, count.peak_bytes, least=0.95, most=1.1 if name in _ROUTED else 1.05)
    with fit(pipe, int(ample.floor_bytes * 1.02), device="cpu", **given(name)) as fitted:
        found = called(name, pipe)
        assert sum(each.loaded_bytes for each in fitted.stats().values()) > 0
        assert Plan.from_json(fitted.plan.to_json()) == fitted.plan
        assert str(fitted.plan.decode) == "tiles" or same(found, expected)
    assert same(called(name, pipe), expected)


def test_the_table_is_long() -> None:
    assert len(ROWS) >= 30


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "PixArtAlphaPipeline"])
def test_their_own_saving_and_loading(name: str, tmp_path: Path) -> None:
    pipe = ROWS[name].make(name)
    expected = called(name, pipe)
    with fit(pipe, GIB, device="cpu", **given(name)):
        pipe.save_pretrained(tmp_path)
    loaded = getattr(diffusers, name).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    with fit(loaded, GIB, device="cpu", **given(name)) as fitted:
        assert same(called(name, loaded), expected)
        assert type(loaded).__name__ == name
        assert fitted.plan.model == name


def test_another_pipeline_of_the_same_parts() -> None:
    pipe = ROWS["FluxPipeline"].make("FluxPipeline")
    expected, pictured = called("FluxPipeline", pipe), ROWS["FluxImg2ImgPipeline"].call
    second = diffusers.FluxImg2ImgPipeline(**pipe.components)
    expected_of_second = pictured(second)
    floor_bytes = plan(pipe, GIB, device="cpu", **given("FluxPipeline")).floor_bytes
    with fit(pipe, int(floor_bytes * 1.1), device="cpu", **given("FluxPipeline")):
        again = type(pipe).from_pipe(pipe)
        of_pictures = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
        assert of_pictures.transformer is again.transformer is pipe.transformer
        assert type(pipe.transformer) in {diffusers.FluxTransformer2DModel}
        assert type(pipe.transformer) not in {diffusers.AutoencoderKL}
        assert same(called("FluxPipeline", again), expected)
        assert same(pictured(of_pictures), expected_of_second)
    assert same(called("FluxPipeline", again), expected)
    assert same(pictured(of_pictures), expected_of_second)


CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "Taylor": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "broadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_between_steps(cache: str) -> None:
    pipe, reference = (ROWS["FluxPipeline"].make("FluxPipeline") for _ in range(2))
    for each in (pipe, reference):
        each.transformer.enable_cache(CACHES[cache]())
    floor_bytes = plan(pipe, GIB, device="cpu", **given("FluxPipeline")).floor_bytes
    with fit(pipe, int(floor_bytes * 1.1), device="cpu", **given("FluxPipeline")) as fitted:
        assert not any("cannot be rehearsed" in note for note in fitted.plan.notes)
        for _ in range(2):
            assert same(called("FluxPipeline", pipe), called("FluxPipeline", reference))
        assert sum(each.loaded_bytes for each in fitted.stats().values()) > 0


def test_latents_say_how_large_a_clip_is() -> None:
    pipe, call = ROWS["WanPipeline"].make("WanPipeline"), given("WanPipeline")
    small, large = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 4, 5, 32, 32)
    expected = pipe(**call, latents=small)[0]
    floor_bytes = plan(pipe, GIB, device="cpu", **call).floor_bytes
    with fit(pipe, int(floor_bytes * 1.1), device="cpu", **call) as fitted:
        assert torch.equal(pipe(**call, latents=small)[0], expected)
        with pytest.raises(PlanInfeasible, match="activations"):
            pipe(**call, latents=large)
        assert torch.equal(pipe(**call, latents=small)[0], expected)
        assert fitted.plan.call["latents"] == "float32 [1, 4, 3, 8, 8]"
        called("WanPipeline", pipe)  # none in it: it is planned for by its sizes again
        assert "latents" not in fitted.plan.call
