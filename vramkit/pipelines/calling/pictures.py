"""The pictures that a call is given: read, checked, and made into what a VAE or an image encoder takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.extras import extra
from vramkit.pipelines.calling.video import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Pictures"]

_KINDS = (
    "a PIL picture, a path or address, an array [H, W, 3] or a tensor [3, H, W] with floating values in 0 .. 1 (or -1 .. 1) "
    "or uint8, a batch of those, or a list"
)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """One picture of a call, or several of one size: PIL pictures, or a tensor [N, 3, H, W] of floating values."""

    given: list[Image] | Tensor

    @classmethod
    def of(cls, name: str, given: Any) -> Pictures:
        """Read an argument by the name of ``name``.

        PIL pictures are taken as they are, files upright as their EXIF data says; both are made RGB.

        Raises:
            ConfigError: it is no picture, has another number of channels, or values outside its range.
            CheckpointError: a file or address cannot be read as a picture.
        """
        with extra("video", needed_for="a picture"):
            import PIL.Image  # noqa: PLC0415

        items = list(given) if isinstance(given, list | tuple) else [given]
        if items and all(isinstance(item, PIL.Image.Image | str | os.PathLike) for item in items):
            return cls(
                [item.convert("RGB") if isinstance(item, PIL.Image.Image) else load_image(item) for item in items]
            )
        if not items or not all(isinstance(item, np.ndarray | Tensor) for item in items):
            kinds = " and ".join(sorted({type(item).__name__ for item in items})) or "an empty list"
            raise ConfigError(f"{name} is {kinds}; expected {_KINDS}")
        tensors = [_tensor(name, item) for item in items]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            sizes = " and ".join(sorted({f"{tensor.shape[2]} x {tensor.shape[3]}" for tensor in tensors}))
            raise ConfigError(f"{name} has arrays of {sizes}; expected one size for all")
        return cls(torch.cat(tensors))

    def __len__(self) -> int:
        return len(self.given)

    def fitted(self, height: int, width: int) -> Tensor:
        """Return [N, 3, height, width] float32 in -1 .. 1, as the VAEs of diffusers are given them.

        PIL pictures are resized with Lanczos' filter; arrays and tensors to the nearest pixels.
        """
        if isinstance(self.given, Tensor):
            values = F.interpolate(self.given, size=(height, width))
            return (values if bool((self.given < 0).any()) else 2.0 * values - 1.0).float()
        with extra("video", needed_for="a picture"):
            import PIL.Image  # noqa: PLC0415

        resized = [picture.resize((width, height), PIL.Image.Resampling.LANCZOS) for picture in self.given]
        values = torch.stack([torch.from_numpy(np.array(picture)) for picture in resized]).movedim(-1, 1)
        return 2.0 * (values.float() / 255.0) - 1.0

    def as_pil(self) -> list[Image]:
        """Return PIL pictures of the size that was given, for the image processors of transformers."""
        if not isinstance(self.given, Tensor):
            return self.given
        with extra("video", needed_for="a picture"):
            import PIL.Image  # noqa: PLC0415

        values = self.given.float()
        values = values * 0.5 + 0.5 if bool((values < 0).any()) else values
        pixels = (values * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
        return [PIL.Image.fromarray(picture) for picture in pixels]

    def check_number(self, name: str, prompts: int) -> None:
        """Refuse other numbers of pictures than one for all prompts, or one for each.

        Raises:
            ConfigError: such a number.
        """
        if len(self) not in (1, prompts):
            raise ConfigError(
                f"{name} has {len(self)} pictures for {prompts} prompts: give one, or one for each prompt"
            )


def _tensor(name: str, given: Any) -> Tensor:
    """Return pictures [N, 3, H, W] of floating values; an array has its channels last, a tensor first."""
    values = (
        torch.from_numpy(given).movedim(-1, -3) if isinstance(given, np.ndarray) and given.ndim in (3, 4) else given
    )
    if not isinstance(values, Tensor) or values.ndim not in (3, 4) or values.shape[-3] != 3 or 0 in values.shape:
        layout = "[3, H, W] or [N, 3, H, W]" if isinstance(given, Tensor) else "[H, W, 3] or [N, H, W, 3]"
        raise ConfigError(f"{name} has shape {list(given.shape)}; expected {layout}")
    values = values[None] if values.ndim == 3 else values
    if values.dtype == torch.uint8:
        return values.float() / 255.0
    if not values.is_floating_point():
        raise ConfigError(f"{name} is {given.dtype}; expected floating values in 0 .. 1 (or -1 .. 1), or uint8")
    low, high = float(values.min()), float(values.max())
    if not (low >= -1 and high <= 1):  # written so that NaN fails too
        raise ConfigError(f"{name} has values from {low:g} to {high:g}; expected 0 .. 1 (or -1 .. 1)")
    return values
