"""Layers of the HunyuanVideo autoencoder: causal in time, with edges repeated where a kernel reaches beyond them.

A group norm needs a whole tile at once, a convolution does not. So a norm is reduced to a scale and a shift for each
channel, and a convolution makes its own input a few frames at a time: scaled, shifted and activated, or enlarged, and
with its borders, written where the convolution reads it. Beside the input and the result of a layer nothing of their
size is alive; the second convolution of a residual block writes over its own input, from the last frame to the first.

Shapes: B batch, C channels, F frames, H rows, W columns, G groups of channels, N = F H W positions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.pipelines.networks.layers import token_chunks
from vramkit.pipelines.networks.workspace import compact, halves

__all__ = ["CausalConv3d", "DownBlock", "GroupNorm", "MidBlock", "UpBlock"]

# Pixels in a convolution at once: two frames of a 256 x 256 tile, one of anything larger.
_PART_PIXELS = 2 * 256 * 256

# What a group norm comes to: scale and shift [B, C, 1, 1, 1], at least fp32.
Affine: TypeAlias = tuple[Tensor, Tensor]
# By how much frames, rows and columns become more or fewer.
Rates: TypeAlias = tuple[int, int, int]


class GroupNorm(nn.GroupNorm):
    """The moments of [B, C, F, H, W] over groups of channels and all positions, as a scale and a shift."""

    def forward(self, x: Tensor) -> Affine:  # type: ignore[override]
        """Scale and shift that normalize `x`: norm(x) = x * scale + shift. Frames are widened one at a time."""
        wide = torch.promote_types(x.dtype, torch.float32)
        frames = torch.unflatten(x, 1, (self.num_groups, -1)).unbind(3)  # each [B, G, C / G, H, W]
        moments = [torch.var_mean(frame.to(wide), dim=(2, 3, 4), correction=0) for frame in frames]
        variances, means = (torch.stack(values) for values in zip(*moments, strict=True))  # [F, B, G] each
        variance = variances.mean(0) + means.var(0, correction=0)
        scale = self.weight.view(self.num_groups, -1) * torch.rsqrt(variance + self.eps)[..., None]  # [B, G, C / G]
        shift = self.bias.view(self.num_groups, -1) - means.mean(0)[..., None] * scale
        return scale.flatten(1)[..., None, None, None], shift.flatten(1)[..., None, None, None]


class CausalConv3d(nn.Module):
    """A convolution over [B, C, F, H, W] that sees no later frames; what lies outside repeats the nearest edge."""

    offload_unit: ClassVar[bool] = True  # runs its weight once for each part of the frames

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: Rates = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride)
        self.kernel_size = kernel_size

    def forward(
        self,
        x: Tensor,
        *,
        affine: Affine | None = None,
        rates: Rates = (1, 1, 1),
        out: Tensor | None = None,
        accumulate: bool = False,
        on_read: Callable[[slice], object] | None = None,
    ) -> Tensor:
        """Convolve `x` [B, C, F, H, W], a few frames at a time, from the last to the first.

        Args:
            x: the input.
            affine: with it, silu(x * scale + shift) takes the place of `x`.
            rates: how often frames, rows and columns are repeated before; the first frame is not repeated in time.
            out: where the result goes, a new tensor without it; may be `x` itself where the sizes are the same.
            accumulate: add to `out`.
            on_read: told which frames of the result come next, when what they are made of has been read.

        Returns:
            `out` [B, C', F', H', W'].
        """
        enlarged = (rates[0] * (x.shape[2] - 1) + 1, rates[1] * x.shape[3], rates[2] * x.shape[4])
        if out is None:
            sizes = ((size - 1) // step + 1 for size, step in zip(enlarged, self.conv.stride, strict=True))
            out = x.new_empty(x.shape[0], self.conv.out_channels, *sizes)
        step = self.conv.stride[0]
        pixels = x.shape[0] * step * enlarged[1] * enlarged[2]  # for each frame of the result
        for part in reversed(token_chunks(out.shape[2], max(1, _PART_PIXELS // pixels))):
            first, last = part.start * step - (self.kernel_size - 1), (part.stop - 1) * step
            window = self._window(x, range(first, last + 1), affine, rates)
            if on_read is not None:
                on_read(part)
            y = self.conv(window)
            del window
            out[:, :, part].add_(y) if accumulate else out[:, :, part].copy_(y)
            del y  # before the next window is made
        return out

    def _window(self, x: Tensor, frames: range, affine: Affine | None, rates: Rates) -> Tensor:
        """`frames` of the enlarged `x` with their borders; those before the first one repeat it."""
        border = self.kernel_size // 2
        missing = max(0, -frames.start)
        taken = _repeat_frames(x, frames.start + missing, frames.stop, rates[0])
        batch, channels, count, height, width = taken.shape
        sizes = (missing + count, rates[1] * height + 2 * border, rates[2] * width + 2 * border)
        window = x.new_empty(batch, channels, *sizes)
        inner = window[:, :, missing:, border : sizes[1] - border, border : sizes[2] - border]
        if affine is not None:
            F.silu(torch.addcmul(affine[1], taken, affine[0], out=inner), inplace=True)
        else:
            places = torch.unflatten(torch.unflatten(inner, -1, (width, rates[2])), -3, (height, rates[1]))
            places.copy_(taken[..., :, None, :, None])  # [B, C, F, H, rate, W, rate]
        if border:
            _repeat_edges(window[:, :, missing:], border)
        window[:, :, :missing] = window[:, :, missing : missing + 1]
        return window


def _repeat_frames(x: Tensor, start: int, stop: int, rate: int) -> Tensor:
    """Frames `start` to `stop` of `x` [B, C, F, H, W] after each but the first was repeated `rate` times."""
    if rate == 1:
        return x[:, :, start:stop]
    start, stop = start + rate - 1, stop + rate - 1  # as if the first had been repeated too
    taken = x[:, :, start // rate : (stop - 1) // rate + 1].repeat_interleave(rate, dim=2)
    return taken.narrow(2, start % rate, stop - start)


def _repeat_edges(window: Tensor, border: int) -> None:
    """Fill the outer rows and columns of `window` [..., H, W] with those inside of them."""
    height, width = window.shape[-2:]
    window[..., :border, :] = window[..., border : border + 1, :]
    window[..., height - border :, :] = window[..., height - border - 1 : height - border, :]
    window[..., :border] = window[..., border : border + 1]
    window[..., width - border :] = window[..., width - border - 1 : width - border]


class ResidualBlock(nn.Module):
    """Two causal convolutions, each behind a norm and SiLU, and a shortcut."""

    offload_unit: ClassVar[bool] = True  # the shortcut takes turns with the first convolution

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, spare: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, C, F, H, W], which is overwritten -> [B, C', F, H, W], and memory of that size that is free now, or None.

        `spare` is such memory, for the result.
        """
        affine, parts = self.norm1(x), None
        if self.conv_shortcut is None:
            h = self.conv1(x, affine=affine, out=spare)
        elif (parts := halves(x, self.conv1.conv.out_channels)) is not None:
            shortcut = self.conv_shortcut  # of one frame and pixel, so frames may be given to it singly
            h = self.conv1(
                x,
                affine=affine,
                out=parts[0],
                on_read=lambda part: parts[1][:, :, part].copy_(shortcut(x[:, :, part])),
            )
        else:
            h = self.conv1(x, affine=affine)
        h = self.conv2(h, affine=self.norm2(h), out=h)
        if self.conv_shortcut is None:
            return h.add_(x), x
        if parts is None:
            return self.conv_shortcut(x, out=h, accumulate=True), None
        return h.add_(parts[1]), parts[1]


class AttentionBlock(nn.Module):
    """Self-attention with one head over the positions of a clip; a frame sees itself and those before it."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Update `x` [B, C, F, H, W] in place and return it; no mask, each frame is given the keys that it sees."""
        frames, area = x.shape[2], x.shape[3] * x.shape[4]
        scale, shift = self.group_norm(x)
        normed = torch.addcmul(shift, x, scale).to(x.dtype).flatten(2).transpose(1, 2)  # [B, N, C]
        query, key, value = (layer(normed).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # [B, 1, N, C]
        del normed
        for frame in range(frames):
            seen, own = slice((frame + 1) * area), slice(frame * area, (frame + 1) * area)
            # A frame's queries are not needed again: they give their place to its result.
            query[:, :, own] = F.scaled_dot_product_attention(query[:, :, own], key[:, :, seen], value[:, :, seen])
        y = self.to_out[0](query.squeeze(1))  # [B, N, C]
        return x.add_(torch.unflatten(y.transpose(1, 2), 2, x.shape[2:]))


class MidBlock(nn.Module):
    """Two residual blocks, with attention between them unless the config leaves it out."""

    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups=groups)] if attention else [])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups=groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W], which is overwritten -> the same."""
        x, spare = self.resnets[0](x)
        for attention in self.attentions:
            spare = None  # attention needs more
            x = attention(x)
        result: Tensor = self.resnets[1](x, spare)[0]
        return result


class _Resample(nn.Module):
    """The convolution that changes the size of a clip; its own module because checkpoints name it so."""

    def __init__(self, channels: int, *, stride: Rates = (1, 1, 1), rates: Rates = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)
        self.rates = rates

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x, rates=self.rates)
        return y


class _Block(nn.Module):
    """Residual blocks of one level.

    A block takes its input out of the list that it is given: a caller that kept it would keep it alive through all layers
    of the block.
    """

    def __init__(self, in_channels: int, out_channels: int, *, resnets: int, groups: int) -> None:
        super().__init__()
        channels = (in_channels, *(out_channels,) * resnets)
        self.resnets = nn.ModuleList(ResidualBlock(a, b, groups=groups) for a, b in pairwise(channels))

    def _run(self, clip: list[Tensor], resample: nn.ModuleList | None) -> Tensor:
        x, spare = clip.pop(), None
        for resnet in self.resnets:
            x, spare = resnet(x, spare)
        for layer in resample or ():
            spare = None
            x = compact(x)
            x = layer(x)
        return x


class DownBlock(_Block):
    """Residual blocks and, unless `rates` are all one, a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, resnets: int, groups: int, rates: Rates) -> None:
        super().__init__(in_channels, out_channels, resnets=resnets, groups=groups)
        self.downsamplers = nn.ModuleList([_Resample(out_channels, stride=rates)]) if max(rates) > 1 else None

    def forward(self, clip: list[Tensor]) -> Tensor:
        """[B, C, F, H, W], taken out of `clip` -> [B, C', 1 + (F - 1) // rate, 1 + (H - 1) // rate, 1 + (W - 1) // rate]."""
        return self._run(clip, self.downsamplers)


class UpBlock(_Block):
    """Residual blocks and, unless `rates` are all one, an enlargement with a convolution behind it."""

    def __init__(self, in_channels: int, out_channels: int, *, resnets: int, groups: int, rates: Rates) -> None:
        super().__init__(in_channels, out_channels, resnets=resnets, groups=groups)
        self.upsamplers = nn.ModuleList([_Resample(out_channels, rates=rates)]) if max(rates) > 1 else None

    def forward(self, clip: list[Tensor]) -> Tensor:
        """[B, C, F, H, W], taken out of `clip` -> [B, C', rate (F - 1) + 1, rate H, rate W]."""
        return self._run(clip, self.upsamplers)
