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
from vramkit.pipelines.tiling import FrameTiling, Tiling

__all__ = ["FramewiseAutoencoder", "VideoAutoencoder"]


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


class FramewiseAutoencoder(VideoAutoencoder):
    """A video autoencoder that computes long clips in tiles of frames, where `use_framewise_...` says so."""

    def __init__(
        self, config: Any, tiling: Tiling, frame_tiling: FrameTiling, *, pixels: int, frames: int, framewise: bool
    ) -> None:
        """Take the ratios, pixels and frames of a latent, and whether frames are tiled unless the flags are set."""
        super().__init__(config, tiling)
        self.frame_tiling = frame_tiling
        self.spatial_compression_ratio = pixels
        self.temporal_compression_ratio = frames
        self.use_framewise_encoding = framewise
        self.use_framewise_decoding = framewise

    def enable_tiling(  # noqa: PLR0917 - the order of the published ones
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        tile_sample_stride_num_frames: int | None = None,
    ) -> None:
        """Compute pictures larger than a tile in overlapping tiles, blended where they overlap: less memory, other numbers.

        Sizes and distances are in pixels and frames, multiples of the compression ratios; what is not given keeps its last
        value. Those of frames are for `use_framewise_encoding` and `use_framewise_decoding`, which this does not turn on.

        Raises:
            ConfigError: sizes that are no such multiples or leave gaps.
        """
        tiling = Tiling(
            height=tile_sample_min_height or self.tiling.height,
            width=tile_sample_min_width or self.tiling.width,
            stride_height=tile_sample_stride_height or self.tiling.stride_height,
            stride_width=tile_sample_stride_width or self.tiling.stride_width,
        )
        frame_tiling = FrameTiling(
            frames=tile_sample_min_num_frames or self.frame_tiling.frames,
            stride=tile_sample_stride_num_frames or self.frame_tiling.stride,
        )
        # An impossible tiling is refused here, not in the first decode.
        tiling.scaled_down(self.spatial_compression_ratio)
        frame_tiling.scaled_down(self.temporal_compression_ratio)
        self.tiling, self.frame_tiling = tiling, frame_tiling
        self.use_tiling = True
