"""The config of the LTX-Video autoencoders: what their blocks are, and what cannot be combined.

One class of three published versions. 0.9.0 shrinks clips by strided convolutions and decodes without a timestep; the
decoder of 0.9.1 is told one and adds noise; the encoder of 0.9.5 folds positions into channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.ltx.vae_convolution import Rates

__all__ = ["AutoencoderKLLTXVideoConfig"]

STRIDED, FOLDED = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"
RATES: dict[str, Rates] = {
    "conv": (2, 2, 2),
    "spatial": (1, 2, 2),
    "temporal": (2, 1, 1),
    "spatiotemporal": (2, 2, 2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLLTXVideoConfig(Config):
    """The keys of the published `vae/config.json`, with the values of version 0.9.0 as defaults.

    Lists for the decoder are in the order of the encoder and read from their end.

    Raises:
        ConfigError: options that contradict each other, with what was expected.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    down_block_types: Sequence[str] = (STRIDED,) * 4
    decoder_block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: Sequence[int] = (4, 3, 3, 3, 4)
    decoder_layers_per_block: Sequence[int] = (4, 3, 3, 3, 4)
    spatio_temporal_scaling: Sequence[bool] = (True, True, True, False)
    decoder_spatio_temporal_scaling: Sequence[bool] = (True, True, True, False)
    decoder_inject_noise: Sequence[bool] = (False,) * 5
    downsample_type: Sequence[str] = ("conv",) * 4
    upsample_residual: Sequence[bool] = (False,) * 4
    upsample_factor: Sequence[int] = (1,) * 4
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = False
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None

    def __post_init__(self) -> None:
        if self.patch_size_t != 1:
            raise ConfigError(f"patch_size_t={self.patch_size_t}; 1 was expected.")
        self._check_blocks()
        self._check_encoder()
        self._check_decoder()

    def _check_blocks(self) -> None:
        if not self.block_out_channels or not self.decoder_block_out_channels:
            raise ConfigError(
                "block_out_channels or decoder_block_out_channels is empty; one width for each block was expected."
            )
        if set(self.down_block_types) not in ({STRIDED}, {FOLDED}):
            raise ConfigError(
                f"down_block_types={list(self.down_block_types)}; either {STRIDED!r} or {FOLDED!r} was expected for all."
            )
        down, up = len(self.down_widths) - 1, len(self.decoder_block_out_channels)
        lengths = {
            "down_block_types": down,
            "layers_per_block": down + 1,
            "spatio_temporal_scaling": down,
            "downsample_type": down,
            "decoder_layers_per_block": up + 1,
            "decoder_spatio_temporal_scaling": up,
            "decoder_inject_noise": up + 1,
            "upsample_residual": up,
            "upsample_factor": up,
        }
        for key, length in lengths.items():
            if len(getattr(self, key)) != length:
                raise ConfigError(f"{key}={list(getattr(self, key))}; {length} entries were expected.")

    def _check_encoder(self) -> None:
        if unknown := [kind for kind in self.downsample_type if kind not in RATES]:
            raise ConfigError(f"downsample_type has {unknown}; some of {sorted(RATES)} were expected.")
        for index, (width, next_width) in enumerate(pairwise(self.down_widths)):
            if self.is_folded and width != next_width and not self.folds(index):
                raise ConfigError(
                    f"Block {index} of the encoder has to make {next_width} channels of {width}, which it can only with a "
                    f"downsample_type of {sorted(set(RATES) - {'conv'})} and spatio_temporal_scaling."
                )
        encoder = tuple(math.prod(sizes) for sizes in zip(*self.down_rates, strict=True))
        steps = 2 ** sum(map(bool, self.decoder_spatio_temporal_scaling))
        ratios = (self.temporal_ratio, self.spatial_ratio, self.spatial_ratio)
        for name, rates in (("encoder", encoder), ("decoder", (steps,) * 3)):
            made = (rates[0], self.patch_size * rates[1], self.patch_size * rates[2])
            if made != ratios:
                raise ConfigError(
                    f"temporal_compression_ratio, spatial_compression_ratio come to {ratios[:2]}, but the blocks of the "
                    f"{name} make {made[:2]}."
                )

    def _check_decoder(self) -> None:
        for index, (width_in, width) in enumerate(self.up_widths):
            factor, enlarges = self.upsample_factor[-1 - index], self.decoder_spatio_temporal_scaling[-1 - index]
            if factor > 1 and not (enlarges and width_in == width):
                raise ConfigError(
                    f"Block {index} of the decoder has to make {width} channels of {width_in * factor} with an "
                    f"upsample_factor of {factor}, which needs decoder_spatio_temporal_scaling and equal "
                    "decoder_block_out_channels before it."
                )
            if enlarges and self.upsample_residual[-1 - index] and width * factor % 8:
                raise ConfigError(
                    f"Block {index} of the decoder has {width * factor} channels; a multiple of 8 was expected with "
                    "upsample_residual."
                )
            timed = self.timestep_conditioning or self.decoder_inject_noise[-2 - index]
            if timed and width_in != width:
                raise ConfigError(
                    f"Block {index} of the decoder makes {width} channels of {width_in}: that cannot be combined with "
                    "timestep_conditioning or decoder_inject_noise."
                )

    @property
    def is_folded(self) -> bool:
        """Whether the encoder is that of 0.9.5, which folds positions into channels."""
        return self.down_block_types[-1] == FOLDED

    def folds(self, index: int) -> bool:
        """Whether block `index` of the encoder folds positions into channels."""
        return self.is_folded and bool(self.spatio_temporal_scaling[index]) and self.downsample_type[index] != "conv"

    @property
    def down_widths(self) -> tuple[int, ...]:
        """Channels before the first block of the encoder and behind each."""
        widths = tuple(self.block_out_channels)
        return widths if self.is_folded else (*widths, widths[-1])

    @property
    def down_rates(self) -> list[Rates]:
        """By how much each block of the encoder shrinks frames, rows and columns."""
        kinds = self.downsample_type if self.is_folded else ("conv",) * len(self.spatio_temporal_scaling)
        return [
            RATES[kind] if shrinks else (1, 1, 1)
            for kind, shrinks in zip(kinds, self.spatio_temporal_scaling, strict=True)
        ]

    @property
    def up_widths(self) -> list[tuple[int, int]]:
        """Channels before and in each block of the decoder, divided by its `upsample_factor`."""
        widths, before = [], self.decoder_block_out_channels[-1]
        for width, factor in zip(
            reversed(self.decoder_block_out_channels), reversed(self.upsample_factor), strict=True
        ):
            widths.append((before // factor, width // factor))
            before = width // factor
        return widths

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent along rows and columns."""
        given = self.spatial_compression_ratio
        return self.patch_size * 2 ** sum(map(bool, self.spatio_temporal_scaling)) if given is None else given

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame."""
        given = self.temporal_compression_ratio
        return 2 ** sum(map(bool, self.spatio_temporal_scaling)) if given is None else given
