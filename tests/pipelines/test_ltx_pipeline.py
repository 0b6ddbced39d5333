"""What is LTX-Video's own in its pipeline, against diffusers': its versions, rates, masks and decoders told a timestep."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from checkpoints import LTX_VAES, load_oracle
from families import Stock, compare, frames, models_of, normal, relative_error, seeded

from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.pipelines.ltx.pipeline import LTXPipeline

SMALL = {"height": 64, "width": 96, "num_frames": 17, "max_sequence_length": 24}
load, ready = partial(families.load, "LTX-Video"), partial(families.ready, "LTX-Video")


@pytest.fixture
def family() -> str:
    return "LTX-Video"


NO_PROMPT = {"prompt": None}
HOLES = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]])
SAME_CLIP: dict[str, dict[str, Any]] = {
    "rescaled guidance": {"guidance_scale": 5.0, "guidance_rescale": 0.7},
    "one frame, no guidance": {"num_frames": 1, "guidance_scale": 1.0},
    "two steps": {"num_inference_steps": 2},
    "other sizes": {"height": 96, "width": 32, "num_frames": 25},
    "other frame rate": {"frame_rate": 30},
    "clips per prompt": {"prompt": "a cat", "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "ready": ready() | {"guidance_scale": 1.0},
    "ready, with a negative text": ready(lengths=(7, 12)) | ready("negative_", lengths=(9, 2), seed=4),
    "ready, with holes": ready() | {"guidance_scale": 1.0, "prompt_attention_mask": HOLES},
    "latents in double": {"latents": normal(1, 18, 8, seed=9).double()},
}
TIMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "as in the model card": {"decode_timestep": 0.05, "decode_noise_scale": 0.025, "negative_prompt": "dark"},
    "timestep alone, one frame": {"decode_timestep": 0.3, "num_frames": 1, "guidance_scale": 1.0},
    "one for each clip": {"prompt": ["a cat", "a dog"], "decode_timestep": [0.1, 0.4], "decode_noise_scale": [0.3, 0]},
    "generator list": {"prompt": ["a cat", "a dog"], "generator": lambda: [seeded(4), seeded(5)], "decode_timestep": 0.2},
}  # fmt: skip


class TestSameClipAsDiffusers:
    @pytest.mark.parametrize("case", SAME_CLIP)
    def test_arguments(self, case: str, pipeline: Any, oracle: Any) -> None:
        compare(pipeline, oracle, **SMALL | SAME_CLIP[case])

    @pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
    def test_decoders_that_are_told_a_timestep(self, version: str, stock: Stock) -> None:
        ours, theirs = stock.pipeline("LTX-Video", version=version), stock.oracle("LTX-Video", version=version)
        for arguments in TIMED.values():
            compare(ours, theirs, **SMALL | arguments)
        clips = [frames(ours, **SMALL, decode_timestep=value) for value in (0.0, 0.3)]
        assert relative_error(*clips) > 1e-2

    @pytest.mark.parametrize("change", [{"guidance_rescale": 0.7}, {"frame_rate": 30}])
    def test_what_is_compared_depends_on_it(self, change: dict[str, Any], pipeline: Any) -> None:
        assert relative_error(*(frames(pipeline, **SMALL, **each) for each in (change, {}))) > 1e-3

    def test_lower_precision_with_a_timestep(self, stock: Stock) -> None:
        folder = stock.folder("LTX-Video", version="0.9.5")
        pipelines = [make(folder, torch_dtype=torch.bfloat16) for make in (load, load_oracle)]
        clips = [frames(pipe, **SMALL, decode_timestep=0.05, output_type="pt") for pipe in pipelines]
        assert clips[0].dtype == clips[1].dtype
        assert relative_error(*clips) < 0.05  # rounding of 8 bits over five steps

    @pytest.mark.parametrize("negative", ["a cat on a wall", "blurry"])
    def test_guidance_ended_by_the_half_of_the_text(self, negative: str, pipeline: Any, oracle: Any) -> None:
        """diffusers goes on with both masks there, which it mixes by head or dies of; the mask of the prompt is right."""

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipe._guidance_scale = 1.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            return tensors

        def cut(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["encoder_attention_mask"][-len(kwargs["hidden_states"]) :]
            return args, kwargs | {"encoder_attention_mask": mask}

        watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        texts = {"prompt": "a cat on a tree", "negative_prompt": negative, "guidance_scale": 4.0}
        with oracle.transformer.register_forward_pre_hook(cut, with_kwargs=True):
            compare(pipeline, oracle, **SMALL | texts | watched)

    def test_clips_of_several_prompts_are_those_of_each(self, pipeline: Any) -> None:
        """diffusers mixes up the masks of prompts here, and cannot give several clips to ready embeddings."""
        few = {**SMALL, "num_inference_steps": 2, "output_type": "np"}
        noise = torch.randn(4, 18, 8, generator=seeded(1))
        prompts = ["a cat", "a dog in the deep snow under a tree"]
        together = pipeline(prompts, **few, num_videos_per_prompt=2, latents=noise).frames
        for index in range(4):
            alone = pipeline(prompts[index // 2], **few, latents=noise[index : index + 1]).frames
            assert relative_error(together[index], alone[0]) <= 1e-4
        text, negative = ready(), ready("negative_", seed=4)
        twice = pipeline(**text, **negative, **few, num_videos_per_prompt=2, latents=noise[:2]).frames
        alone = pipeline(**text, **negative, **few, latents=noise[1:2]).frames
        assert relative_error(twice[1], alone[0]) <= 1e-4

    def test_timesteps_take_the_place_of_even_ones(self, pipeline: Any) -> None:
        arguments = SMALL | {"output_type": "latent"}
        even = frames(pipeline, **arguments)
        assert relative_error(frames(pipeline, **arguments, timesteps=[1000, 800, 600, 400, 200]), even) <= 1e-6
        other = frames(pipeline, **arguments, timesteps=[1000, 993.5, 700])
        assert pipeline.num_timesteps == 3
        assert relative_error(other, even) > 1e-2

    def test_one_step_goes_from_noise_to_a_clip(self, pipeline: Any) -> None:
        """The published schedule stretches to its last level and divides by zero when that is the first one too."""
        clip = pipeline("a cat", **SMALL | {"num_inference_steps": 1}, output_type="np", generator=seeded()).frames
        assert np.isfinite(clip).all()
        assert clip.std() > 0.02

    @torch.no_grad()
    def test_encoded_prompts_equal_the_oracles(self, pipeline: Any, oracle: Any) -> None:
        given = {"prompt": ["a cat", "a dog in the snow"], "negative_prompt": ["", "dark"], "max_sequence_length": 20}
        ours = pipeline.encode_prompt(**given)
        theirs = oracle.encode_prompt(**given, device=torch.device("cpu"))
        assert ours[0].shape == (2, 20, 32)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert relative_error(a, b) <= 1e-6
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        again = pipeline.encode_prompt(None, **dict(zip(names, ours, strict=True)), num_videos_per_prompt=2)
        assert all(torch.equal(a, b.repeat_interleave(2, dim=0)) for a, b in zip(again, ours, strict=True))
        assert pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)[2:] == (None, None)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"frame_rate": 0}, "frame_rate is 0; expected frames per second, above 0"),
            ({"guidance_rescale": "much"}, "guidance_rescale is 'much'"),
            ({"timesteps": 3}, "timesteps is 3; expected a list of numbers"),
            ({"timesteps": "abc"}, "timesteps is 'abc'; expected a list of numbers"),
            ({"timesteps": []}, "expected falling numbers"),
            ({"timesteps": [500, 600, 100]}, r"timesteps is \[500, 600, 100\]; expected falling numbers"),
            ({"timesteps": [1001, 100]}, "from 1000 at most to above 0"),
            ({"timesteps": [900, 0]}, "from 1000 at most to above 0"),
            ({"decode_timestep": 1.5}, "decode_timestep is 1.5; expected a number from 0 to 1"),
            ({"decode_noise_scale": [0.1, 0.2]}, "decode_noise_scale has 2 entries; .* one for each of the 1 clips"),
            ({"decode_timestep": "early"}, "decode_timestep"),
            (
                NO_PROMPT | ready() | {"prompt_attention_mask": None},
                r"prompt_attention_mask is None; expected \(1, 12\)",
            ),
            (
                NO_PROMPT | ready() | {"prompt_attention_mask": torch.ones(1, 5)},
                r"has shape \(1, 5\); expected \(1, 12\)",
            ),
            (NO_PROMPT | ready() | {"prompt_attention_mask": "all"}, "prompt_attention_mask is a str"),
            (NO_PROMPT | ready() | {"prompt_attention_mask": torch.ones(1, 12).to_sparse()}, "expected a dense tensor"),
            ({"negative_prompt_embeds": torch.zeros(1, 12, 32)}, "negative_prompt_attention_mask is None"),
            ({"prompt_attention_mask": torch.ones(1, 5)}, "give both or none"),
        ],
    )
    def test_are_refused_before_anything_runs(self, arguments: dict[str, Any], message: str, idle: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            idle(**{"prompt": "a cat", **SMALL, **arguments})

    def test_tokens_of_several_latents(self, pipeline: Any) -> None:
        config = {**{key: getattr(pipeline.transformer.config, key) for key in pipeline.transformer.config.__slots__}}
        transformer = type(pipeline.transformer).from_config(config | {"patch_size": 2})
        with pytest.raises(ConfigError, match="patch_size=2, patch_size_t=1; expected 1 and 1"):
            LTXPipeline(**pipeline.components | {"transformer": transformer})("a cat", **SMALL)


class TestOtherVersions:
    """Their decoders, told a timestep, are streamed, saved and cast like that of 0.9.0."""

    def clip(self, pipeline: Any) -> Any:
        return frames(pipeline, **SMALL, num_inference_steps=2, decode_timestep=0.05)

    @pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_streamed_from_disk_is_the_same_clip(self, offload_type: str, version: str, stock: Stock) -> None:
        streamed = load(stock.folder("LTX-Video", version=version))
        for model in models_of(streamed).values():
            apply_group_offloading(model, "cpu", offload_type=offload_type, store="disk")
        expected = self.clip(stock.pipeline("LTX-Video", version=version))
        for _ in range(2):
            np.testing.assert_array_equal(self.clip(streamed), expected)

    @pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
    def test_saved_pipelines_are_read_by_both(self, version: str, stock: Stock, tmp_path: Path) -> None:
        pipeline = load(stock.folder("LTX-Video", version=version))
        pipeline.save_pretrained(tmp_path)
        np.testing.assert_array_equal(self.clip(load(tmp_path)), self.clip(pipeline))
        compare(pipeline, load_oracle(tmp_path), **SMALL)

    @pytest.mark.parametrize("version", LTX_VAES)
    def test_cast_decoders_streamed_or_not_make_the_same_clip(self, version: str, stock: Stock) -> None:
        cast = load(stock.folder("LTX-Video", version=version))
        cast.vae.enable_layerwise_casting()
        resident = self.clip(cast)
        assert 1e-5 < relative_error(resident, self.clip(stock.pipeline("LTX-Video", version=version))) < 0.5
        cast.vae.enable_group_offload("cpu", offload_type="leaf_level")
        np.testing.assert_array_equal(self.clip(cast), resident)
