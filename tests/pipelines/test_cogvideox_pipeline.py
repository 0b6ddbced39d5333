"""What is CogVideoX's own in its pipeline, against diffusers': its variants, its frames and its guidance that varies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from checkpoints import edit_json, load_oracle
from families import FAMILIES, Stock, compare, frames, models_of, relative_error

from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.pipelines.schedulers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

SMALL = FAMILIES["CogVideoX"].clip
load, ready = partial(families.load, "CogVideoX"), partial(families.ready, "CogVideoX", tokens=16)


@pytest.fixture
def family() -> str:
    return "CogVideoX"


ROTARY = {"use_rotary_positional_embeddings": True}
# 2B, 5B and 1.5 as far as their positions, schedulers and patches go.
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"scheduler": "dpm", "transformer": ROTARY},
    "1.5": {
        "transformer": ROTARY | {"patch_size_t": 2, "patch_bias": False, "sample_height": 30, "sample_width": 30},
        "vae": {"invert_scale_latents": True, "scaling_factor": 0.7},
    },
}


SAME_CLIP: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative prompt": {"negative_prompt": "blurry, worst quality"},
    "no guidance": {"guidance_scale": 1.0},
    "dynamic guidance": {"use_dynamic_cfg": True, "negative_prompt": "dark"},
    "dynamic guidance without any": {"use_dynamic_cfg": True, "guidance_scale": 1.0},
    "one frame": {"num_frames": 1},
    "an even number of frames": {"num_frames": 16},
    "many frames": {"num_frames": 25, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
    "other sizes": {"height": 48, "width": 32},
    "trained sizes": {"height": None, "width": None, "num_frames": None},
    "eta": {"eta": 0.7},
}
MORE: dict[str, dict[str, Any]] = {
    "prompt that is not cleaned": {"prompt": " a  cat &amp; a\n dog "},
    "ready embeds": ready() | ready("negative_", seed=4),
    "ready embeds, no guidance": ready(lengths=(7, 7)) | {"guidance_scale": 0.0},
}


class TestSameClipAsDiffusers:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_variants(self, case: str, variant: str, stock: Stock) -> None:
        arguments = SAME_CLIP[case]
        if variant == "1.5" and case == "trained sizes":
            arguments = {"num_frames": None}  # 240 x 240 pixels would take long
        ours, oracle = (make("CogVideoX", **VARIANTS[variant]) for make in (stock.pipeline, stock.oracle))
        compare(ours, oracle, **SMALL | arguments)

    @pytest.mark.parametrize("case", MORE)
    def test_arguments(self, case: str, pipeline: Any, oracle: Any) -> None:
        compare(pipeline, oracle, **SMALL | MORE[case])

    @pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
    def test_other_schedules(self, kind: Any, pipeline: Any, oracle: Any, folder: Path) -> None:
        import diffusers

        other = load_oracle(folder)
        changes = {"timestep_spacing": "linspace", "snr_shift_scale": 3.0}
        other.scheduler = getattr(diffusers, kind.__name__).from_config(other.scheduler.config, **changes)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
        compare(pipeline, other, **SMALL, num_inference_steps=7)

    @pytest.mark.parametrize(("num_frames", "made"), [(4, 1), (5, 8), (12, 9), (13, 16)])
    def test_other_multiples_of_four_make_what_diffusers_makes(
        self, num_frames: int, made: int, pipeline: Any, oracle: Any
    ) -> None:
        with pytest.warns(UserWarning, match=f"num_frames is {num_frames},.*Making {made} frames") as caught:
            compare(pipeline, oracle, **SMALL | {"num_frames": num_frames, "num_inference_steps": 1})
        assert caught[0].filename == families.__file__

    @pytest.mark.parametrize("num_videos_per_prompt", [1, 2])
    def test_clips_per_prompt_are_those_of_a_repeated_prompt(
        self, num_videos_per_prompt: int, pipeline: Any, oracle: Any
    ) -> None:
        """Diffusers reads the argument and makes one clip of each prompt."""
        prompts = ["a cat", "a dog"]
        ours = frames(pipeline, **SMALL, prompt=prompts, num_videos_per_prompt=num_videos_per_prompt)
        repeated = [prompt for prompt in prompts for _ in range(num_videos_per_prompt)]
        assert relative_error(ours, frames(oracle, **SMALL, prompt=repeated)) <= 1e-4

    def test_lower_precision_of_the_other_scheduler(self, stock: Stock) -> None:
        folder = stock.folder("CogVideoX", **VARIANTS["5b"])
        pipelines = [make(folder, torch_dtype=torch.bfloat16) for make in (load, load_oracle)]
        clips = [frames(pipe, **SMALL, output_type="latent") for pipe in pipelines]
        assert clips[0].dtype == clips[1].dtype == torch.bfloat16
        assert (clips[0] - clips[1]).norm() < 0.05 * clips[1].norm()  # rounding of 8 bits over five steps

    def test_callback_sees_the_guidance_vary(self, pipeline: Any, oracle: Any) -> None:
        def scales(pipe: Any) -> list[float]:
            seen: list[float] = []

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                seen.append(round(pipe.guidance_scale, 9))
                return {}

            frames(pipe, **SMALL, use_dynamic_cfg=True, callback_on_step_end=callback)
            return seen

        assert scales(pipeline) == scales(oracle)
        assert len(set(scales(pipeline))) > 1

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_patches_of_frames_are_streamed(self, offload_type: str, stock: Stock) -> None:
        streamed = load(stock.folder("CogVideoX", **VARIANTS["1.5"]))
        for model in models_of(streamed).values():
            apply_group_offloading(model, "cpu", offload_type=offload_type)
        expected = frames(stock.pipeline("CogVideoX", **VARIANTS["1.5"]), **SMALL)
        for _ in range(2):
            np.testing.assert_array_equal(frames(streamed, **SMALL), expected)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_frames": 50}, r"num_frames is 50; CogVideoX makes 8 \* k or 8 \* k \+ 1 .* 49 or 56"),
            ({"num_frames": 3}, "for example 1 or 8"),
            ({"timesteps": [999, 500]}, r"timesteps is \[999, 500\].*num_inference_steps"),
            ({"eta": "much"}, "eta is 'much'"),
            (ready("negative_", lengths=(7, 7)), "1 prompts and 2 negative"),
        ],
    )
    def test_are_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    def test_pictures_that_have_no_positions(self, stock: Stock) -> None:
        pipeline = stock.pipeline("CogVideoX", **VARIANTS["1.5"])
        with pytest.raises(ConfigError, match="width is 256; this checkpoint has positions for at most 240 pixels"):
            pipeline("a cat", **SMALL | {"width": 256})

    def test_sizes_of_a_missing_transformer(self, idle: Any) -> None:
        idle.transformer = None
        with pytest.raises(ConfigError, match="no transformer"):
            idle("a cat", **SMALL | {"height": None})

    def test_image_to_video_checkpoints_are_named(self, copied: Path) -> None:
        edit_json(copied / "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
        with pytest.raises(CheckpointError, match="CogVideoXImageToVideoPipeline, not of CogVideoXPipeline"):
            load(copied)
