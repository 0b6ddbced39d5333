"""What the video autoencoders share: tiles, slices, and a pass there and back.

Shapes: B batch, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.autoencoder import DecoderOutput, EncoderOutput
from vramkit.pipelines.modeling import Model
from vramkit.pipelines.tiling import Tiling

__all__ = ["VideoAutoencoder"]


class VideoAutoencoder(Model):
    """A video autoencoder for inference: nothing here records gradients.

    A subclass computes `encode` and `decode`, and says with `enable_tiling` which tiles there may be.
    """

    encode: Callable[..., EncoderOutput]  # a clip [B, 3, F, H, W] to a distribution over latents [B, Z, T, h, w]
    decode: Callable[..., DecoderOutput]  # and back

    def __init__(self, config: Any, tiling: Tiling) -> None:
        super().__init__(config)
        self.tiling = tiling
        self.use_tiling = False
        self.use_slicing = False

    def disable_tiling(self) -> None:
        """Compute pictures of every size whole."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Compute the items of a batch one after the other: the memory of one item, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Compute the items of a batch together."""
        self.use_slicing = False

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput:
        """Encode a clip [B, 3, F, H, W] and decode the most likely latents, or with `sample_posterior` random ones."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _tiles_pictures(self, video: Tensor) -> bool:
        """Whether `video` [B, C, F, H, W] is computed in tiles of the picture."""
        return self.use_tiling and self.tiling.is_needed(*video.shape[-2:])

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of a batch [B, ...] that are computed one after the other."""
        return torch.split(x, 1 if self.use_slicing else max(1, x.shape[0]))

    @staticmethod
    def _check_input(name: str, x: Tensor, channels: int) -> None:
        """Refuse what is no clip of so many channels."""
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ConfigError(
                f"{name} has shape {list(x.shape)}; [batch, {channels}, frames, height, width] was expected, with one frame "
                "and one pixel at least."
            )
