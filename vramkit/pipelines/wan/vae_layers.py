"""Layers of the Wan video autoencoder, for inference in chunks of frames and in little memory.

A clip passes through the layers a few frames at a time. What a causal convolution saw last is kept in a `FeatureCache`
that belongs to one pass and travels down the calls as an argument: modules hold no state, so a pass that is interrupted
leaves nothing behind and passes may run side by side. Borders are met in two places only: `FeatureCache.window` puts
earlier frames (or zeros) in front, in a stripe of a picture also the rows above, and the convolutions pad what is left.

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vramkit.pipelines.networks.layout import clip_of, new_frames, pictures
from vramkit.pipelines.networks.stripes import Rows, Stripe

__all__ = [
    "AttentionBlock",
    "CausalConv3d",
    "Downsample",
    "FeatureCache",
    "MidBlock",
    "RMSNorm",
    "ResidualBlock",
    "UpBlock",
    "Upsample",
]


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels, dimension 1, of [B, C, ...] with `spatial_dims` more dimensions."""

    def __init__(self, channels: int, *, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalize `x` into `out`, a new tensor where none is given; lengths are computed in at least float32."""
        out = torch.empty_like(x) if out is None else out
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)  # [B, 1, ...]
        torch.mul(x, length.clamp_(min=1e-12).reciprocal_().mul_(x.shape[1] ** 0.5), out=out)
        return out.mul_(self.gamma)


class CausalConv3d(nn.Conv3d):
    """A convolution over [B, C, F, H, W] that sees no later frames; rows and columns are padded to keep their number.

    It is given a window from `FeatureCache.window`: its `past_frames` last frames and the new ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.past_frames = kernel_size[0] - stride[0]

    def forward(self, window: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        """[B, C, past_frames + F, H, W] -> [B, C', F', H, W]; the end of the window is kept for the next chunk."""
        y: Tensor
        if cache.has_borders(self):  # the window has the rows above and below already
            y = F.conv3d(window, self.weight, self.bias, self.stride, (0, 0, self.kernel_size[2] // 2))
        else:
            y = super().forward(window)
        cache.keep(self, window)  # copied after it: until then the window alone holds these frames
        return y


class FeatureCache:
    """The last input frames of every causal convolution in one pass over a clip, or over one stripe of its pictures."""

    def __init__(self, stripe: Stripe | None = None) -> None:
        self.stripe = Stripe() if stripe is None else stripe
        self.is_first_chunk = True  # the first chunk is one frame, which the changes of frame rate leave alone
        self._past: dict[Hashable, deque[Tensor]] = defaultdict(deque)  # none or one [B, C, past_frames, H, W] each

    def has_borders(self, conv: CausalConv3d) -> bool:
        """Whether the windows of `conv` hold the rows that it reads beyond those that it gives."""
        return conv.kernel_size[1] > 1 and not self.stripe.is_whole

    def rows(self, conv: CausalConv3d, x: Tensor) -> Rows:
        """The rows of `x` [B, C, F, H, W], and those that the stripe above left, of which `conv` makes its next ones."""
        return self.stripe.rows(conv, x) if self.has_borders(conv) else Rows(x)

    def window(self, conv: CausalConv3d, x: Rows | Tensor, norm: RMSNorm | None = None) -> Tensor:
        """The next input of `conv`: the frames that it saw last, zeros at the start, and after them `x` [B, C, F, H, W].

        With `norm`, silu(norm(x)) in the place of `x`. The result is computed where the convolution reads it, and the frames
        kept so far are given up, so that no second copy of either is alive during the convolution.
        """
        rows = x if isinstance(x, Rows) else self.rows(conv, x)
        x, height = rows.new, rows.count
        batch, channels, frames, _, width = x.shape
        past = conv.past_frames
        window = new_frames(x, batch, channels, past + frames, height, width)
        before, new = window[:, :, :past], window[:, :, past:]
        if self._past[conv]:
            before.copy_(self._past[conv].popleft())
        else:
            before.zero_()
        rows.fill(new, put=norm)
        if norm is not None:  # zeros stay zeros
            F.silu(new, inplace=True)
        return window

    def keep(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Remember the last `past_frames` of `frames` [B, C, F, H, W] for the next call of `conv`."""
        self._past[conv].append(frames[:, :, -conv.past_frames :].clone())

    def kept_for(self, layer: Hashable) -> list[deque[Tensor]]:
        """The last frames that `layer` saw, and what stripes left for it."""
        return [self._past[layer], *self.stripe.kept_for(layer)]

    def way(self) -> Hashable:
        """All else that decides what layers do with it."""
        return self.is_first_chunk, self.stripe.way()


class ResidualBlock(nn.Module):
    """Two causal convolutions, each behind a norm and SiLU, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, spatial_dims=3)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = RMSNorm(out_channels, spatial_dims=3)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F, H, W]."""
        # `h` is rebound at every step: whatever it was before is freed while the convolution runs.
        rows = cache.rows(self.conv1, x)
        h: Tensor = cache.window(self.conv1, rows, self.norm1)
        h = self.conv1(h, cache)
        h = cache.window(self.conv2, h, self.norm2)
        h = self.conv2(h, cache)
        for place, piece in rows.pieces(rows.lost, h.shape[-2]):
            h[..., place, :].add_(self.conv_shortcut(piece))
        return h


class AttentionBlock(nn.Module):
    """Self-attention with one head over the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, spatial_dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> the same."""
        batch, channels, frames, height, width = x.shape
        qkv = self.to_qkv(self.norm(pictures(x))).permute(0, 2, 3, 1).reshape(batch * frames, 1, height * width, -1)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # [B F, 1, H W, C]
        y = self.proj(y.reshape(batch * frames, height, width, channels).permute(0, 3, 1, 2))
        return clip_of(y, batch).add_(x)


class MidBlock(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> the same."""
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = layer(x, cache)
        return x


class Downsample(nn.Module):
    """Half the rows and columns and, where `temporal`, half the frames."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        # One row and column of zeros at the far edges only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), (2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> [B, C, F or F / 2, H / 2, W / 2]; the first chunk of a clip keeps its one frame."""
        y: Tensor
        if cache.stripe.is_whole:
            y = self.resample(pictures(x))
        else:
            rows = cache.stripe.rows(self, x, top=0, stride=2)
            batch, channels, frames, _, width = x.shape
            window = new_frames(x, batch * frames, channels, rows.count, width + 1)
            rows.fill(torch.unflatten(window, 0, (batch, frames)).transpose(1, 2)[..., :-1])
            window[..., -1] = 0
            y = self.resample[1](window)
            del window
        y = clip_of(y, x.shape[0])
        if self.time_conv is not None:
            if cache.is_first_chunk:
                cache.keep(self.time_conv, y)
            else:
                y = cache.window(self.time_conv, y)
                y = self.time_conv(y, cache)
        return y


class Upsample(nn.Module):
    """Twice the rows and columns, other channels and, where `temporal`, twice the frames."""

    def __init__(self, channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F or 2 F, 2 H, 2 W]; the first chunk of a clip keeps its one frame."""
        x = cache.stripe.above(self, x)
        batch, channels, frames, height, width = x.shape
        if self.time_conv is None or cache.is_first_chunk:
            images = pictures(x)
        else:
            pairs = cache.window(self.time_conv, x)
            pairs = self.time_conv(pairs, cache)  # [B, 2 C, F, H, W], the channels of two frames
            images = new_frames(x, 2 * batch * frames, channels, height, width)
            by_frame = torch.unflatten(pairs, 1, (2, channels)).permute(0, 3, 1, 2, 4, 5)  # [B, F, 2, C, H, W]
            torch.unflatten(images, 0, (batch, frames, 2)).copy_(by_frame)
            del pairs, by_frame
        y = self.resample(images)  # [B F, C', 2 H, 2 W]
        y = cache.stripe.enlarged(y)  # beyond its inner edges are no zeros, as the convolution takes it
        return clip_of(y, batch)


class UpBlock(nn.Module):
    """Residual blocks and, except at full size, an upsampling."""

    def __init__(self, in_channels: int, out_channels: int, *, resnets: int, upsample: Upsample | None) -> None:
        super().__init__()
        channels = (in_channels, *(out_channels,) * resnets)
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(channels))
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: Tensor, cache: FeatureCache, *, refine: bool = True, enlarge: bool = True) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F or 2 F, H or 2 H, W or 2 W]; without `refine` or `enlarge` the other half of it."""
        for layer in (*(self.resnets if refine else ()), *((self.upsamplers or ()) if enlarge else ())):
            x = layer(x, cache)
        return x
