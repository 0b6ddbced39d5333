"""Wan2.2 TI2V 5B, with and without an image, against diffusers from one folder."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch
from checkpoints import load_oracle
from families import FAMILIES, Stock, compare, frames, picture, relative_error

import vramkit
from vramkit.errors import ConfigError
from vramkit.pipelines.calling.known import FirstFrame

FAMILY = "Wan2.2 5B"
CLIP = FAMILIES[FAMILY].clip
TEXT = {name: value for name, value in CLIP.items() if name != "image"}


@pytest.fixture
def family() -> str:
    return FAMILY


def test_without_an_image(stock: Stock) -> None:
    folder = stock.folder(FAMILY)
    pipeline = vramkit.WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.fps == 24.0
    compare(pipeline, load_oracle(folder), **TEXT)


CALLS: dict[str, dict[str, Any]] = {
    "one frame": {"num_frames": 1},
    "two prompts, no guidance": {"prompt": ["a", "b"], "guidance_scale": 1.0, "num_frames": 9},
    "latents": {"output_type": "latent", "num_inference_steps": 3},
}


@pytest.mark.parametrize("call", CALLS)
def test_with_an_image(call: str, pipeline: Any, oracle: Any) -> None:
    compare(pipeline, oracle, **CLIP | {"num_inference_steps": 2} | CALLS[call])


def test_sizes_are_cut_to_whole_patches_as_in_diffusers(pipeline: Any, oracle: Any) -> None:
    clip = CLIP | {"num_inference_steps": 1, "output_type": "latent"}
    with pytest.warns(
        UserWarning, match="height is 80, but this checkpoint needs a multiple of 32. Making 64"
    ) as caught:
        compare(pipeline, oracle, **clip | {"height": 80})
    assert caught[0].filename == families.__file__
    with pytest.raises(ConfigError, match="height is 16; expected a multiple of 32"):
        pipeline(**clip | {"height": 16, "prompt": "a"})


def test_the_image_counts(pipeline: Any) -> None:
    clip = CLIP | {"num_inference_steps": 2}
    assert relative_error(frames(pipeline, **clip | {"image": picture(seed=9)}), frames(pipeline, **clip)) > 1e-3


def test_a_model_of_others_is_told_the_timestep_of_each_token(pipeline: Any, oracle: Any) -> None:
    class Foreign(torch.nn.Module):
        config, dtype = oracle.transformer.config, torch.float32

        def forward(self, **told: Any) -> Any:
            assert told["timestep"].shape == (1, 12)  # two frames of 2 x 3 tokens
            return oracle.transformer(**told)

    expected = frames(pipeline, **CLIP, num_inference_steps=2)
    pipeline.transformer = Foreign()
    assert relative_error(frames(pipeline, **CLIP, num_inference_steps=2), expected) <= 1e-4


def test_an_ending_is_refused(idle: Any) -> None:
    with pytest.raises(ConfigError, match="not trained to end with a picture"):
        idle(**CLIP, prompt="a cat", last_image=picture())


def test_the_first_frame_has_a_timestep_of_its_own() -> None:
    known = FirstFrame(torch.ones(1, 2, 1, 4, 6), tokens=6)
    latents = torch.zeros(2, 2, 3, 4, 6)
    inputs = known.inputs(latents, torch.tensor(500))
    assert inputs["timestep"].tolist() == [[0.0, 500.0]] * 2
    assert inputs["timestep_tokens"] == (6, 12)
    np.testing.assert_array_equal(inputs["hidden_states"], known.finished(latents))
    assert inputs["hidden_states"][:, :, 0].eq(1).all()
    assert inputs["hidden_states"][:, :, 1:].eq(0).all()
    assert latents.eq(0).all()


def test_its_decoder_is_cut_into_tiles_and_not_into_stripes(stock: Stock) -> None:
    vae = stock.pipeline(FAMILY).vae
    with pytest.raises(ConfigError, match=r"shortcuts around its changes of size \(Wan2.2 5B\).*enable_tiling"):
        vae.enable_striping()
    assert [way.call for way in vae.smaller_ways(16)] == ["vae.enable_tiling()"]
