"""The CogVideoX video autoencoder: 8 x 8 pixels and 4 frames per latent, causal in time.

Mirrors `AutoencoderKLCogVideoX` of diffusers in parameter names, config keys and numbers (checkpoints: zai-org/CogVideoX-2b
and its siblings, folder `vae`; paper: arXiv:2408.06072). Two latent frames are decoded at a time, eight frames encoded at a
time, because the norms look at a batch of frames at once and the checkpoints were trained so.

Shapes: B batch, C channels, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.cogvideox.vae_layers import (
    CausalConv3d,
    DownBlock,
    Downsample,
    FrameCache,
    GroupNorm,
    MidBlock,
    SpatialNorm,
    UpBlock,
    Upsample,
    residual_blocks,
    shrunk,
    stretched,
)
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.networks.autoencoder import DecoderOutput, EncoderOutput, LatentDistribution
from vramkit.pipelines.networks.layout import laid_out
from vramkit.pipelines.networks.tiling import Box, Tiling, fill_clip, magnified, reduced
from vramkit.pipelines.networks.video_autoencoder import VideoAutoencoder

__all__ = ["AutoencoderKLCogVideoX", "AutoencoderKLCogVideoXConfig"]

LATENT_FRAMES_AT_ONCE = 2
FRAMES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLCogVideoXConfig(Config):
    """The keys of the published `vae/config.json`.

    Tiles are half of `sample_height` x `sample_width` pixels unless `enable_tiling` says otherwise. `scaling_factor` is the
    pipeline's; the keys after it have no effect here.

    Raises:
        ConfigError: an option that no published checkpoint uses, or sizes that contradict each other.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("CogVideoXDownBlock3D",) * 4
    up_block_types: Sequence[str] = ("CogVideoXUpBlock3D",) * 4
    block_out_channels: Sequence[int] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: float = 4
    sample_height: int = 480
    sample_width: int = 720
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    force_upcast: float | bool = True
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, kind in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
            if list(getattr(self, name)) != [kind] * levels:
                raise ConfigError(
                    f"{name} is {list(getattr(self, name))}; {kind!r} for each of the {levels} levels of "
                    "block_out_channels was expected."
                )
        if self.act_fn != "silu" or self.use_quant_conv or self.use_post_quant_conv:
            raise ConfigError(
                f"act_fn={self.act_fn!r}, use_quant_conv={self.use_quant_conv}, "
                f"use_post_quant_conv={self.use_post_quant_conv} describe no published checkpoint; 'silu', False and False "
                "were expected."
            )
        if self.temporal_compression_ratio not in {2**level for level in range(levels)}:
            raise ConfigError(
                f"temporal_compression_ratio is {self.temporal_compression_ratio}; a power of two that the {levels} levels "
                f"can halve to was expected, up to {2 ** (levels - 1)}."
            )

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels per latent, along rows and columns."""
        ratio: int = 2 ** (len(self.block_out_channels) - 1)
        return ratio

    @property
    def temporal_levels(self) -> int:
        """How often the frame rate is halved."""
        return int(self.temporal_compression_ratio).bit_length() - 1


class Encoder(nn.Module):
    """Frames [B, 3, F, H, W] -> parameters of the latents [B, 2 Z, T, h, w], one batch of frames at a time."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__()
        widths = [config.block_out_channels[0], *config.block_out_channels]
        groups, eps = config.norm_num_groups, config.norm_eps
        blocks = partial(residual_blocks, groups=groups, eps=eps)
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise(widths)):
            is_last = level == len(widths) - 2
            downsample = None if is_last else Downsample(width, temporal=level < config.temporal_levels)
            self.down_blocks.append(DownBlock(blocks(width_in, width, config.layers_per_block), downsample))
        self.mid_block = MidBlock(blocks(widths[-1], widths[-1], 2))
        self.norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, cache: FrameCache, out: Tensor) -> Tensor:
        """Encode the next batch of frames into `out`."""
        clip = [self.conv_in(x, cache)]
        for block in (*self.down_blocks, self.mid_block):
            clip.append(block(clip, cache))  # each takes out what the one before put in
        x = clip.pop()
        parameters: Tensor = self.conv_out(x, cache, activation=self.norm_out(x), out=out)
        return parameters


class Decoder(nn.Module):
    """Latents [B, Z, T, h, w] -> frames [B, 3, F, H, W], one batch of frames at a time."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__()
        widths = [config.block_out_channels[-1], *reversed(config.block_out_channels)]
        groups, latents = config.norm_num_groups, config.latent_channels
        blocks = partial(residual_blocks, groups=groups, eps=config.norm_eps, latent_channels=latents)
        self.conv_in = CausalConv3d(latents, widths[0])
        self.mid_block = MidBlock(blocks(widths[0], widths[0], 2))
        self.up_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise(widths)):
            is_last = level == len(widths) - 2
            upsample = None if is_last else Upsample(width, temporal=level < config.temporal_levels)
            self.up_blocks.append(UpBlock(blocks(width_in, width, config.layers_per_block + 1), upsample))
        self.norm_out = SpatialNorm(widths[-1], latents, groups=groups)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, cache: FrameCache, out: Tensor) -> Tensor:
        """Decode the next batch of latent frames into `out`."""
        clip = [self.conv_in(z, cache)]
        for block in (self.mid_block, *self.up_blocks):
            clip.append(block(clip, cache, z))  # each takes out what the one before put in
        x = clip.pop()
        frames: Tensor = self.conv_out(x, cache, activation=self.norm_out(x, z), out=out)
        return frames


class AutoencoderKLCogVideoX(VideoAutoencoder):
    """The autoencoder of CogVideoX, for inference: nothing here records gradients.

    `encode` and `decode` keep their intermediate frames in an object of their own, so calls may run side by side, and a
    call that is interrupted leaves nothing behind.
    """

    config: AutoencoderKLCogVideoXConfig
    config_class: ClassVar[type[AutoencoderKLCogVideoXConfig]] = AutoencoderKLCogVideoXConfig
    old_config_keys: ClassVar[tuple[str, ...]] = ("sample_size",)  # of the first diffusers that had the class

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        overlap_factors = 1 / 6, 1 / 5  # of the height and of the width of a tile
        super().__init__(
            config, overlapping_tiles(config.sample_height // 2, config.sample_width // 2, *overlap_factors)
        )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._overlap_factors = overlap_factors

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
    ) -> None:
        """Compute pictures larger than a tile in overlapping tiles, blended where they overlap: less memory, other numbers.

        Sizes are in pixels, overlaps parts of a tile; tiles and overlaps have to be multiples of 8 pixels. What is not given
        keeps its last value, at first tiles of half the `sample_height` and `sample_width` of the config that overlap by a
        sixth of their height and a fifth of their width.

        Raises:
            ConfigError: sizes that are no such multiples, or factors outside 0 to 1.
        """
        self._refuse_striping()
        factors = (
            self._overlap_factors[0] if tile_overlap_factor_height is None else tile_overlap_factor_height,
            self._overlap_factors[1] if tile_overlap_factor_width is None else tile_overlap_factor_width,
        )
        tiling = overlapping_tiles(
            tile_sample_min_height or self.tiling.height, tile_sample_min_width or self.tiling.width, *factors
        )
        tiling.scaled_down(self.config.scale_factor_spatial)  # refused here, not in the first decode
        self.tiling, self._overlap_factors = tiling, factors
        self.use_tiling = True

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Encode a clip [B, 3, F, H, W], values from -1 to 1, in the dtype of the weights.

        Of an odd number of frames the first becomes a latent frame by itself; each four of the others, and what is left of
        them, become one. The result is a named tuple, so `.latent_dist` and `[0]` both work whatever `return_dict` says. Its
        distribution is over latents [B, Z, T, H // 8, W // 8], not yet multiplied by `scaling_factor`.

        Raises:
            ConfigError: `x` has other dimensions or channels.
        """
        self._check_input("x", x, self.config.in_channels)
        ratio, frames = self.config.scale_factor_spatial, sum(self._encoded_counts(x.shape[2]))
        latents = x.shape[3] // ratio, x.shape[4] // ratio
        parameters = x.new_empty(x.shape[0], 2 * self.config.latent_channels, frames, *latents)
        tiling = self.tiling.scaled_down(ratio) if self._tiles_pictures(x) else None
        for item, out in zip(self._slices(x), self._slices(parameters), strict=True):
            fill_clip(out, partial(self._encode_tile, item), tiling=tiling, frame_tiling=None, ranks=self.tile_ranks)
        return EncoderOutput(LatentDistribution(parameters))

    @torch.no_grad()
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        """Decode latents [B, Z, T, h, w] in the dtype of the weights, already divided by `scaling_factor`.

        The result is a named tuple, so `.sample` and `[0]` both work whatever `return_dict` says. Its sample is
        [B, 3, F, 8 h, 8 w] in the dtype of `z`, not clamped; F is 4 (T - 1) + 1 for an odd T and 4 T for an even one.

        Raises:
            ConfigError: `z` has other dimensions or channels.
        """
        self._check_input("z", z, self.config.latent_channels)
        ratio = self.config.scale_factor_spatial
        frames = sum(self._decoded_counts(z.shape[2]))
        sample = z.new_empty(z.shape[0], self.config.out_channels, frames, z.shape[3] * ratio, z.shape[4] * ratio)
        tiling = self.tiling if self._tiles_pictures(sample) else None
        for item, out in zip(self._slices(z), self._slices(sample), strict=True):
            fill_clip(out, partial(self._decode_tile, item), tiling=tiling, frame_tiling=None, ranks=self.tile_ranks)
        return DecoderOutput(sample)

    def _encode_tile(self, x: Tensor, box: Box) -> Tensor:
        """The latents of `box`, from the frames in `x` [B, 3, F, H, W] that they stand for."""
        ratio, (_, rows, columns) = self.config.scale_factor_spatial, box
        x = x[..., magnified(rows, ratio), magnified(columns, ratio)]
        counts, cache = self._encoded_counts(x.shape[2]), FrameCache()
        latents = x.shape[-2] // ratio, x.shape[-1] // ratio
        parameters = x.new_empty(x.shape[0], 2 * self.config.latent_channels, sum(counts), *latents)
        batches = torch.split(x, frame_batches(x.shape[2], FRAMES_AT_ONCE), dim=2)
        for batch, finished in zip(batches, torch.split(parameters, counts, dim=2), strict=True):
            self.encoder(batch, cache, finished)
        return parameters

    def _decode_tile(self, z: Tensor, box: Box) -> Tensor:
        """The frames of `box`, from the latents in `z` [B, Z, T, h, w] that stand for them."""
        ratio, (_, rows, columns) = self.config.scale_factor_spatial, box
        z = laid_out(z[..., reduced(rows, ratio), reduced(columns, ratio)])
        counts, cache = self._decoded_counts(z.shape[2]), FrameCache()
        pixels = z.shape[-2] * ratio, z.shape[-1] * ratio
        sample = z.new_empty(z.shape[0], self.config.out_channels, sum(counts), *pixels)
        batches = torch.split(z, frame_batches(z.shape[2], LATENT_FRAMES_AT_ONCE), dim=2)
        for batch, finished in zip(batches, torch.split(sample, counts, dim=2), strict=True):
            self.decoder(batch, cache, finished)
        return sample

    def _encoded_counts(self, frames: int) -> list[int]:
        """How many latent frames each batch of `frames` becomes."""
        counts = frame_batches(frames, FRAMES_AT_ONCE)
        for _ in range(self.config.temporal_levels):
            counts = [shrunk(count) for count in counts]
        return counts

    def _decoded_counts(self, frames: int) -> list[int]:
        """How many frames each batch of latent `frames` becomes."""
        counts = frame_batches(frames, LATENT_FRAMES_AT_ONCE)
        for _ in range(self.config.temporal_levels):
            counts = [stretched(count) for count in counts]
        return counts


def frame_batches(frames: int, at_once: int) -> list[int]:
    """How many frames each batch takes: `at_once`, and the first one what is left over as well."""
    count = max(1, frames // at_once)
    return [frames - at_once * (count - 1), *[at_once] * (count - 1)]


def overlapping_tiles(height: int, width: int, height_factor: float, width_factor: float) -> Tiling:
    """Tiles of height x width pixels that overlap by these parts of their sides."""
    return Tiling(
        height=height,
        width=width,
        stride_height=height - int(height * height_factor),
        stride_width=width - int(width * width_factor),
    )
