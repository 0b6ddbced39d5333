"""The HunyuanVideo autoencoder: 8 x 8 pixels and 4 frames per latent, causal in time.

Mirrors `AutoencoderKLHunyuanVideo` of diffusers in parameter names, config keys and numbers (checkpoint:
hunyuanvideo-community/HunyuanVideo, folder `vae`; arXiv:2412.03603). Its norms look at a whole clip, so clips are cut
into tiles of frames in any case, as the published one does, and into tiles of the picture with `enable_tiling`. A tile is
blended into the result as soon as it is there: beside the result one tile and the edges within a picture are alive.

Shapes: B batch, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video.vae_layers import CausalConv3d, DownBlock, GroupNorm, MidBlock, UpBlock
from vramkit.pipelines.loading.options import Config
from vramkit.pipelines.networks.autoencoder import DecoderOutput, EncoderOutput, LatentDistribution
from vramkit.pipelines.networks.tiling import Box, FrameTiling, Tiling, fill_clip, magnified, reduced
from vramkit.pipelines.networks.video_autoencoder import FramewiseAutoencoder

__all__ = ["AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideoConfig"]

DOWN_BLOCK, UP_BLOCK = "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLHunyuanVideoConfig(Config):
    """The keys of the published `vae/config.json`.

    Raises:
        ConfigError: blocks of another autoencoder, or sizes that contradict each other.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: Sequence[str] = (DOWN_BLOCK,) * 4
    up_block_types: Sequence[str] = (UP_BLOCK,) * 4
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for key, known in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
            if list(getattr(self, key)) != [known] * levels:
                raise ConfigError(
                    f"{key}={list(getattr(self, key))}; {known!r} was expected for each of the {levels} entries of "
                    "block_out_channels."
                )
        if self.act_fn != "silu":
            raise ConfigError(f"act_fn={self.act_fn!r}; 'silu' was expected.")
        ratio = self.spatial_compression_ratio
        if self.temporal_compression_ratio != 4 or levels < 3 or ratio not in [2**i for i in range(levels + 1)]:
            raise ConfigError(
                f"temporal_compression_ratio={self.temporal_compression_ratio}, spatial_compression_ratio={ratio} with "
                f"{levels} levels; 4 and a power of two up to 2 ** levels were expected, with 3 levels at least."
            )
        if odd := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise ConfigError(f"block_out_channels has {odd}, no multiples of norm_num_groups={self.norm_num_groups}.")

    @property
    def rates(self) -> list[tuple[int, int, int]]:
        """By how much each level shrinks (or, on the way back, enlarges) frames, rows and columns."""
        levels = len(self.block_out_channels)
        in_space = [2 if level < round(math.log2(self.spatial_compression_ratio)) else 1 for level in range(levels)]
        in_time = [2 if levels - 3 <= level < levels - 1 else 1 for level in range(levels)]
        return list(zip(in_time, in_space, in_space, strict=True))


class Encoder(nn.Module):
    """Frames [B, 3, F, H, W] -> parameters of the latents [B, 2 Z, T, h, w]."""

    def __init__(self, config: AutoencoderKLHunyuanVideoConfig) -> None:
        super().__init__()
        widths, groups = [config.block_out_channels[0], *config.block_out_channels], config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, resnets=config.layers_per_block, groups=groups, rates=rates)
            for (a, b), rates in zip(pairwise(widths), config.rates, strict=True)
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Encode one tile."""
        clip = [self.conv_in(x)]
        for block in self.down_blocks:
            clip.append(block(clip))  # each takes out what the one before put in
        x = self.mid_block(clip.pop())
        parameters: Tensor = self.conv_out(x, affine=self.conv_norm_out(x))
        return parameters


class Decoder(nn.Module):
    """Latents [B, Z, T, h, w] -> frames [B, 3, F, H, W]."""

    def __init__(self, config: AutoencoderKLHunyuanVideoConfig) -> None:
        super().__init__()
        backwards = [*reversed(config.block_out_channels)]
        widths, groups = [backwards[0], *backwards], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups=groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(a, b, resnets=config.layers_per_block + 1, groups=groups, rates=rates)
            for (a, b), rates in zip(pairwise(widths), config.rates, strict=True)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        """Decode one tile."""
        clip = [self.mid_block(self.conv_in(z))]
        for block in self.up_blocks:
            clip.append(block(clip))  # each takes out what the one before put in
        x = clip.pop()
        frames: Tensor = self.conv_out(x, affine=self.conv_norm_out(x))
        return frames


class AutoencoderKLHunyuanVideo(FramewiseAutoencoder):
    """The autoencoder of HunyuanVideo, for inference: nothing here records gradients.

    Clips longer than a tile of frames (16, 12 apart, and one before) are computed in such tiles unless
    `use_framewise_encoding` or `use_framewise_decoding` is set to False. Tiles of the picture, with `enable_tiling`, are of
    256 x 256 pixels, 192 apart.
    """

    config: AutoencoderKLHunyuanVideoConfig
    config_class: ClassVar[type[AutoencoderKLHunyuanVideoConfig]] = AutoencoderKLHunyuanVideoConfig

    def __init__(self, config: AutoencoderKLHunyuanVideoConfig) -> None:
        super().__init__(
            config,
            Tiling(),
            FrameTiling(),
            pixels=config.spatial_compression_ratio,
            frames=config.temporal_compression_ratio,
            framewise=True,
        )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Encode a clip [B, 3, F, H, W], values from -1 to 1, in the dtype of the weights.

        The first frame becomes the first latent frame, every four after it one more. The result is a named tuple, so
        `.latent_dist` and `[0]` both work whatever `return_dict` says. Its distribution is over latents
        [B, Z, 1 + (F - 1) // 4, H // 8, W // 8], not yet multiplied by `scaling_factor`.

        Raises:
            ConfigError: `x` has other dimensions or channels, or rows or columns that are no multiples of 8.
        """
        self._check_input("x", x, self.config.in_channels)
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        if x.shape[3] % ratio or x.shape[4] % ratio:
            raise ConfigError(f"x has {x.shape[3]} x {x.shape[4]} pixels; multiples of {ratio} were expected.")
        frames, height, width = 1 + (x.shape[2] - 1) // rate, x.shape[3] // ratio, x.shape[4] // ratio
        parameters = x.new_empty(x.shape[0], 2 * self.config.latent_channels, frames, height, width)
        tiling = self.tiling.scaled_down(ratio) if self._tiles_pictures(x) else None
        in_time = self.use_framewise_encoding and self.frame_tiling.is_needed(x.shape[2])
        frame_tiling = self.frame_tiling.scaled_down(rate) if in_time else None
        for item, out in zip(self._slices(x), self._slices(parameters), strict=True):
            fill_clip(
                out, partial(self._encode_tile, item), tiling=tiling, frame_tiling=frame_tiling, ranks=self.tile_ranks
            )
        return EncoderOutput(LatentDistribution(parameters))

    @torch.no_grad()
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        """Decode latents [B, Z, T, h, w], already divided by `scaling_factor`, in the dtype of the weights.

        The result is a named tuple, so `.sample` and `[0]` both work whatever `return_dict` says. Its sample is
        [B, 3, 1 + 4 (T - 1), 8 h, 8 w], in the dtype of `z`, around -1 .. 1 and not clamped.

        Raises:
            ConfigError: `z` has other dimensions or channels.
        """
        self._check_input("z", z, self.config.latent_channels)
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        frames, height, width = 1 + rate * (z.shape[2] - 1), z.shape[3] * ratio, z.shape[4] * ratio
        sample = z.new_empty(z.shape[0], self.config.out_channels, frames, height, width)
        tiling = self.tiling if self._tiles_pictures(sample) else None
        in_time = self.use_framewise_decoding and self.frame_tiling.is_needed(frames)
        frame_tiling = self.frame_tiling if in_time else None
        for item, out in zip(self._slices(z), self._slices(sample), strict=True):
            fill_clip(
                out, partial(self._decode_tile, item), tiling=tiling, frame_tiling=frame_tiling, ranks=self.tile_ranks
            )
        return DecoderOutput(sample)

    def _encode_tile(self, x: Tensor, box: Box) -> Tensor:
        """The latents of `box`, from the frames in `x` [B, 3, F, H, W] that they stand for."""
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        frames, rows, columns = box
        # n latent frames stand for rate * (n - 1) + 1 frames.
        stop = None if frames.stop is None else rate * (frames.stop - 1) + 1
        tile = x[:, :, rate * frames.start : stop, magnified(rows, ratio), magnified(columns, ratio)]
        parameters: Tensor = self.quant_conv(self.encoder(tile))
        return parameters

    def _decode_tile(self, z: Tensor, box: Box) -> Tensor:
        """The frames of `box`, from the latents in `z` [B, Z, T, h, w] that stand for them."""
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        frames, rows, columns = box
        stop = None if frames.stop is None else (frames.stop - 1) // rate + 1
        tile = z[:, :, frames.start // rate : stop, reduced(rows, ratio), reduced(columns, ratio)]
        sample: Tensor = self.decoder(self.post_quant_conv(tile))
        return sample
