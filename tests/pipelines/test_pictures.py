"""Pictures as a VAE is given them, against those of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from families import picture, relative_error

from vramkit.pipelines.calling.pictures import Pictures

NOISE = np.random.default_rng(0).random((2, 37, 61, 3)).astype(np.float32)
FORMS: dict[str, Any] = {
    "one picture": picture(),
    "pictures": [picture(), picture(33, 97, seed=2)],
    "array": NOISE[0],
    "arrays": [*NOISE],
    "batch of arrays": NOISE.astype(np.float64),
    "tensor": torch.from_numpy(NOISE).movedim(-1, 1)[0],
    "batch of tensors": torch.from_numpy(NOISE).movedim(-1, 1),
    "narrow tensors": torch.from_numpy(NOISE).movedim(-1, 1).bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_diffusers(form: str) -> None:
    given = FORMS[form]
    fitted = Pictures.of("image", given).fitted(32, 48)
    assert torch.equal(fitted, VideoProcessor(vae_scale_factor=8).preprocess(given, height=32, width=48).float())
    assert fitted.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    given = picture().convert(mode)
    expected = Pictures.of("image", given.convert("RGB")).fitted(32, 48)
    assert torch.equal(Pictures.of("image", given).fitted(32, 48), expected)


def test_arrays_become_the_pictures_that_they_are_of() -> None:
    pixels = np.array(picture())
    for given in (pixels, pixels / 255.0, pixels / 127.5 - 1.0, torch.from_numpy(pixels).movedim(-1, 0)):
        (back,) = Pictures.of("image", given).as_pil()
        np.testing.assert_array_equal(np.array(back), pixels)
    signed = Pictures.of("image", pixels / 127.5 - 1.0).fitted(50, 70)
    assert relative_error(signed, Pictures.of("image", pixels).fitted(50, 70)) <= 1e-6
