"""The LTX-Video autoencoder: 32 x 32 pixels and 8 frames per latent of 128 channels.

Mirrors `AutoencoderKLLTXVideo` of diffusers in parameter names, config keys and numbers (checkpoint:
Lightricks/LTX-Video, folder `vae`, and its later versions 0.9.1 and 0.9.5, whose decoders take the last denoising step
and so are told a timestep; arXiv:2501.00103). Pictures are computed in tiles with `enable_tiling`, clips in tiles of frames
with `use_framewise_decoding`; a tile is blended into the result as soon as it is there. With `enable_striping`, pictures are
computed in stripes of rows where they are largest: from the last enlargement on, up to the first reduction.

Shapes: B batch, Z latent channels, F frames, T latent frames, H x W pixels, h x w latents.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.ltx.vae_config import AutoencoderKLLTXVideoConfig
from vramkit.pipelines.ltx.vae_convolution import VideoConv3d
from vramkit.pipelines.ltx.vae_layers import (
    DownBlock,
    Modulation,
    ResidualBlocks,
    TimeEmbedder,
    UpBlock,
    normalize,
    patchify,
    unpatchify,
)
from vramkit.pipelines.networks.autoencoder import DecoderOutput, EncoderOutput, LatentDistribution
from vramkit.pipelines.networks.layout import laid_out, new_frames
from vramkit.pipelines.networks.stripes import Stripe
from vramkit.pipelines.networks.tiling import Box, FrameTiling, Tiling, fill_by_rows, fill_clip, magnified, reduced
from vramkit.pipelines.networks.video_autoencoder import FramewiseAutoencoder

__all__ = ["AutoencoderKLLTXVideo"]


class Encoder(nn.Module):
    """Frames [B, 3, F, H, W] -> parameters of the latents [B, 2 Z, T, h, w]."""

    def __init__(self, config: AutoencoderKLLTXVideoConfig) -> None:
        super().__init__()
        widths, causal, eps = config.down_widths, config.encoder_causal, config.resnet_norm_eps
        self.patch_size = config.patch_size
        self.conv_in = VideoConv3d(config.in_channels * config.patch_size**2, widths[0], causal=causal)
        self.down_blocks: Any = nn.ModuleList(
            DownBlock(
                a,
                b,
                config.layers_per_block[index],
                rates=config.down_rates[index],
                folded=config.folds(index),
                causal=causal,
                eps=eps,
            )
            for index, (a, b) in enumerate(pairwise(widths))
        )
        self.mid_block = ResidualBlocks(widths[-1], config.layers_per_block[-1], causal=causal, eps=eps)
        self.conv_out = VideoConv3d(widths[-1], config.latent_channels + 1, causal=causal)

    @property
    def _large(self) -> int:
        """How many blocks see the pictures in full size or make them smaller first."""
        return 1 + next((i for i, block in enumerate(self.down_blocks) if block.shrink > 1), -1)

    def forward(self, x: Tensor, stripes: int = 1) -> Tensor:
        """Encode one tile, up to where pictures are first made smaller in so many stripes.

        One logarithm of the variance counts for all channels of a latent.
        """
        clip = [self._shrunk(x, stripes)]
        for block in (*self.down_blocks[self._large :], self.mid_block):
            clip.append(block(clip, Stripe()))  # each takes out what the one before put in
        y = self.conv_out(clip.pop(), prepare=normalize)  # [B, Z + 1, T, h, w]
        return torch.cat((y, y[:, -1:].expand(-1, y.shape[1] - 2, -1, -1, -1)), dim=1)

    def _shrunk(self, x: Tensor, stripes: int) -> Tensor:
        """[B, 3, F, H, W] -> [B, C, F', H', W'] behind the first block that makes pictures smaller."""
        blocks = self.down_blocks[: self._large]
        lag, ratio = 1, self.patch_size
        for block in blocks:
            lag, ratio = block.lag_behind(lag), ratio * block.shrink
        height, width = x.shape[3] // ratio, x.shape[4] // ratio
        result: Tensor | None = None
        for stripe in Stripe().split(height, width, stripes if blocks else 1, lag=lag, last=0.5):
            pixels = patchify(x[..., magnified(stripe.taken, ratio), :], self.patch_size)
            clip = [self.conv_in(stripe.rows(self.conv_in, pixels))]
            del pixels
            for block in blocks:
                clip.append(block(clip, stripe))
            y: Tensor = clip.pop()
            if stripe.is_whole:
                return y
            result = new_frames(y, *y.shape[:3], height, width) if result is None else result
            result[..., stripe.give(y.shape[3]), :] = y
        assert result is not None
        return result


class Decoder(nn.Module):
    """Latents [B, Z, T, h, w] -> frames [B, 3, F, H, W], told a timestep if the config asks for it."""

    def __init__(self, config: AutoencoderKLLTXVideoConfig) -> None:
        super().__init__()
        causal, eps, timed = config.decoder_causal, config.resnet_norm_eps, config.timestep_conditioning
        layers, noise = [*reversed(config.decoder_layers_per_block)], [*reversed(config.decoder_inject_noise)]
        width = config.decoder_block_out_channels[-1]
        self.patch_size = config.patch_size
        self.out_channels = config.out_channels
        self.conv_in = VideoConv3d(config.latent_channels, width, causal=causal)
        self.mid_block = ResidualBlocks(width, layers[0], causal=causal, eps=eps, noise=noise[0], timed=timed)
        self.up_blocks: Any = nn.ModuleList(
            UpBlock(
                a,
                b,
                layers[index + 1],
                enlarges=config.decoder_spatio_temporal_scaling[-1 - index],
                factor=config.upsample_factor[-1 - index],
                residual=config.upsample_residual[-1 - index],
                causal=causal,
                eps=eps,
                noise=noise[index + 1],
                timed=timed,
            )
            for index, (a, b) in enumerate(config.up_widths)
        )
        width = config.up_widths[-1][1]
        self.conv_out = VideoConv3d(width, config.out_channels * config.patch_size**2, causal=causal)
        self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0)) if timed else None
        self.time_embedder = TimeEmbedder(2 * width) if timed else None
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5) if timed else None

    @property
    def _large(self) -> int:
        """Which block makes the pictures as large as they become."""
        return max((i for i, block in enumerate(self.up_blocks) if block.upsamplers is not None), default=0)

    def forward(
        self, z: Tensor, timestep: Tensor | None, out: Tensor, stripes: int = 1, part: slice | None = None
    ) -> Tensor:
        """Decode one tile into `out`, in so many stripes from the last enlargement on; `timestep` [B] from 0 to 1.

        With `part` of the rows of `z`, `out` has the rows that these stand for.
        """
        if self.timestep_scale_multiplier is not None:
            assert timestep is not None
            timestep = timestep * self.timestep_scale_multiplier
        small: list[Tensor] = [self.conv_in(laid_out(z))]
        for block in (self.mid_block, *self.up_blocks[: self._large]):
            small.append(block(small, Stripe(), timestep))  # each takes out what the one before put in
        blocks, lag, modulation = self.up_blocks[self._large :], 0, self._modulation(timestep, z.dtype)
        for block in blocks:
            lag = block.lag_behind(lag)
        height, width = small[0].shape[3:]
        part, enlarged = part or slice(0, z.shape[3]), height // z.shape[3]
        kept = slice(part.start * enlarged, part.stop * enlarged)
        ratio = out.shape[3] // (kept.stop - kept.start)
        behind = (lag + 1) * self.patch_size
        begun = 0
        for stripe in Stripe().split(height, width, stripes, lag=-(-behind // ratio), last=0.5, part=kept):
            if stripe.is_first:
                begun = ratio * (stripe.taken.start - kept.start) + behind * (not stripe.is_top)
            clip = [(small.pop() if stripe.is_last else small[0])[..., stripe.taken, :]]
            for block in blocks:
                clip.append(block(clip, stripe, timestep))
            rows = stripe.rows(self.conv_out, clip.pop())
            given = stripe.give(self.patch_size * self.conv_out.height(rows))
            self.conv_out(
                rows,
                partial(self._put, out, begun + given.start),
                prepare=partial(normalize, modulation=modulation),
            )
            del rows  # before the next stripe is made
        return out

    def _put(self, out: Tensor, row: int, frames: slice, y: Tensor) -> None:
        """Put patches of frames into `out`, their first row at `row`; rows beyond `out` are left out."""
        pixels = unpatchify(y, self.patch_size)
        stop = min(row + pixels.shape[-2], out.shape[-2])
        out[:, :, frames, max(0, row) : stop] = pixels[..., max(0, -row) : stop - row, :]

    def _modulation(self, timestep: Tensor | None, dtype: torch.dtype) -> Modulation | None:
        if self.time_embedder is None or self.scale_shift_table is None or timestep is None:
            return None
        table = torch.unflatten(self.time_embedder(timestep, dtype), 1, (2, -1)) + self.scale_shift_table
        shift, scale = table[..., None, None, None].unbind(1)  # [B, C, 1, 1, 1] each
        return scale, shift


class AutoencoderKLLTXVideo(FramewiseAutoencoder):
    """The autoencoder of LTX-Video, for inference: nothing here records gradients.

    `use_framewise_decoding` (at first False) cuts clips longer than a tile of frames (16, 8 apart, and one more) into such
    tiles, encoding included as in the published class; `use_framewise_encoding` does so for encoding alone.
    """

    config: AutoencoderKLLTXVideoConfig
    config_class: ClassVar[type[AutoencoderKLLTXVideoConfig]] = AutoencoderKLLTXVideoConfig
    latents_mean: Tensor  # [Z], of the latents that the transformer sees
    latents_std: Tensor  # [Z]

    def __init__(self, config: AutoencoderKLLTXVideoConfig) -> None:
        super().__init__(
            config,
            Tiling(height=512, width=512, stride_height=448, stride_width=448),
            FrameTiling(frames=16, stride=8),
            pixels=config.spatial_ratio,
            frames=config.temporal_ratio,
            framewise=False,
        )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))

    @property
    def stripeless(self) -> None:
        """Nothing is in the way of stripes."""
        return

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Encode a clip [B, 3, F, H, W], values from -1 to 1, in the dtype of the weights.

        The first frame becomes the first latent frame, every eight after it one more. The result is a named tuple, so
        `.latent_dist` and `[0]` both work whatever `return_dict` says. Its distribution is over latents [B, Z, T, h, w] =
        [B, Z, 1 + (F - 1) / 8, H / 32, W / 32], not yet normalized with `latents_mean` and `latents_std`.

        Raises:
            ConfigError: `x` has other dimensions or channels, rows or columns that are no multiples of 32, or not 8 k + 1
                frames.
        """
        self._check_input("x", x, self.config.in_channels)
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        if x.shape[3] % ratio or x.shape[4] % ratio or (x.shape[2] - 1) % rate:
            raise ConfigError(
                f"x has {x.shape[2]} frames of {x.shape[3]} x {x.shape[4]} pixels; {rate} * k + 1 frames and multiples of "
                f"{ratio} pixels were expected."
            )
        frames, height, width = 1 + (x.shape[2] - 1) // rate, x.shape[3] // ratio, x.shape[4] // ratio
        parameters = x.new_empty(x.shape[0], 2 * self.config.latent_channels, frames, height, width)
        tiling = self.tiling.scaled_down(ratio) if self._tiles_pictures(x) else None
        in_time = self.use_framewise_encoding or self.use_framewise_decoding
        frame_tiling = self.frame_tiling.scaled_down(rate) if in_time and self._tiles_frames(x) else None
        for item, out in zip(self._slices(x), self._slices(parameters), strict=True):
            fill_clip(
                out, partial(self._encode_tile, item), tiling=tiling, frame_tiling=frame_tiling, ranks=self.tile_ranks
            )
        return EncoderOutput(LatentDistribution(parameters))

    @torch.no_grad()
    def decode(self, z: Tensor, temb: Tensor | None = None, return_dict: bool = True) -> DecoderOutput:
        """Decode latents [B, Z, T, h, w] in the dtype of the weights; any `latents_mean` and `latents_std` are undone.

        `temb` [B] is the timestep, from 0 to 1, up to which the latents are denoised; decoders without
        `timestep_conditioning` do not look at it. The result is a named tuple, so `.sample` and `[0]` both work whatever
        `return_dict` says. Its sample is [B, 3, 1 + 8 (T - 1), 32 h, 32 w], in the dtype of `z`, around -1 .. 1 and not
        clamped.

        Raises:
            ConfigError: `z` has other dimensions or channels, or the decoder needs a timestep that is not given.
        """
        self._check_input("z", z, self.config.latent_channels)
        timesteps = self._timesteps(z, temb)
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        frames, height, width = 1 + rate * (z.shape[2] - 1), z.shape[3] * ratio, z.shape[4] * ratio
        sample = self._new_clip(z, self.config.out_channels, frames, height, width)
        tiling = self.tiling if self._tiles_pictures(sample) else None
        frame_tiling = self.frame_tiling if self.use_framewise_decoding and self._tiles_frames(sample) else None
        for item, out, timestep in zip(self._slices(z), self._slices(sample), self._slices(timesteps), strict=True):
            told = None if temb is None else timestep
            if tiling is None and frame_tiling is None:
                if self.tile_ranks is None:
                    self._decode_into(out, item, told)
                else:
                    fill_by_rows(out, ratio, partial(self._decode_rows, item, told, out), self.tile_ranks)
                continue
            fill_clip(
                out,
                partial(self._decode_tile, item, told),
                tiling=tiling,
                frame_tiling=frame_tiling,
                kept_frames=slice(None, -1),  # of later tiles the last frame goes, as in the published decoder
                ranks=self.tile_ranks,
            )
        return DecoderOutput(sample)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        temb: Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput:
        """Encode a clip [B, 3, F, H, W] and decode the most likely latents, or with `sample_posterior` random ones."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, temb, return_dict)

    def _encode_tile(self, x: Tensor, box: Box) -> Tensor:
        """The latents of `box`, from the frames in `x` [B, 3, F, H, W] that they stand for."""
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        frames, rows, columns = box
        # n latent frames stand for rate * (n - 1) + 1 frames.
        stop = None if frames.stop is None else rate * (frames.stop - 1) + 1
        tile = x[:, :, rate * frames.start : stop, magnified(rows, ratio), magnified(columns, ratio)]
        parameters: Tensor = self.encoder(tile, self._stripe_count(tile))
        return parameters

    def _decode_tile(self, z: Tensor, timestep: Tensor | None, box: Box) -> Tensor:
        """The frames of `box`, from the latents in `z` [B, Z, T, h, w] that stand for them."""
        ratio, rate = self.spatial_compression_ratio, self.temporal_compression_ratio
        frames, rows, columns = box
        stop = None if frames.stop is None else (frames.stop - 1) // rate + 1
        tile = z[:, :, frames.start // rate : stop, reduced(rows, ratio), reduced(columns, ratio)]
        sizes = rate * (tile.shape[2] - 1) + 1, ratio * tile.shape[3], ratio * tile.shape[4]
        out = z.new_empty(z.shape[0], self.config.out_channels, *sizes, device=self.output_device)
        return self._decode_into(out, tile, timestep)

    def _decode_rows(self, z: Tensor, timestep: Tensor | None, clip: Tensor, part: slice, ranks: int) -> Tensor:
        """The rows of `clip` that rows `part` of `z` stand for, with the stripes of the clip dealt to so many ranks."""
        out = clip.new_empty(*clip.shape[:3], (part.stop - part.start) * self.spatial_compression_ratio, clip.shape[4])
        rows: Tensor = self.decoder(z, timestep, out, -(-self._stripe_count(clip) // ranks), part)
        return rows

    def _decode_into(self, out: Tensor, z: Tensor, timestep: Tensor | None) -> Tensor:
        """Decode `z` [B, Z, T, h, w] into `out` [B, 3, F, H, W] and return it, in stripes where that is asked for."""
        self.decoder(z, timestep, out, self._stripe_count(out))
        return out

    def _timesteps(self, z: Tensor, temb: Tensor | None) -> Tensor:
        """One timestep for each item of the batch, zeros where none is given and none is needed."""
        if temb is None:
            if self.config.timestep_conditioning:
                raise ConfigError("This decoder is told a timestep: pass temb, a tensor [batch] between 0 and 1.")
            return z.new_zeros(z.shape[0])
        if temb.numel() not in (1, z.shape[0]):
            raise ConfigError(f"temb has shape {list(temb.shape)}; one timestep was expected, or {z.shape[0]}.")
        return temb.flatten().expand(z.shape[0])

    def _tiles_frames(self, video: Tensor) -> bool:
        return self.frame_tiling.is_needed(video.shape[2])
