"""The Wan video autoencoders: 8 x 8 pixels and 4 frames per latent, 16 x 16 in that of Wan2.2 5B, causal in time.

Mirrors `AutoencoderKLWan` of diffusers in parameter names, config keys and numbers (checkpoints:
Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan2.2-TI2V-5B-Diffusers and their siblings, folder `vae`). Latent frames are decoded one
after the other and, from one block to the next, depth first: beside the two frames that each causal convolution needs again,
one frame of a large picture is alive at full size, and finished frames go straight into the result. In stripes of rows, with
`enable_striping`, the two frames of each convolution are those of a stripe: what sees whole pictures, the attention, is
computed at latent size for all frames, and each stripe goes from there through time.

Shapes: B batch, C channels, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.networks.autoencoder import DecoderOutput, EncoderOutput, LatentDistribution
from vramkit.pipelines.networks.layout import laid_out, new_frames
from vramkit.pipelines.networks.stripes import Stripe
from vramkit.pipelines.networks.tiling import Tiling, fill_by_rows, fill_by_tiles
from vramkit.pipelines.networks.video_autoencoder import VideoAutoencoder
from vramkit.pipelines.wan.vae_config import AutoencoderKLWanConfig
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
from vramkit.pipelines.wan.vae_residual import ResidualDownBlock, ResidualUpBlock, patched, unpatch

__all__ = ["AutoencoderKLWan", "AutoencoderKLWanConfig"]

# Pixels of video in the layers of full size at once: two frames of a 256 x 256 tile, one of anything larger.
_PART_PIXELS = 2 * 256 * 256


class Encoder(nn.Module):
    """Frames [B, 3, F, H, W] -> parameters of the latents [B, 2 Z, T, h, w], one chunk of frames at a time."""

    def __init__(self, config: AutoencoderKLWanConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        layers: list[nn.Module] = []
        for level, (width_in, width) in enumerate(pairwise(widths)):
            if config.is_residual:
                downsample = None
                if level < len(config.temperal_downsample):
                    downsample = Downsample(width, temporal=config.temperal_downsample[level])
                layers.append(ResidualDownBlock(width_in, width, resnets=config.num_res_blocks, downsample=downsample))
                continue
            layers += [ResidualBlock(width if i else width_in, width) for i in range(config.num_res_blocks)]
            if level < len(config.temperal_downsample):
                layers.append(Downsample(width, temporal=config.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)
        # The layers before the first change of frame rate take any number of frames, so they take few.
        temporal = (i for i, layer in enumerate(layers) if any(part is not None for part in _rate_changes(layer)))
        self._any_count = next(temporal, len(layers))
        # The layers behind the last change of size see whole pictures.
        self._small = 1 + max((i for i, layer in enumerate(layers) if _rate_changes(layer)), default=-1)

    @property
    def lag(self) -> int:
        """By how many latent rows the result of a stripe is behind what the stripe takes."""
        lag = self.conv_in.kernel_size[1] // 2
        for layer in self.down_blocks[: self._small]:
            lag = (lag + 2) // 2 if isinstance(layer, Downsample) else lag + 2
        return lag

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Encode the next chunk: one frame at first, as many as there are to a latent frame after that."""
        return self.finish(self.shrink(x, cache), cache)

    def shrink(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """The next chunk, or one stripe of it, in latent size: [B, C, 1, h, w]."""
        parts = torch.split(x, _frames_per_part(x), dim=2)
        x = torch.cat([self._shrink_part(part, cache) for part in parts], dim=2)
        for layer in self.down_blocks[self._any_count : self._small]:
            x = layer(x, cache)
        return x

    def finish(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, 1, h, w] -> [B, 2 Z, 1, h, w]."""
        for layer in (*self.down_blocks[self._small :], self.mid_block):
            x = layer(x, cache)
        x = cache.window(self.conv_out, x, self.norm_out)
        parameters: Tensor = self.conv_out(x, cache)
        return parameters

    def _shrink_part(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = cache.window(self.conv_in, x)
        for layer in (self.conv_in, *self.down_blocks[: min(self._any_count, self._small)]):
            x = layer(x, cache)
        return x


def _rate_changes(layer: nn.Module) -> list[nn.Module | None]:
    """The convolutions in time of the downsamplings in a layer."""
    return [part.time_conv for part in layer.modules() if isinstance(part, Downsample)]


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
        width_in = widths[0]
        for level, width in enumerate(widths):
            width_out = width if config.is_residual else width // 2  # an upsampling halves the channels
            upsample = Upsample(width, width_out, temporal=temporal[level]) if level < len(temporal) else None
            kind = ResidualUpBlock if config.is_residual else UpBlock
            blocks.append(kind(width_in, width, resnets=config.num_res_blocks + 1, upsample=upsample))
            width_in = width_out
        self.up_blocks: Any = nn.ModuleList(blocks)
        self.norm_out = RMSNorm(widths[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    @property
    def lag(self) -> int:
        """By how many rows of the result a stripe of it is behind the latent rows that the stripe takes."""
        lag: int = 0
        for level, block in enumerate(self.up_blocks):
            lag += 2 * len(block.resnets) if level else 0  # before the first enlargement pictures are whole
            lag = lag if block.upsamplers is None else 2 * lag + 1
        return lag + self.conv_out.kernel_size[1] // 2

    def forward(self, z: Tensor, cache: FeatureCache, out: Tensor, *, is_begun: bool = False) -> Tensor:
        """Decode the next latent frame into `out`: one frame at first, several after that.

        Where `is_begun`, `z` is a stripe of what `begin` made of it with `refine`, and `out` the rows that it gives.
        """
        self._grow(z if is_begun else self.begin(z, cache), cache, out)
        return out

    def begin(self, z: Tensor, cache: FeatureCache, *, refine: bool = False) -> Tensor:
        """What sees whole pictures, [B, Z, 1, h, w] -> [B, C, 1, h, w]; with `refine` all before the first enlargement."""
        x = cache.window(self.conv_in, z)
        x = self.conv_in(x, cache)
        x = self.mid_block(x, cache)
        small: Tensor = self.up_blocks[0](x, cache, enlarge=False) if refine else x
        return small

    def _grow(self, x: Tensor, cache: FeatureCache, out: Tensor, level: int = 0) -> None:
        """Enlarge the next latent frame [B, C, 1, h, w] into `out`, a part of its frames to the end before the next.

        Of a stripe the rows that it gives, and what comes before the first enlargement was done.
        """
        if level == len(self.up_blocks):
            x = cache.window(self.conv_out, x, self.norm_out)
            y = self.conv_out(x, cache)
            out.copy_(y if y.device == out.device else y.clamp_(-1.0, 1.0))  # for the host would be slower at it
            return
        rate = out.shape[2] // x.shape[2]  # finished frames per frame of x
        count = _frames_per_part(out, rate=rate)
        parts = zip(torch.split(x, count, dim=2), torch.split(out, count * rate, dim=2), strict=True)
        done = {} if level > 0 or cache.stripe.is_whole else {"refine": False}
        for part, finished in parts:
            self._grow(self.up_blocks[level](part, cache, **done), cache, finished, level + 1)


class AutoencoderKLWan(VideoAutoencoder):
    """The autoencoder of Wan2.1 or of Wan2.2 5B, for inference: nothing here records gradients.

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

    @property
    def stripeless(self) -> str | None:
        """Why not: rows of the shortcuts of 5B lag behind by other numbers than those of its layers."""
        if self.config.is_residual or self.config.patch > 1:
            return "has patches, and shortcuts around its changes of size (Wan2.2 5B)"
        return None

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
        self._refuse_striping()
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
            ConfigError: `x` has other dimensions or channels, or the autoencoder of 5B is given no multiples of 16 pixels.
        """
        self._check_input("x", x, self.config.in_channels // self.config.patch**2)
        ratio, rate = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        if self.config.is_residual and (x.shape[3] % ratio or x.shape[4] % ratio):
            raise ConfigError(f"x has {x.shape[3]} x {x.shape[4]} pixels; multiples of {ratio} were expected.")
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
        sizes = self.config.out_channels // self.config.patch**2, frames, height, width
        items = self._slices(z)
        clip = z.new_empty(()).expand(items[0].shape[0], *sizes)  # without its memory
        if self.tile_ranks is not None and self.has_stripes and not self._tiles_pictures(clip):
            sample = self._new_clip(z, *sizes)
            for item, out in zip(items, self._slices(sample), strict=True):
                fill_by_rows(out, ratio, partial(self._decode_rows, item, out), self.tile_ranks)
            return DecoderOutput(sample)
        if len(self._decoded_stripes(z, clip)) > 1:
            clips = [self._decode_stripes(item, self._decoded_stripes(item, clip), clip) for item in items]
            return DecoderOutput(clips[0] if len(clips) == 1 else torch.cat(clips))
        sample = self._new_clip(z, *sizes)
        for item, out in zip(items, self._slices(sample), strict=True):
            self._decode_item(item, out)
        return DecoderOutput(sample.clamp_(-1.0, 1.0))

    def _encode_item(self, x: Tensor, out: Tensor) -> None:
        """Encode `x` [B, 3, F, H, W] into `out` [B, 2 Z, T, h, w], in tiles or stripes where that is asked for."""
        if not self._tiles_pictures(x):
            height, width = out.shape[3:]
            count = self._stripe_count(x)
            parts = [] if count == 1 else list(Stripe().split(height, width, count, lag=self.encoder.lag))
            out.copy_(self._encode_stripes(x, parts, out) if len(parts) > 1 else self._encode_tile(x))
            return
        ratio, patch = self.config.scale_factor_spatial, self.config.patch

        def compute_tile(top: int, left: int) -> Tensor:
            rows = slice(top * ratio, top * ratio + self.tiling.height * patch)
            columns = slice(left * ratio, left * ratio + self.tiling.width * patch)
            return self._encode_tile(x[..., rows, columns])

        # The published one counts patches for pixels here.
        fill_by_tiles(out, self.tiling.scaled_down(ratio // patch), compute_tile, ranks=self.tile_ranks)

    def _encode_tile(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> [B, 2 Z, T, h, w]."""
        cache = FeatureCache()
        encoded = []
        for chunk in self._chunks(x):
            encoded.append(self.encoder(patched(chunk, self.config.patch), cache))
            cache.is_first_chunk = False
        parameters: Tensor = self.quant_conv(torch.cat(encoded, dim=2))
        return parameters

    def _encode_stripes(self, x: Tensor, parts: list[Stripe], out: Tensor) -> Tensor:
        """The same in stripes of the rows of `out`; the layers of latent size see whole frames."""
        ratio, small = self.config.scale_factor_spatial, None
        frames = [slice(frame, frame + 1) for frame in range(out.shape[2])]
        for stripe in parts:
            cache = FeatureCache(stripe)
            rows = slice(stripe.taken.start * ratio, None if stripe.is_last else stripe.taken.stop * ratio)
            place = stripe.give(stripe.given_by(self.encoder.lag, stripe.taken.stop - stripe.taken.start))
            for frame, chunk in zip(frames, self._chunks(x[..., rows, :]), strict=True):
                y = self.encoder.shrink(chunk, cache)
                cache.is_first_chunk = False
                if small is None:
                    small = new_frames(y, *y.shape[:2], *out.shape[2:])
                small[:, :, frame, place] = y
        assert small is not None
        cache = FeatureCache()
        encoded = [self.encoder.finish(small[:, :, frame], cache) for frame in frames]
        parameters: Tensor = self.quant_conv(torch.cat(encoded, dim=2))
        return parameters

    def _chunks(self, x: Tensor) -> list[Tensor]:
        """The first frame and each of the next four; a last chunk that is not complete is left out."""
        rate = self.config.scale_factor_temporal
        return [x[:, :, :1], *(x[:, :, end - rate : end] for end in range(1 + rate, x.shape[2] + 1, rate))]

    def _decode_item(self, z: Tensor, out: Tensor) -> None:
        """Decode `z` [B, Z, T, h, w] into `out` [B, 3, F, H, W], in tiles where that is asked for."""
        patch = self.config.patch
        if not self._tiles_pictures(out):
            self._decode_tile(z, out, patch)
            return
        latent, ratio = (
            self.tiling.scaled_down(self.config.scale_factor_spatial),
            self.config.scale_factor_spatial // patch,
        )

        def compute_tile(top: int, left: int) -> Tensor:
            rows = slice(top // ratio, top // ratio + latent.height)
            columns = slice(left // ratio, left // ratio + latent.width)
            tile = z[..., rows, columns]
            return self._decode_tile(tile, z.new_empty(*patches.shape[:3], *(ratio * size for size in tile.shape[-2:])))

        # Tiles are blended before their patches become pixels, as in the published one.
        patches = out
        if patch > 1:
            height, width = out.shape[3] // patch, out.shape[4] // patch
            patches = z.new_empty(z.shape[0], self.config.out_channels, out.shape[2], height, width)
        fill_by_tiles(patches, self.tiling.scaled_down(patch), compute_tile, ranks=self.tile_ranks)
        if patch > 1:
            unpatch(patches, out, patch)

    def _decode_tile(self, z: Tensor, out: Tensor, patch: int = 1) -> Tensor:
        """Decode `z` [B, Z, T, h, w] into `out` [B, 3, F, H, W] and return it; without `patch` it is given patches."""
        cache = FeatureCache()
        for latent, finished in self._latent_frames(self.post_quant_conv(laid_out(z)), out):
            if patch == 1:
                self.decoder(latent, cache, finished)
            else:
                height, width = finished.shape[3] // patch, finished.shape[4] // patch
                patches = z.new_empty(z.shape[0], self.config.out_channels, finished.shape[2], height, width)
                unpatch(self.decoder(latent, cache, patches), finished, patch)
            cache.is_first_chunk = False
        return out

    def _decoded_stripes(self, z: Tensor, clip: Tensor) -> list[Stripe]:
        """The stripes of the rows of `z` in which `clip` [B, 3, F, H, W] is made of it; one where it is not made so."""
        count = 1 if self._tiles_pictures(clip) else self._stripe_count(clip)
        if count == 1:
            return [Stripe()]
        lag = -(-self.decoder.lag // self.config.scale_factor_spatial)
        return list(Stripe().split(z.shape[3], z.shape[4], count, lag=lag))

    def _decode_rows(self, z: Tensor, clip: Tensor, part: slice, ranks: int) -> Tensor:
        """The rows of `clip` that rows `part` of `z` stand for, with the stripes of the clip dealt to so many ranks."""
        ratio, behind = self.config.scale_factor_spatial, self.decoder.lag
        count = -(-self._stripe_count(clip) // ranks)
        lag = -(-behind // ratio)
        spare = ratio, ratio * lag - behind
        parts = list(Stripe().split(z.shape[3], z.shape[4], count, lag=lag, part=part, spare=spare))
        first, last = parts[0], parts[-1]
        if first.is_whole:
            rows = self._decode_tile(z, self._new_clip(z, *clip.shape[1:])).clamp_(-1.0, 1.0)
            return rows[..., ratio * part.start : ratio * part.stop, :]
        # At an inner edge it begins, or ends, with the part; at one of the picture there may be a little more.
        begun = 0 if first.is_top else ratio * part.start
        ended = clip.shape[3] if last.is_bottom else ratio * part.stop
        rows = self._decode_stripes(z, parts, clip[..., begun:ended, :])
        return rows[..., ratio * part.start - begun : ratio * part.stop - begun, :]

    def _decode_stripes(self, z: Tensor, parts: list[Stripe], clip: Tensor) -> Tensor:
        """[B, Z, T, h, w] -> [B, 3, F, H, W] as `clip`, in stripes from where the pictures are first enlarged.

        Stripes to come and finished ones are tensors of their own: memory that the one is through with serves the other.
        """
        whole = None if self.output_device is None else self._new_clip(z, *clip.shape[1:])
        small, finished = self._begun_stripes(z, parts), []
        for stripe in parts:
            cache, x = FeatureCache(stripe), small.pop(0)
            rows = stripe.given_by(self.decoder.lag, self.config.scale_factor_spatial * x.shape[3]) - stripe.left_out
            out = (
                clip.new_empty(*clip.shape[:3], rows, clip.shape[4])
                if whole is None
                else whole[..., stripe.give(rows), :]
            )
            for latent, place in self._latent_frames(x, out):
                self.decoder(latent, cache, place, is_begun=True)
                cache.is_first_chunk = False
            finished.append(out.clamp_(-1.0, 1.0) if out.device == z.device else out)
        del cache, x
        return torch.cat(finished, dim=-2) if whole is None else whole

    def _begun_stripes(self, z: Tensor, parts: list[Stripe]) -> list[Tensor]:
        """What the layers that see whole pictures make of `z`, by stripes: [B, C, T, rows, w] each."""
        stripes: list[Tensor] = []
        cache = FeatureCache()
        for frame, latent in enumerate(torch.split(self.post_quant_conv(laid_out(z)), 1, dim=2)):
            y = self.decoder.begin(latent, cache, refine=True)
            rows = [y[..., stripe.taken, :] for stripe in parts]
            stripes = stripes or [new_frames(y, *y.shape[:2], z.shape[2], *each.shape[3:]) for each in rows]
            for stripe, each in zip(stripes, rows, strict=True):
                stripe[:, :, frame : frame + 1] = each
        return stripes

    def _latent_frames(self, z: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each latent frame and what it becomes: one frame, after the first four."""
        frames = [1, *(self.config.scale_factor_temporal,) * (z.shape[2] - 1)]
        return zip(torch.split(z, 1, dim=2), torch.split(out, frames, dim=2), strict=True)


def _frames_per_part(video: Tensor, *, rate: int = 1) -> int:
    """How many frames, of which `rate` of `video` [B, 3, F, H, W] are made each, may be in the layers of full size at once.

    As many in each part as in the others.
    """
    frames = video.shape[2] // rate
    most = max(1, _PART_PIXELS // (video.shape[0] * video.shape[3] * video.shape[4]) // rate)
    return -(-frames // -(-frames // most))
