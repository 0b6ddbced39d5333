"""Wan image-to-video against diffusers' own: image tokens, first and last frames, the checkpoints of Wan2.1 and Wan2.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import edit_json
from families import FAMILIES, Stock, compare, frames, load, picture, relative_error

import vramkit
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading

FAMILY = "Wan2.1 image-to-video"
SMALL = FAMILIES[FAMILY].clip
SHORT = SMALL | {"max_sequence_length": 16}  # for checkpoints without image tokens
PLAIN = {"image_dim": None, "added_kv_proj_dim": None}
# What the published checkpoints differ in.
LAYOUTS: dict[str, dict[str, Any]] = {
    "I2V": {},
    "FLF2V": {"transformer": {"pos_embed_seq_len": 10}},
    "A14B": {"transformer": PLAIN, "options": {"boundary_ratio": 0.9}},
}
LAST = picture(50, 80, seed=8)


@pytest.fixture
def family() -> str:
    return FAMILY


def both(stock: Stock, layout: str) -> tuple[Any, Any]:
    return stock.pipeline(FAMILY, **LAYOUTS[layout]), stock.oracle(FAMILY, **LAYOUTS[layout])


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "two prompts": ("I2V", SMALL | {"prompt": ["a cat", "a dog"], "num_inference_steps": 2}),
    "first and last frame": ("FLF2V", SMALL | {"last_image": LAST}),
    "two experts": ("A14B", SHORT),
    "two experts, last frame": ("A14B", SHORT | {"last_image": LAST, "guidance_scale_2": 2.0, "num_frames": 9}),
    "a tensor": ("A14B", SHORT | {"image": torch.rand(3, 40, 60), "num_inference_steps": 2}),
    "clips per prompt": ("A14B", SHORT | {"num_videos_per_prompt": 2, "prompt": ["a", "b"], "num_inference_steps": 1}),
    "one frame": ("A14B", SHORT | {"num_frames": 1, "num_inference_steps": 1}),
}


@pytest.mark.parametrize("call", CALLS)
def test_same_clip_as_diffusers(call: str, stock: Stock) -> None:
    layout, arguments = CALLS[call]
    compare(*both(stock, layout), **arguments)


def test_what_is_compared_depends_on_the_images(stock: Stock) -> None:
    for layout, changes in (
        ("I2V", [{"image": LAST}]),
        ("FLF2V", [{"last_image": picture(seed=9)}, {"image": picture(seed=9)}]),
        ("A14B", [{"last_image": LAST}]),
    ):
        pipeline, _ = both(stock, layout)
        clip = SHORT | {"num_inference_steps": 2} | ({"last_image": LAST} if layout == "FLF2V" else {})
        plain = frames(pipeline, **clip)
        for change in changes:
            assert relative_error(frames(pipeline, **clip | change), plain) > 1e-3


def test_states_of_the_image_encoder_are_those_of_diffusers(stock: Stock) -> None:
    ours, oracle = both(stock, "I2V")
    states = oracle.encode_image(picture()).detach()
    assert relative_error(ours.encode_image(picture()), states) <= 1e-5
    clip = SHORT | {"num_inference_steps": 1}
    ready = frames(ours, **clip, image_embeds=states)
    assert relative_error(ready, frames(ours, **clip)) <= 1e-5
    assert relative_error(ready, frames(ours, **clip, image_embeds=-states)) > 1e-3


def test_every_form_of_a_picture_makes_the_same_clip(stock: Stock, tmp_path: Path) -> None:
    """The picture has the size of the clip, for PIL pictures and arrays are resized in different ways."""
    ours, _ = both(stock, "I2V")
    image = picture(48, 32)
    image.save(tmp_path / "image.png")
    values = torch.from_numpy(np.array(image)).movedim(-1, 0)
    expected = frames(ours, **SHORT | {"image": image, "num_inference_steps": 1})
    for other in (tmp_path / "image.png", str(tmp_path / "image.png"), np.array(image), values, [values / 255]):
        assert relative_error(frames(ours, **SHORT | {"image": other, "num_inference_steps": 1}), expected) <= 1e-5
    signed = frames(ours, **SHORT | {"image": values / 127.5 - 1, "num_inference_steps": 1})
    assert relative_error(signed, expected) <= 1e-4


def test_a_picture_for_each_prompt(stock: Stock) -> None:
    ours, _ = both(stock, "A14B")
    latents = torch.randn(1, 16, 2, 4, 6).expand(2, -1, -1, -1, -1)
    pair = {"prompt": ["a cat"] * 2, "latents": latents, "num_inference_steps": 1}
    clips = frames(ours, **SHORT | pair | {"image": [picture(), LAST]})
    for clip, image in zip(clips, (picture(), LAST), strict=True):
        single = {"prompt": "a cat", "latents": latents[:1], "num_inference_steps": 1, "image": image}
        assert relative_error(clip, frames(ours, **SHORT | single)[0]) <= 1e-5


@pytest.mark.parametrize("layout", ["FLF2V", "A14B"])
def test_streamed_gives_the_same_bytes(layout: str, stock: Stock) -> None:
    arguments = SHORT | {"last_image": LAST, "num_inference_steps": 2}
    pipeline = load(FAMILY, stock.folder(FAMILY, **LAYOUTS[layout]))
    for model in filter(None, (pipeline.image_encoder, pipeline.transformer, pipeline.transformer_2, pipeline.vae)):
        apply_group_offloading(model, "cpu", offload_type="leaf_level", store="disk")
    np.testing.assert_array_equal(frames(pipeline, **arguments), frames(both(stock, layout)[0], **arguments))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("I2V", {"image": None}, "there is no image"),
    ("I2V", {"image": 3}, "image is int; expected a PIL picture, a path"),
    ("I2V", {"image": []}, "image is an empty list"),
    ("I2V", {"image": "missing.png"}, "missing.png does not exist"),
    ("I2V", {"image": torch.rand(1, 40, 60)}, r"image has shape \[1, 40, 60\]; expected \[3, H, W\]"),
    ("I2V", {"image": np.zeros((40, 60, 4))}, r"image has shape \[40, 60, 4\]; expected \[H, W, 3\]"),
    ("I2V", {"image": torch.full((3, 8, 8), 2.0)}, "values from 2 to 2"),
    ("I2V", {"image": torch.full((3, 8, 8), float("nan"))}, "values from nan"),
    ("I2V", {"image": torch.zeros(3, 8, 8, dtype=torch.int64)}, "image is torch.int64"),
    ("I2V", {"image": [torch.rand(3, 8, 8), torch.rand(3, 8, 9)]}, "arrays of 8 x 8 and 8 x 9"),
    ("I2V", {"image": [picture(), picture()]}, "image has 2 pictures for 1 prompts"),
    ("I2V", {"last_image": LAST}, "not trained to end with a picture"),
    ("I2V", {"image_embeds": torch.zeros(1, 5, 8)}, r"\(1, 5, 8\); expected \(pictures, tokens, 16\)"),
    ("I2V", {"image_embeds": torch.zeros(3, 5, 16)}, r"\(3, 5, 16\); expected \(1 or 1, tokens, 16\)"),
    ("I2V", {"image_embeds": np.zeros((1, 5, 16))}, "image_embeds is a ndarray; expected a tensor"),
    ("I2V", {"image_embeds": torch.zeros(1, 5, 16).long()}, "image_embeds is torch.int64; expected floating values"),
    ("I2V", {"image_embeds": torch.zeros(1, 5, 16).to_sparse()}, "expected a dense tensor"),
    ("FLF2V", {}, "needs last_image"),
    ("FLF2V", {"last_image": LAST, "num_frames": 1}, "num_frames is 1"),
    ("FLF2V", {"last_image": LAST, "image_embeds": torch.zeros(1, 5, 16)}, r"expected \(1 or 1, 10, 16\)"),
    ("FLF2V", {"last_image": "missing.png"}, "missing.png"),
    ("A14B", {"image_embeds": torch.zeros(1, 5, 16)}, "has no image encoder"),
]


@pytest.mark.parametrize(("layout", "changes", "message"), REFUSED)
def test_wrong_images_are_refused_before_anything_runs(
    layout: str, changes: dict[str, Any], message: str, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, _ = both(stock, layout)
    monkeypatch.setattr(pipeline, "_conditions", lambda *_, **__: pytest.fail("a prompt was encoded"))
    with pytest.raises(ConfigError, match=message):
        pipeline(**SHORT | {"prompt": "a cat"} | changes)


@pytest.mark.parametrize("part", ["vae", "image_encoder", "image_processor"])
def test_missing_components_are_named(part: str, pipeline: Any) -> None:
    setattr(pipeline, part, None)
    with pytest.raises(ConfigError, match=f"no {part}"):
        pipeline(**SMALL, prompt="a cat", output_type="latent")
    if part != "vae":
        with pytest.raises(ConfigError, match=part):
            pipeline.encode_image(picture())


def test_other_checkpoints_are_refused_by_name(stock: Stock, folder: Path, copied: Path) -> None:
    with pytest.raises(CheckpointError, match="WanImageToVideoPipeline, not of WanPipeline"):
        vramkit.WanPipeline.from_pretrained(folder)
    plain = vramkit.WanImageToVideoPipeline.from_pretrained(stock.folder("Wan2.1"))
    with pytest.raises(ConfigError, match="takes 16 channels; image-to-video needs one that takes 36"):
        plain(picture(), "a cat", height=32, width=48, num_frames=5)
    (copied / "image_processor" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        load(FAMILY, copied)


def test_names_of_older_files_of_the_image_encoder(copied: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copied / "image_encoder" / "model.safetensors"
    weights = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(weights | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}, path)
    edit_json(copied / "model_index.json", image_processor=["transformers", "CLIPImageProcessorPil"])
    older, newer = (load(FAMILY, each).image_encoder.state_dict() for each in (copied, folder))
    assert all(torch.equal(older[name], tensor) for name, tensor in newer.items())
