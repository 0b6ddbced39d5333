"""LTX-Video image-to-video and its conditions at any frame, against diffusers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_oracle
from diffusers import FlowMatchEulerDiscreteScheduler as Oracle
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition as TheirCondition
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from families import FAMILIES, Stock, compare, frames, normal, picture, relative_error, seeded

import vramkit
from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.calling.known import FirstTokens
from vramkit.pipelines.ltx.condition import linear_quadratic_timesteps
from vramkit.pipelines.schedulers import FlowMatchEulerDiscreteScheduler

IMAGE, CONDITIONS = "LTX-Video image-to-video", "LTX-Video conditions"
CLIP = FAMILIES[IMAGE].clip | {"num_inference_steps": 2}
PLAIN = {"height": 64, "width": 96, "num_frames": 17, "max_sequence_length": 16, "num_inference_steps": 2}
PLAIN |= {"decode_timestep": 0.05}
FRAMES = [picture(seed=seed) for seed in range(20)]


class TestImageToVideo:
    @pytest.fixture
    def family(self) -> str:
        return IMAGE

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_frames": 1},
            {"guidance_rescale": 0.7, "output_type": "latent"},
            {"prompt": ["a", "b"], "image": [picture(), picture(seed=9)], "guidance_scale": 1.0},
            {"prompt": ["a", "b"], "image": [*FRAMES[:2]], "generator": lambda: [seeded(4), seeded(5)]},
            {"image": torch.rand(3, 40, 60)},
            {"latents": normal(1, 12, 8, seed=9)},
        ],
        ids=", ".join,
    )
    def test_same_clip_as_diffusers(self, changes: dict[str, Any], pipeline: Any, oracle: Any) -> None:
        compare(pipeline, oracle, **CLIP | changes)

    def test_the_image_counts(self, pipeline: Any) -> None:
        assert relative_error(frames(pipeline, **CLIP | {"image": picture(seed=9)}), frames(pipeline, **CLIP)) > 1e-3

    def test_refused(self, idle: Any) -> None:
        for changes, message in (
            ({"image": None}, "there is no image"),
            ({"image": FRAMES[:3]}, "3 pictures for 1 prompts"),
        ):
            with pytest.raises(ConfigError, match=message):
                idle(**CLIP | {"prompt": "a cat"} | changes)
        idle.vae = None
        with pytest.raises(ConfigError, match="no vae"):
            idle(**CLIP, prompt="a cat", output_type="latent")

    def test_first_tokens_stay(self) -> None:
        known, latents = FirstTokens(4), torch.zeros(2, 12, 3)
        inputs = known.inputs(latents, torch.tensor(500.0))
        assert inputs["timestep"].tolist() == [[0.0, 500.0]] * 2
        assert inputs["timestep_tokens"] == (4, 8)
        stepped = known.stepped(
            lambda noise, timestep, x: x + noise, torch.ones_like(latents), torch.tensor(1.0), latents
        )
        assert stepped[:, :4].eq(0).all()
        assert stepped[:, 4:].eq(1).all()


SHOWN: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "an image before others": [{"image": FRAMES[0]}, {"image": FRAMES[1], "frame_index": 9, "strength": 0.6}],
    "a clip": [{"video": FRAMES[:12]}],  # of which nine frames are taken
    "a clip later": [{"video": FRAMES[:9], "frame_index": 8, "strength": 0.8}, {"image": FRAMES[3]}],
    "a long clip later": [{"video": FRAMES, "frame_index": 0, "strength": 0.3}],
}


class TestConditions:
    @pytest.fixture
    def family(self) -> str:
        return CONDITIONS

    @pytest.mark.parametrize("shown", SHOWN)
    def test_same_clip_as_diffusers(self, shown: str, pipeline: Any, oracle: Any) -> None:
        clips = []
        for pipe, kind in ((pipeline, vramkit.LTXVideoCondition), (oracle, TheirCondition)):
            conditions = [kind(**each) for each in SHOWN[shown]] or None
            clips.append(frames(pipe, **PLAIN, conditions=conditions))
        assert relative_error(*clips) <= 1e-4

    @pytest.mark.parametrize(
        "changes",
        [
            {"image": picture(), "image_cond_noise_scale": 0.0, "timesteps": [1000, 900, 500]},
            {"image": picture(), "strength": 0.9, "frame_index": 8, "output_type": "latent", "guidance_scale": 1.0},
            {"latents": normal(1, 8, 3, 2, 3, seed=9), "denoise_strength": 0.5, "num_inference_steps": 5},
        ],
        ids=", ".join,
    )
    def test_arguments(self, changes: dict[str, Any], pipeline: Any, oracle: Any) -> None:
        compare(pipeline, oracle, **PLAIN | changes)

    def test_other_arguments_stand_for_conditions(self, pipeline: Any) -> None:
        """Of lists, diffusers takes the first picture alone, and of the frames of a clip the first."""
        condition = vramkit.LTXVideoCondition
        for arguments, shown in (
            (
                {"image": FRAMES[:2], "frame_index": [0, 16], "strength": 0.8},
                [condition(image=FRAMES[0], strength=0.8), condition(image=FRAMES[1], frame_index=16, strength=0.8)],
            ),
            ({"video": FRAMES[:9], "frame_index": 8}, [condition(video=FRAMES[:9], frame_index=8)]),
            (
                {"video": [FRAMES[:9], FRAMES[9:18]], "frame_index": [0, 8]},
                [condition(video=FRAMES[:9]), condition(video=FRAMES[9:18], frame_index=8)],
            ),
        ):
            clips = [frames(pipeline, **PLAIN, **each) for each in (arguments, {"conditions": shown})]
            np.testing.assert_array_equal(*clips)

    def test_clips_of_a_batch_are_those_of_single_calls(self, pipeline: Any) -> None:
        shown = [vramkit.LTXVideoCondition(image=FRAMES[0]), vramkit.LTXVideoCondition(video=FRAMES[:9], frame_index=8)]
        options = PLAIN | {"conditions": shown, "output_type": "latent"}
        pair = frames(pipeline, **options, prompt=["a cat"] * 2, generator=lambda: [seeded(3), seeded(4)])
        for at, seed in enumerate((3, 4)):
            (single,) = frames(pipeline, **options, prompt="a cat", generator=lambda seed=seed: seeded(seed))
            assert relative_error(pair[at], single) <= 1e-5

    def test_every_form_of_a_clip(self, pipeline: Any) -> None:
        pixels = np.stack([np.array(each.resize((96, 64))) for each in FRAMES[:9]])
        forms = [pixels, torch.from_numpy(pixels).movedim(-1, 1), list(pixels), [pixels]]
        clips = [frames(pipeline, **PLAIN, video=form, num_videos_per_prompt=1) for form in forms]
        for clip in clips[1:]:
            np.testing.assert_array_equal(clip, clips[0])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"image": picture(), "video": FRAMES[:9]}, "both image and video"),
            ({"image": FRAMES[:2], "frame_index": [0, 8, 16]}, "frame_index has 3 entries for 2"),
            ({"image": picture(), "frame_index": 17}, r"conditions\[0\].frame_index is 17; expected .* 0 to 16"),
            ({"image": picture(), "frame_index": -1}, "frame_index is -1"),
            ({"image": picture(), "strength": 1.5}, r"conditions\[0\].strength is 1.5"),
            ({"conditions": [vramkit.LTXVideoCondition()]}, r"conditions\[0\] has both image and video, or neither"),
            ({"conditions": [], "image": picture()}, "both conditions and image"),
            ({"latents": torch.zeros(1, 8, 3, 2, 3)}, "at 1 nothing of them would be left"),
            ({"denoise_strength": 0.5}, "latents are not given"),
            ({"denoise_strength": 2.0}, "expected a number from 0 to 1"),
            ({"latents": torch.zeros(1, 18, 8), "denoise_strength": 0.5}, r"expected|ask for \(1, 8, 3, 2, 3\)"),
            ({"image": "missing.png"}, "missing.png does not exist"),
            ({"timesteps": [5, 6]}, "expected falling numbers"),
        ],
    )
    def test_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**PLAIN | {"prompt": "a cat"} | arguments)

    @pytest.mark.parametrize("steps", [1, 2, 3, 8, 25])
    def test_timesteps_are_those_of_diffusers(self, steps: int) -> None:
        expected = linear_quadratic_schedule(steps) * 1000
        torch.testing.assert_close(torch.tensor(linear_quadratic_timesteps(steps)), expected, rtol=1e-6, atol=1e-4)


def test_folders_serve_both_kinds_of_calls(stock: Stock) -> None:
    folder = stock.folder("LTX-Video")
    ours = vramkit.LTXImageToVideoPipeline.from_pretrained(folder)
    ours.set_progress_bar_config(disable=True)
    compare(ours, load_oracle(folder, "LTXImageToVideoPipeline"), **CLIP)
    assert vramkit.LTXConditionPipeline.from_pretrained(folder).transformer is not None
    with pytest.raises(CheckpointError, match="LTXConditionPipeline, not of LTXPipeline"):
        vramkit.LTXPipeline.from_pretrained(stock.folder(CONDITIONS))


def test_tokens_step_from_levels_of_their_own_as_in_diffusers() -> None:
    timesteps, sample, flow = [1000.0, 700.0, 250.0], normal(2, 5, 3), normal(2, 5, 3, seed=2)
    ours, oracle = FlowMatchEulerDiscreteScheduler(shift=2.0), Oracle(shift=2.0)
    ours.set_timesteps(timesteps=timesteps)
    oracle.set_timesteps(timesteps=timesteps)
    assert torch.equal(ours.timesteps, oracle.timesteps)
    torch.testing.assert_close(ours.sigmas, oracle.sigmas)
    levels = torch.tensor([[1000.0, 700.0, 300.0, 0.0, 999.0]]).expand(2, -1)
    for at in range(3):
        results = [
            each.step(flow, each.timesteps[at], sample, per_token_timesteps=levels, return_dict=False)[0]
            for each in (ours, oracle)
        ]
        torch.testing.assert_close(*results)
    for wrong, message in (({"sigmas": [1.0]}, "1 sigmas but 3"), ({"num_inference_steps": 2}, "2 steps but 3")):
        with pytest.raises(ConfigError, match=message):
            ours.set_timesteps(timesteps=timesteps, **wrong)
