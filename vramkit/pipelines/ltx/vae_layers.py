"""Layers of the LTX-Video autoencoder.

Norms look at one position at a time, so everything between two convolutions is done where the second one reads it: a
convolution takes a few frames, prepares them (norm, modulation, SiLU) in a window, and hands the result over to be
written, added or spread into a larger clip. A residual block adds to the clip that it is given, its two convolutions taking
turns. So beside the clip nothing of its size is alive. In stripes of rows that clip is one of the stripe.

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.pipelines.ltx.vae_convolution import Rates, VideoConv3d, frames_with_ends, put
from vramkit.pipelines.networks.layers import TimestepEmbedding, sinusoidal_embedding
from vramkit.pipelines.networks.layout import new_frames
from vramkit.pipelines.networks.stripes import Rows, Stripe

__all__ = [
    "DownBlock",
    "Modulation",
    "ResidualBlocks",
    "TimeEmbedder",
    "UpBlock",
    "normalize",
    "patchify",
    "unpatchify",
]

# Scale and shift of a norm, each [B, C, 1, 1, 1]; the norm is multiplied by 1 + scale.
Modulation: TypeAlias = tuple[Tensor, Tensor]


def normalize(x: Tensor, out: Tensor, modulation: Modulation | None = None) -> None:
    """Write silu of `x` [B, C, ...], normed to a root mean square of one over its channels, to `out`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    torch.mul(x, length.square_().div_(x.shape[1]).add_(1e-8).rsqrt_(), out=out)
    if modulation is not None:
        scale, shift = modulation
        out.mul_(1 + scale).add_(shift)
    F.silu(out, inplace=True)


def depth_to_space(x: Tensor, rates: Rates) -> Tensor:
    """[B, C rf rh rw, F, H, W] -> [B, C, rf F, rh H, rw W]."""
    sizes = [size * rate for size, rate in zip(x.shape[2:], rates, strict=True)]
    out = new_frames(x, x.shape[0], x.shape[1] // math.prod(rates), *sizes)
    _cut(out, rates).copy_(torch.unflatten(x, 1, (-1, *rates)))
    return out


def space_to_depth(x: Tensor, rates: Rates) -> Tensor:
    """[B, C, rf F, rh H, rw W] -> [B, C rf rh rw, F, H, W]."""
    sizes = [size // rate for size, rate in zip(x.shape[2:], rates, strict=True)]
    out = new_frames(x, x.shape[0], x.shape[1] * math.prod(rates), *sizes)
    torch.unflatten(out, 1, (-1, *rates)).copy_(_cut(x, rates))
    return out


def _cut(x: Tensor, rates: Rates) -> Tensor:
    """A view [B, C, rf, rh, rw, F, H, W] of [B, C, rf F, rh H, rw W]."""
    for dim, rate in zip((4, 3, 2), reversed(rates), strict=True):  # from the last, which leaves the others in place
        x = torch.unflatten(x, dim, (-1, rate))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6)


def patchify(video: Tensor, size: int) -> Tensor:
    """[B, C, F, H, W] -> [B, C size size, F, H / size, W / size]; columns of a patch before its rows."""
    cut = _cut(video, (1, size, size))[:, :, 0]  # [B, C, rh, rw, F, H, W]
    patches = new_frames(video, video.shape[0], video.shape[1] * size**2, *cut.shape[4:])
    torch.unflatten(patches, 1, (-1, size, size)).copy_(cut.transpose(2, 3))
    return patches


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """[B, C size size, F, H, W] -> [B, C, F, size H, size W]."""
    cut = torch.unflatten(patches, 1, (-1, size, size)).permute(0, 1, 4, 5, 3, 6, 2)  # [B, C, F, H, rh, W, rw]
    return cut.flatten(5, 6).flatten(3, 4)


class _ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of [B, C, F, H, W], written where it is needed."""

    def forward(self, x: Tensor, out: Tensor) -> None:  # type: ignore[override]
        out.copy_(super().forward(x.movedim(1, -1)).movedim(-1, 1))


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and SiLU, and a shortcut; modulated by a timestep and given noise if asked to.

    The second convolution follows the first at a distance of as many frames as the first looks back: what is between them
    is never as long as the clip, and the clip is overwritten where no one looks at it any more.
    """

    offload_unit: ClassVar[bool] = True  # its convolutions take turns

    def __init__(
        self, in_channels: int, out_channels: int, *, causal: bool, eps: float, noise: bool = False, timed: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = VideoConv3d(in_channels, out_channels, causal=causal)
        self.conv2 = VideoConv3d(out_channels, out_channels, causal=causal)
        changes = in_channels != out_channels
        self.norm3 = _ChannelNorm(in_channels, eps=eps) if changes else None
        self.conv_shortcut = VideoConv3d(in_channels, out_channels, causal=causal, kernel_size=1) if changes else None
        self.per_channel_scale1 = nn.Parameter(torch.zeros(in_channels, 1, 1)) if noise else None
        self.per_channel_scale2 = nn.Parameter(torch.zeros(in_channels, 1, 1)) if noise else None
        table = nn.Parameter(torch.randn(4, in_channels) / in_channels**0.5) if timed else None
        self.scale_shift_table = table

    def forward(self, x: Tensor, stripe: Stripe, time: Tensor | None = None) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F, H', W], which is `x` itself, overwritten, where the channels stay.

        `time` [B, 4 C] holds two shifts and scales, each shift first. The last stripe of a picture gives more rows than `x`
        has, and so a new tensor.
        """
        before1, before2 = (partial(normalize, modulation=m) for m in self._modulations(time))
        rows = stripe.rows(self.conv1, x)
        height = stripe.given_by(2, x.shape[3])
        noise1 = self._noise(x, self.per_channel_scale1, stripe, self.conv1, self.conv1.height(rows))
        noise2 = self._noise(x, self.per_channel_scale2, stripe, self.conv2, height)
        out, holds_shortcut = self._begun(rows, stripe, height)
        behind = self.conv1.frames_before  # the second convolution looks as far back, and ahead no further
        done = 0  # frames that are finished
        between: Tensor | None = None  # the last frames of the first convolution
        for part in self.conv1.parts(rows):
            new = stripe.rows(self.conv2, _plus(self.conv1.part(rows, part, prepare=before1), noise1))
            between = new.joined() if between is None else torch.cat((between, new.joined()), dim=2)
            start = part.stop - between.shape[2]
            stop = max(done, part.stop if part.stop == x.shape[2] else part.stop - behind)
            if stop > done:
                new = replace(new, new=between, above=None)
                y = _plus(self.conv2.part(new, slice(done - start, stop - start), prepare=before2), noise2)
                if not holds_shortcut:
                    for place, piece in rows.pieces(rows.lost, height):
                        y[..., place, :].add_(piece[:, :, done:stop])
                _ = out[:, :, done:stop].add_(y) if holds_shortcut else out[:, :, done:stop].copy_(y)
                del y
            del new
            done = stop
            between = between[:, :, max(0, done - behind - start) :].clone()
        return out

    def _begun(self, rows: Rows, stripe: Stripe, height: int) -> tuple[Tensor, bool]:
        """Memory for a result of so many rows, and whether it is the shortcut already."""
        x, kept = rows.new, slice(rows.lost, rows.lost + height)
        if self.conv_shortcut is not None:
            out = new_frames(x, x.shape[0], self.conv2.conv.out_channels, x.shape[2], height, x.shape[4])
            for place, piece in rows.pieces(rows.lost, height):
                self.conv_shortcut(piece, partial(put, out[..., place, :]), prepare=self.norm3)
            return out, True
        if stripe.is_last and not stripe.is_whole:
            return rows.joined()[..., kept, :], True
        return x[..., kept, :], stripe.is_first

    def _modulations(self, time: Tensor | None) -> tuple[Modulation | None, Modulation | None]:
        if self.scale_shift_table is None or time is None:
            return None, None
        table = torch.unflatten(time, 1, (4, -1)) + self.scale_shift_table
        shift1, scale1, shift2, scale2 = table[..., None, None, None].unbind(1)  # [B, C, 1, 1, 1] each
        return (scale1, shift1), (scale2, shift2)

    def _noise(self, x: Tensor, scale: Tensor | None, stripe: Stripe, layer: nn.Module, rows: int) -> Tensor | None:
        """The next `rows` of a noisy picture [C, 1, H, W] for all frames.

        It comes from the device's own generator, as in the published decoder, and all of it at once.
        """
        if scale is None:
            return None
        size = stripe.height_of_picture(x), x.shape[4]
        noise = stripe.picture(layer, lambda: torch.randn(size, device=x.device, dtype=x.dtype), rows)
        return (noise * scale)[:, None]


def _plus(y: Tensor, noise: Tensor | None) -> Tensor:
    return y if noise is None else y.add_(noise)


class TimeEmbedder(nn.Module):
    """A timestep to what modulates norms; its own module because checkpoints name `time_embedder.timestep_embedder`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, channels)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> [B, channels]; the features are rounded to `dtype`, in which the clip is computed."""
        out: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep, 256).to(dtype))
        return out


class ResidualBlocks(nn.Module):
    """Residual blocks that keep the channels, with one embedding of the timestep for all of them.

    A block takes its input out of the list that it is given: a caller that kept it would keep it alive while the block makes
    a clip of another size of it.
    """

    def __init__(
        self, channels: int, count: int, *, causal: bool, eps: float, noise: bool = False, timed: bool = False
    ) -> None:
        super().__init__()
        self.time_embedder = TimeEmbedder(4 * channels) if timed else None
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, causal=causal, eps=eps, noise=noise, timed=timed) for _ in range(count)
        )

    def forward(self, clip: list[Tensor], stripe: Stripe, timestep: Tensor | None = None) -> Tensor:
        """Update [B, C, F, H, W], taken out of `clip`, in place and return it; `timestep` [B]."""
        return self._refine(clip.pop(), stripe, timestep)

    def _refine(self, x: Tensor, stripe: Stripe, timestep: Tensor | None) -> Tensor:
        embedded = None
        if self.time_embedder is not None and timestep is not None:
            embedded = self.time_embedder(timestep, x.dtype)
        for resnet in self.resnets:
            x = resnet(x, stripe, embedded)
        return x


class _Downsampler(nn.Module):
    """A convolution whose result is folded into channels, added to the means of the folded input."""

    def __init__(self, in_channels: int, out_channels: int, *, rates: Rates, causal: bool) -> None:
        super().__init__()
        self.rates = rates
        self.out_channels = out_channels
        self.conv = VideoConv3d(in_channels, out_channels // math.prod(rates), causal=causal)

    def forward(self, x: Tensor, stripe: Stripe) -> Tensor:
        """[B, C, F, H, W] -> [B, C', (F - 1) / rate + 1, H / rate, W / rate]; the first frame stands for `rate` frames."""
        rate = self.rates[0]
        lead = rate - 1
        rows = stripe.rows(self.conv, x, multiple=self.rates[1])
        height = self.conv.height(rows)
        sizes = (size // by for size, by in zip((x.shape[2] + lead, height, x.shape[4]), self.rates, strict=True))
        out = new_frames(x, x.shape[0], self.out_channels, *sizes)
        without_zeros = replace(rows, top=0, bottom=0)

        def store(part: slice, y: Tensor) -> None:
            added = frames_with_ends(without_zeros, part.start - lead, part.stop - lead)
            folded = space_to_depth(added[..., rows.middle : rows.middle + height, :], self.rates)
            means = torch.unflatten(folded, 1, (self.out_channels, -1)).mean(dim=2)
            torch.add(space_to_depth(y, self.rates), means, out=out[:, :, part.start // rate : part.stop // rate])

        self.conv(rows, store, lead=lead, multiple=rate)
        return out


class DownBlock(ResidualBlocks):
    """Residual blocks, then a change of size and, in one of two ways, of the channels.

    Args:
        in_channels: channels of the residual blocks.
        out_channels: channels of the result.
        count: residual blocks.
        rates: by how much frames, rows and columns shrink; all one for not at all.
        folded: whether the downsampling folds positions into channels, and so makes `out_channels` itself. Otherwise it is a
            strided convolution, behind which a residual block changes the channels.
        causal: whether frames see earlier ones only.
        eps: of the shortcut's norm.
    """

    def __init__(
        self, in_channels: int, out_channels: int, count: int, *, rates: Rates, folded: bool, causal: bool, eps: float
    ) -> None:
        super().__init__(in_channels, count, causal=causal, eps=eps)
        layer: nn.Module | None = None
        if folded:
            layer = _Downsampler(in_channels, out_channels, rates=rates, causal=causal)
        elif max(rates) > 1:
            layer = VideoConv3d(in_channels, in_channels, causal=causal, stride=rates)
        self.downsamplers = None if layer is None else nn.ModuleList([layer])
        self.shrink = rates[1]  # rows of the input for each of the result
        changes = not folded and in_channels != out_channels
        self.conv_out = ResidualBlock(in_channels, out_channels, causal=causal, eps=eps) if changes else None

    def forward(self, clip: list[Tensor], stripe: Stripe, timestep: Tensor | None = None) -> Tensor:
        """[B, C, F, H, W], taken out of `clip` and overwritten -> [B, C', F', H', W']."""
        x = self._refine(clip.pop(), stripe, timestep)
        for layer in self.downsamplers or ():
            folds = isinstance(layer, _Downsampler)
            x = layer(x, stripe) if folds else layer(stripe.rows(layer, x, stride=self.shrink))
        return x if self.conv_out is None else self.conv_out(x, stripe)

    def lag_behind(self, lag: int) -> int:
        """By how many rows the result of a stripe is behind what it takes, if its input is by `lag`."""
        lag += 2 * len(self.resnets)
        for layer in self.downsamplers or ():
            seen = lag + 1 if isinstance(layer, _Downsampler) else lag  # the strided kernel sees both rows of a pair
            lag = -(-seen // self.shrink)
        return lag if self.conv_out is None else lag + 2


class _Upsampler(nn.Module):
    """A convolution whose channels are unfolded into positions, if asked for added to the unfolded input."""

    def __init__(self, in_channels: int, *, factor: int, residual: bool, causal: bool) -> None:
        super().__init__()
        self.rates: Rates = (2, 2, 2)
        self.residual = residual
        self.out_channels = in_channels // factor
        self.conv = VideoConv3d(in_channels, in_channels * math.prod(self.rates) // factor, causal=causal)

    def forward(self, x: Tensor, stripe: Stripe) -> Tensor:
        """[B, C, F, H, W] -> [B, C / factor, 2 F - 1, 2 H, 2 W]; the first of two first frames is left out."""
        rate = self.rates[0]
        rows = stripe.rows(self.conv, x)
        height = self.conv.height(rows)
        sizes = [size * by for size, by in zip((x.shape[2], height, x.shape[4]), self.rates, strict=True)]
        out = new_frames(x, x.shape[0], self.out_channels, sizes[0] - (rate - 1), *sizes[1:])

        def store(part: slice, y: Tensor) -> None:
            frames = depth_to_space(y, self.rates)
            for place, piece in rows.pieces(rows.middle, height) if self.residual else ():
                added = depth_to_space(piece[:, :, part], self.rates)  # repeated to as many channels as there are
                by_row = slice(place.start * self.rates[1], place.stop * self.rates[1])
                torch.unflatten(frames[..., by_row, :], 1, (-1, added.shape[1])).add_(added[:, None])
            start = part.start * rate - (rate - 1)
            missing = max(0, -start)
            out[:, :, start + missing : start + frames.shape[2]] = frames[:, :, missing:]

        self.conv(rows, store)
        return out


class UpBlock(ResidualBlocks):
    """A change of the channels where they change, an upsampling if asked for, and residual blocks.

    Args:
        in_channels: channels of the input, `factor` times as many where the block enlarges.
        out_channels: channels of the residual blocks.
        count: residual blocks.
        enlarges: whether frames, rows and columns become twice as many.
        factor: by how much the upsampling makes the channels fewer.
        residual: whether the upsampling adds its input.
        causal: whether frames see earlier ones only.
        eps: of the shortcut's norm.
        noise: whether the residual blocks add noise.
        timed: whether they are modulated by a timestep.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        *,
        enlarges: bool,
        factor: int,
        residual: bool,
        causal: bool,
        eps: float,
        noise: bool,
        timed: bool,
    ) -> None:
        super().__init__(out_channels, count, causal=causal, eps=eps, noise=noise, timed=timed)
        changes = in_channels != out_channels
        self.conv_in = ResidualBlock(in_channels, out_channels, causal=causal, eps=eps) if changes else None
        layer = _Upsampler(out_channels * factor, factor=factor, residual=residual, causal=causal) if enlarges else None
        self.upsamplers = None if layer is None else nn.ModuleList([layer])

    def forward(self, clip: list[Tensor], stripe: Stripe, timestep: Tensor | None = None) -> Tensor:
        """[B, C, F, H, W], taken out of `clip` and overwritten -> [B, C', F', H', W']."""
        x = clip.pop()
        if self.conv_in is not None:
            x = self.conv_in(x, stripe)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, stripe)
        return self._refine(x, stripe, timestep)

    def lag_behind(self, lag: int) -> int:
        """By how many rows the result of a stripe is behind what it takes, if its input is by `lag`."""
        lag = lag if self.conv_in is None else lag + 2
        lag = lag if self.upsamplers is None else 2 * (lag + 1)
        return lag + 2 * len(self.resnets)
