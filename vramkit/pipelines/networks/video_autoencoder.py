"""What the video autoencoders share: tiles, slices, and a pass there and back.

Shapes: B batch, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.modeling import Model
from vramkit.pipelines.networks.autoencoder import DecoderOutput, EncoderOutput
from vramkit.pipelines.networks.tiling import FrameTiling, TileRanks, Tiling

__all__ = ["FramewiseAutoencoder", "VideoAutoencoder"]

# Bytes of one channel of a picture in a stripe, where nobody says how many stripes there are to be: 78 rows of 832 numbers.
_STRIPE_BYTES = 2 * 256 * 256


class SmallerWay(NamedTuple):
    """A way to need less memory."""

    words: str  # what is done
    call: str  # of which method that is the result
    settings: dict[str, Any]  # attributes of the autoencoder and their values


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
        self.use_striping = False
        self.stripes: int | None = None
        self.tile_ranks: TileRanks | None = None
        """Ranks that compute the tiles of each clip together; None: this one computes all."""
        self.output_device: torch.device | None = None

    @property
    def stripeless(self) -> str | None:
        """Why stripes of rows would not give the numbers of whole pictures, after the name of the class; None: they do."""
        return "has norms that look at all rows of a clip"

    @property
    def has_stripes(self) -> bool:
        """Whether stripes of rows give the numbers of whole pictures."""
        return self.stripeless is None

    def disable_tiling(self) -> None:
        """Compute pictures of every size whole."""
        self.use_tiling = False

    def enable_striping(self, stripes: int | None = None, *, output_device: torch.device | str | None = None) -> None:
        """Compute pictures in stripes of rows, one after the other: less memory, the numbers of whole pictures.

        Equal to the last bit where the convolution kernels add in the same order for each size, else to rounding.

        Args:
            stripes: how many at most; None for as many as the size of the pictures asks for. A picture of few rows is
                computed in fewer.
            output_device: where `decode` puts the clip together, the host for one: finished frames leave the device as they
                come. None for the device that computes.

        Raises:
            ConfigError: a number below one, tiling is enabled, or the network cannot be computed so (`stripeless`).
        """
        if isinstance(stripes, bool) or not (stripes is None or (isinstance(stripes, int) and stripes >= 1)):
            raise ConfigError(f"stripes is {stripes!r}; None or a whole number of at least 1 was expected.")
        if not self.has_stripes:
            raise ConfigError(
                f"This {type(self).__name__} {self.stripeless}, so it cannot be computed in stripes; use enable_tiling(), "
                "whose tiles are blended (other numbers), or compute it whole."
            )
        if self.use_tiling:
            raise ConfigError("Tiling is enabled, which is another way to cut pictures; call disable_tiling() first.")
        self.output_device = None if output_device is None else torch.device(output_device)
        self.stripes = stripes
        self.use_striping = True

    def disable_striping(self) -> None:
        """Compute pictures whole, or in tiles where tiling is enabled."""
        self.use_striping = False
        self.output_device = None

    def smaller_ways(self, rows: int) -> list[SmallerWay]:
        """Ways to compute pictures of so many latent rows in less memory than now, the fastest first; none beside tiling."""
        if self.use_tiling or self.tile_ranks is not None:  # the other ranks would not know
            return []
        if not self.has_stripes:
            return [SmallerWay("in tiles that are blended: other numbers", "vae.enable_tiling()", {"use_tiling": True})]
        now = 1 if not self.use_striping else self.stripes or 8
        return [
            SmallerWay(
                f"in {count} stripes of rows: the same numbers",
                f"vae.enable_striping({count})",
                {"use_striping": True, "stripes": count},
            )
            for count in (4, 8, 16)  # stripes take little longer than whole pictures: no small steps
            if now < count <= rows
        ]

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

    def _refuse_striping(self) -> None:
        """Refuse to tile while pictures are computed in stripes."""
        if self.use_striping:
            raise ConfigError(
                "Striping is enabled, which is another way to cut pictures; call disable_striping() first."
            )

    def _new_clip(self, z: Tensor, *sizes: int) -> Tensor:
        """Memory for what becomes of latents [B, ...]: [B, *sizes]."""
        return z.new_empty(z.shape[0], *sizes, device=self.output_device)

    def _stripe_count(self, video: Tensor) -> int:
        """How many stripes `video` [B, C, F, H, W] is computed in at most."""
        if not self.use_striping:
            return 1
        size_bytes = video.shape[0] * video.shape[3] * video.shape[4] * video.element_size()
        return self.stripes or math.ceil(size_bytes / _STRIPE_BYTES)

    def _tiles_pictures(self, video: Tensor) -> bool:
        """Whether `video` [B, C, F, H, W] is computed in tiles of the picture."""
        if self.use_tiling:
            self._refuse_striping()
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
        self._refuse_striping()
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
