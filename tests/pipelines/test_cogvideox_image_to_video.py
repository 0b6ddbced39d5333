"""CogVideoX image-to-video against diffusers' own, with learned positions (5B) and with an offset (1.5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Stock, compare, frames, picture, relative_error, seeded

import vramkit
from vramkit.errors import CheckpointError, ConfigError

FAMILY = "CogVideoX image-to-video"
SMALL = FAMILIES[FAMILY].clip
NEWER: dict[str, Any] = {
    "scheduler": "ddim",
    "transformer": {
        "use_learned_positional_embeddings": False,
        "ofs_embed_dim": 24,
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_height": 30,
        "sample_width": 30,
    },
    "vae": {"invert_scale_latents": True},
}


@pytest.fixture
def family() -> str:
    return FAMILY


CALLS: dict[str, dict[str, Any]] = {
    "no guidance, latents": {"guidance_scale": 1.0, "output_type": "latent"},
    "a generator for each": {
        "prompt": ["a cat", "a dog"],
        "image": [picture(), picture(seed=9)],
        "generator": lambda: [seeded(4), seeded(5)],
    },
    "a picture for each": {"prompt": ["a cat", "a dog"], "image": [picture(), picture(seed=9)]},
    "a tensor": {"image": torch.rand(3, 40, 60), "use_dynamic_cfg": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_same_clip_as_diffusers(call: str, pipeline: Any, oracle: Any) -> None:
    compare(pipeline, oracle, **SMALL | {"num_inference_steps": 2} | CALLS[call])


@pytest.mark.parametrize("changes", [{}, {"num_frames": 1, "num_inference_steps": 2}, {"num_frames": 16}], ids=str)
def test_of_1_5(changes: dict[str, Any], stock: Stock) -> None:
    compare(stock.pipeline(FAMILY, **NEWER), stock.oracle(FAMILY, **NEWER), **SMALL | changes)


def test_the_image_counts_and_one_serves_all_prompts(pipeline: Any) -> None:
    clip = SMALL | {"num_inference_steps": 2}
    plain = frames(pipeline, **clip)
    assert relative_error(frames(pipeline, **clip | {"image": picture(seed=9)}), plain) > 1e-3
    both = clip | {"prompt": ["a cat on a log"] * 2, "generator": lambda: [seeded(), seeded()]}
    assert relative_error(frames(pipeline, **both)[1], plain[0]) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "there is no image"),
        ({"image": [picture()] * 3}, "3 pictures for 1 prompts"),
        ({"width": 64}, "width is 64; this checkpoint has learned positions for 48 pixels only"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(changes: dict[str, Any], message: str, idle: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        idle(**SMALL | {"prompt": "a cat"} | changes)


def test_other_checkpoints_are_refused_by_name(stock: Stock, idle: Any) -> None:
    with pytest.raises(CheckpointError, match="CogVideoXPipeline, not of CogVideoXImageToVideoPipeline"):
        vramkit.CogVideoXImageToVideoPipeline.from_pretrained(stock.folder("CogVideoX"))
    idle.transformer = stock.pipeline("CogVideoX").transformer
    with pytest.raises(ConfigError, match="takes 4 channels; image-to-video needs one that takes 8"):
        idle(**SMALL, prompt="a cat")
    idle.vae = None
    with pytest.raises(ConfigError, match="no vae"):
        idle(**SMALL, prompt="a cat", output_type="latent")
