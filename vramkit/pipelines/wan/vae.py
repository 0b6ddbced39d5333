"""The Wan2.1 video autoencoder: 8 x 8 pixels and 4 frames per latent, causal in time.

Mirrors `AutoencoderKLWan` of diffusers in parameter names, config keys and numbers (checkpoints:
Wan-AI/Wan2.1-T2V-1.3B-Diffusers and its siblings, folder `vae`). Latent frames are decoded one after the other and, from
one block to the next, depth first: beside the two frames that each causal convolution needs again, one frame of a large
picture is alive at full size, and finished frames go straight into the result.

Shapes: B batch, C channels, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.autoencoder import DecoderOutput, EncoderOutput, LatentDistribution
from vramkit.pipelines.tiling import Tiling, fill_by_tiles
from vramkit.pipelines.video_autoencoder import VideoAutoencoder
from vramkit.pipelines.wan.vae_layers import (
    CausalConv3d,
    Downsample,
    FeatureCache,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    UpBlock,
    Upsample,
)

__all__ = ["AutoencoderKLWan", "AutoencoderKLWanConfig"]

# Pixels of video in the layers of full size at once: two frames of a 256 x 256 tile, one of anything larger.
_PART_PIXELS = 2 * 256 * 256


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLWanConfig:
    """The keys of the published `vae/config.json`.

    `dropout` is read and has no effect, since nothing here trains. `is_residual` and `patch_size` belong to the
    autoencoder of Wan2.2 5B and must keep their defaults, and so must `attn_scales`, which no published checkpoint uses.

    Raises:
        ConfigError: an option of another autoencoder, or sizes that contradict each other.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temperal_downsample: Sequence[bool] = (False, True, True)
    dropout: float = 0.0
    # fmt: off
    latents_mean: Sequence[float] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: Sequence[float] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        if self.is_residual or self.patch_size not in (None, 1):
            raise ConfigError(
                f"is_residual={self.is_residual}, patch_size={self.patch_size} describe the autoencoder of Wan2.2 5B, "
                "which is not supported; use a Wan2.1 checkpoint (is_residual false, patch_size null)."
            )
        if self.attn_scales:
            raise ConfigError(
                f"attn_scales={list(self.attn_scales)} asks for attention between the levels of the encoder, "
                "which is not supported; use a checkpoint whose attn_scales is []."
            )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries, one for each step between the "
                f"{len(self.dim_mult)} levels of dim_mult was expected."
            )
        ratios = (2 ** sum(self.temperal_downsample), 2 ** len(self.temperal_downsample))
        if (self.scale_factor_temporal, self.scale_factor_spatial) != ratios:
            raise ConfigError(
                f"scale_factor_temporal={self.scale_factor_temporal}, scale_factor_spatial={self.scale_factor_spatial} "
                f"contradict temperal_downsample={list(self.temperal_downsample)}, which gives {ratios[0]} and {ratios[1]}."
            )


class Encoder(nn.Module):
    """Frames [B, 3, F, H, W] -> parameters of the latents [B, 2 Z, T, h, w], one chunk of frames at a time."""

    def __init__(self, config: AutoencoderKLWanConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        layers: list[nn.Module] = []
        for level, (width_in, width) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(width if i else width_in, width) for i in range(config.num_res_blocks)]
            if level < len(config.temperal_downsample):
                layers.append(Downsample(width, temporal=config.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)
        # The layers before the first change of frame rate take any number of frames, so they take few.
        temporal = (isinstance(layer, Downsample) and layer.time_conv is not None for layer in layers)
        self._any_count = next((i for i, changes in enumerate(temporal) if changes), len(layers))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Encode the next chunk: one frame at first, as many as there are to a latent frame after that."""
        parts = torch.split(x, _frames_per_part(x), dim=2)
        x = torch.cat([self._shrink(part, cache) for part in parts], dim=2)
        for layer in (*self.down_blocks[self._any_count :], self.mid_block):
            x = layer(x, cache)
        x = cache.window(self.conv_out, x, self.norm_out)
        parameters: Tensor = self.conv_out(x, cache)
        return parameters

    def _shrink(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = cache.window(self.conv_in, x)
        for layer in (self.conv_in, *self.down_blocks[: self._any_count]):
            x = layer(x, cache)
        return x


class Decoder(nn.Module):
    """Latents [B, Z, 1, h, w] -> frames [B, 3, F, H, W], one latent frame at a time."""

    def __init__(self, config: AutoencoderKLWanConfig) -> None:
        super().__init__()
        base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        widths = [base * m for m in reversed(config.dim_mult)]
        temporal = [*reversed(config.temperal_downsample)]
        self.conv_in = CausalConv3d(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        blocks = []
        for level, width in enumerate(widths):
            width_in = widths[level - 1] // 2 if level else width  # an upsampling halves the channels
            upsample = Upsample(width, temporal=temporal[level]) if level < len(temporal) else None
            blocks.append(UpBlock(width_in, width, resnets=config.num_res_blocks + 1, upsample=upsample))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RMSNorm(widths[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, cache: FeatureCache, out: Tensor) -> Tensor:
        """Decode the next latent frame into `out`: one frame at first, several after that."""
        x = cache.window(self.conv_in, z)
        x = self.conv_in(x, cache)
        x = self.mid_block(x, cache)
        self._grow(x, 0, cache, out)
        return out

    def _grow(self, x: Tensor, level: int, cache: FeatureCache, out: Tensor) -> None:
        """Run `x` [B, C, F, ., .] through the blocks from `level` on, a part of its frames to the end before the next."""
        if level == len(self.up_blocks):
            x = cache.window(self.conv_out, x, self.norm_out)
            out.copy_(self.conv_out(x, cache))
            return
        rate = out.shape[2] // x.shape[2]  # finished frames per frame of x
        count = max(1, _frames_per_part(out) // rate)
        parts = zip(torch.split(x, count, dim=2), torch.split(out, count * rate, dim=2), strict=True)
        for part, finished in parts:
            self._grow(self.up_blocks[level](part, cache), level + 1, cache, finished)


class AutoencoderKLWan(VideoAutoencoder):
    """The autoencoder of Wan2.1, for inference: nothing here records gradients.

    `encode` and `decode` keep their intermediate frames in an object of their own, so calls may run side by side, and a
    call that is interrupted leaves nothing behind.
    """

    config: AutoencoderKLWanConfig
    config_class: ClassVar[type[AutoencoderKLWanConfig]] = AutoencoderKLWanConfig

    def __init__(self, config: AutoencoderKLWanConfig) -> None:
        super().__init__(config, Tiling())
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Compute pictures larger than a tile in overlapping tiles, blended where they overlap: less memory, other numbers.

        Sizes and distances are in pixels, multiples of `scale_factor_spatial`; what is not given keeps its last value, at
        first 256 x 256 pixels, 192 apart.

        Raises:
            ConfigError: sizes that are no such multiples or leave gaps.
        """
        tiling = replace(
            self.tiling,
            height=tile_sample_min_height or self.tiling.height,
            width=tile_sample_min_width or self.tiling.width,
            stride_height=tile_sample_stride_height or self.tiling.stride_height,
            stride_width=tile_sample_stride_width or self.tiling.stride_width,
        )
        tiling.scaled_down(
            self.config.scale_factor_spatial
        )  # an impossible tiling is refused here, not in the first decode
        self.tiling = tiling
        self.use_tiling = True

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Encode a clip [B, 3, F, H, W], values from -1 to 1, in the dtype of the weights.

        The first frame becomes the first latent frame, every four after it one more; what is left over at the end is not
        encoded. The result is a named tuple, so `.latent_dist` and `[0]` both work whatever `return_dict` says. Its
        distribution is over latents [B, Z, 1 + (F - 1) // 4, H // 8, W // 8], not yet normalized with `latents_mean` and
        `latents_std`.

        Raises:
            ConfigError: `x` has other dimensions or channels.
        """
        self._check_input("x", x, self.config.in_channels)
        ratio, rate = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        frames, height, width = 1 + (x.shape[2] - 1) // rate, x.shape[3] // ratio, x.shape[4] // ratio
        parameters = x.new_empty(x.shape[0], 2 * self.config.z_dim, frames, height, width)
        for item, out in zip(self._slices(x), self._slices(parameters), strict=True):
            self._encode_item(item, out)
        return EncoderOutput(LatentDistribution(parameters))

    @torch.no_grad()
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        """Decode latents [B, Z, T, h, w] in the dtype of the weights; any `latents_mean` and `latents_std` are undone.

        The result is a named tuple, so `.sample` and `[0]` both work whatever `return_dict` says. Its sample is
        [B, 3, 1 + 4 (T - 1), 8 h, 8 w], in the dtype of `z`, clamped to -1 .. 1.

        Raises:
            ConfigError: `z` has other dimensions or channels.
        """
        self._check_input("z", z, self.config.z_dim)
        ratio, rate = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        frames, height, width = 1 + rate * (z.shape[2] - 1), z.shape[3] * ratio, z.shape[4] * ratio
        sample = z.new_empty(z.shape[0], self.config.out_channels, frames, height, width)
        for item, out in zip(self._slices(z), self._slices(sample), strict=True):
            self._decode_item(item, out)
        return DecoderOutput(sample.clamp_(-1.0, 1.0))

    def _encode_item(self, x: Tensor, out: Tensor) -> None:
        """Encode `x` [B, 3, F, H, W] into `out` [B, 2 Z, T, h, w], in tiles where that is asked for."""
        if not self._tiles_pictures(x):
            out.copy_(self._encode_tile(x))
            return
        ratio = self.config.scale_factor_spatial

        def compute_tile(top: int, left: int) -> Tensor:
            rows = slice(top * ratio, top * ratio + self.tiling.height)
            columns = slice(left * ratio, left * ratio + self.tiling.width)
            return self._encode_tile(x[..., rows, columns])

        fill_by_tiles(out, self.tiling.scaled_down(ratio), compute_tile)

    def _encode_tile(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> [B, 2 Z, T, h, w]."""
        rate = self.config.scale_factor_temporal
        cache = FeatureCache()
        chunks = [self.encoder(x[:, :, :1], cache)]
        cache.is_first_chunk = False
        # A last chunk that is not complete is left out.
        chunks += [self.encoder(x[:, :, end - rate : end], cache) for end in range(1 + rate, x.shape[2] + 1, rate)]
        parameters: Tensor = self.quant_conv(torch.cat(chunks, dim=2))
        return parameters

    def _decode_item(self, z: Tensor, out: Tensor) -> None:
        """Decode `z` [B, Z, T, h, w] into `out` [B, 3, F, H, W], in tiles where that is asked for."""
        ratio = self.config.scale_factor_spatial
        if not self._tiles_pictures(out):
            self._decode_tile(z, out)
            return
        latent = self.tiling.scaled_down(ratio)

        def compute_tile(top: int, left: int) -> Tensor:
            rows = slice(top // ratio, top // ratio + latent.height)
            columns = slice(left // ratio, left // ratio + latent.width)
            tile = z[..., rows, columns]
            return self._decode_tile(tile, z.new_empty(*out.shape[:3], tile.shape[-2] * ratio, tile.shape[-1] * ratio))

        fill_by_tiles(out, self.tiling, compute_tile)

    def _decode_tile(self, z: Tensor, out: Tensor) -> Tensor:
        """Decode `z` [B, Z, T, h, w] into `out` [B, 3, F, H, W] and return it."""
        z = self.post_quant_conv(z)
        cache = FeatureCache()
        frames = [1, *(self.config.scale_factor_temporal,) * (z.shape[2] - 1)]
        for latent, finished in zip(torch.split(z, 1, dim=2), torch.split(out, frames, dim=2), strict=True):
            self.decoder(latent, cache, finished)
            cache.is_first_chunk = False
        return out


def _frames_per_part(video: Tensor) -> int:
    """How many frames of `video` [B, 3, F, H, W] may be in the layers of full size at once."""
    return max(1, _PART_PIXELS // (video.shape[0] * video.shape[3] * video.shape[4]))
