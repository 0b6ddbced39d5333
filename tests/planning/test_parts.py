"""Calls that go past a pipeline under a plan: parts of it called by themselves, larger than was planned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocated_bytes import AllocatedBytes
from families import FAMILIES, Stock, seeded
from foreign_pipelines import PIPELINES
from live_bytes import LiveBytes

from vramkit import PlanInfeasible, fit, plan
from vramkit.memory import GIB
from vramkit.planning.calls import pipeline_call


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return found


def encoded(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = vae.encode(pictures).latent_dist.mode()
    return found


def needed(work: Callable[[], torch.Tensor]) -> int:
    with AllocatedBytes() as count:
        work()
    return count.peak_bytes


def given(name: str, stock: Stock) -> tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]:
    """A pipeline, a call of it, and latents and pictures that are larger than those of the call."""
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    if name in FAMILIES:
        clip = {"prompt": "a cat", **FAMILIES[name].clip}
        return stock.pipeline(name), call | clip, torch.randn(1, 16, 2, 8, 12), torch.randn(1, 3, 5, 64, 96)
    pipe = PIPELINES[name].make(name)
    channels = pipe.vae.config.latent_channels
    return pipe, call | PIPELINES[name].inputs(), torch.randn(1, channels, 32, 32), torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("name", ["Wan2.1", "StableDiffusionPipeline"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:a whole decode does not fit")
def test_a_larger_call_of_the_autoencoder_is_planned_for_or_refused(name: str, stock: Stock) -> None:
    pipe, call, latents, pictures = given(name, stock)
    works = (lambda: decoded(pipe.vae, latents)), (lambda: encoded(pipe.vae, pictures))
    expected, sizes = [work() for work in works], [needed(work) for work in works]
    kind = type(pipe.vae)
    floor = plan(pipe, GIB, device="cpu", **call).floor_bytes
    with fit(pipe, floor, device="cpu", **call) as fitted:
        before = fitted.plan
        with pytest.raises(PlanInfeasible, match="vae"):
            works[0]()
        assert fitted.plan is before
    with fit(pipe, floor + 2 * max(sizes), device="cpu", **call) as fitted:
        for work, size, result in zip(works, sizes, expected, strict=True):
            assert torch.equal(work(), result)
            assert fitted.plan.component("vae").activation_bytes >= 0.999 * size
            assert fitted.plan.peak_bytes <= fitted.plan.vram_bytes
        before = fitted.plan
        works[0]()
        assert fitted.plan is before
    assert type(pipe.vae) is kind
    assert torch.equal(works[0](), expected[0])


def test_latents_of_a_plan_are_decoded_as_it_says(stock: Stock) -> None:
    pipe, call, latents, _ = given("Wan2.1", stock)
    large = needed(lambda: decoded(pipe.vae, latents))
    pipe.vae.enable_striping(4)
    in_stripes, small = decoded(pipe.vae, latents), needed(lambda: decoded(pipe.vae, latents))
    pipe.vae.disable_striping()
    with fit(pipe, (large + small) // 2, device="cpu", **call) as fitted:
        found = decoded(pipe.vae, latents)
        assert str(fitted.plan.decode) in {"2 stripes", "4 stripes"}
        assert torch.allclose(found, in_stripes, atol=1e-5)
        before = fitted.plan
        pipe(**call, generator=seeded())
        assert fitted.plan is before


def test_parts_that_need_no_more_than_a_call_leave_the_plan(stock: Stock) -> None:
    pipe, call, _, _ = given("Wan2.1", stock)
    texts = {"prompt": "a dog", "max_sequence_length": 16}
    expected = pipe.encode_prompt(**texts)[0]
    latents = torch.randn(FAMILIES["Wan2.1"].latents)
    clip = decoded(pipe.vae, latents)
    with fit(pipe, GIB, device="cpu", **{**call, "output_type": "pt"}) as fitted:
        before = fitted.plan
        assert torch.equal(pipe.encode_prompt(**texts)[0], expected)
        assert torch.equal(decoded(pipe.vae, latents), clip)
        assert fitted.plan is before


def test_tensors_given_to_a_pipeline_count_once_whatever_their_size() -> None:
    large, small = torch.randn(300, 300), torch.randn(100, 100)
    held: list[int] = []

    class Pipe:
        def __call__(self, prompt_embeds: Any, latents: Any, images: Any) -> None:
            assert prompt_embeds is images[0]
            assert prompt_embeds.is_meta
            assert torch.equal(latents, small)
            assert latents is not small
            held.append(count.live_bytes)

    with LiveBytes() as count:
        pipeline_call(Pipe(), {"prompt_embeds": large, "latents": small, "images": [large, small]}).make(Pipe())
    assert held == [large.nbytes + small.nbytes]
