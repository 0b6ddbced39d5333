"""Layers of the CogVideoX video autoencoder, for inference in batches of frames and in little memory.

A clip passes through the layers a batch of frames at a time. The norms look at all frames of a batch at once, so a batch
cannot go depth first; but once the moments of a norm are known, what is left of it is a scale and a shift, and that, the
activation, the convolution, the resampling and the shortcut are done a few frames at a time: beside the input and the output
of a layer, only a part of the frames is alive. What a causal convolution saw last belongs to one pass over a clip, a
`FrameCache` that travels down the calls as an argument: modules hold no state.

Shapes: B batch, C channels, F frames, H rows, W columns; T, h, w the same of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vramkit.pipelines.networks.layout import new_frames
from vramkit.pipelines.networks.workspace import compact, halves

__all__ = [
    "CausalConv3d",
    "DownBlock",
    "Downsample",
    "FrameCache",
    "GroupNorm",
    "MidBlock",
    "ResidualBlock",
    "SpatialNorm",
    "UpBlock",
    "Upsample",
    "shrunk",
    "stretched",
]

# Numbers in a part of the frames: a frame of 128 channels at 480 x 720 pixels, 6 of them in a tile of a quarter of that.
_PART_NUMEL = 2**26


def stretched(frames: int) -> int:
    """How many frames `frames` become when their rate is doubled: of an odd number the first stays single."""
    return 2 * frames - frames % 2


def shrunk(frames: int) -> int:
    """How many frames `frames` become when their rate is halved: of an odd number the first stays single."""
    return (frames + 1) // 2


def frame_pairs(frames: int, *, temporal: bool) -> list[slice]:
    """At the higher rate, the frames that stand for each frame at the lower one; `frames` is counted at the higher.

    Pairs, except for the first of an odd number; single frames where the rates are the same.
    """
    if not temporal:
        return [slice(frame, frame + 1) for frame in range(frames)]
    return [slice(max(0, end - 2), end) for end in range(2 - frames % 2, frames + 1, 2)]


def frame_parts(x: Tensor, *, shrink: int = 1) -> list[slice]:
    """Cut the frames of `x` [B, C, F, H, W] into parts that are small enough to be copied, and by `shrink` smaller."""
    frames = x.shape[2]
    size = max(1, _PART_NUMEL // shrink // max(1, x[:, :, 0].numel()))
    return [slice(start, min(start + size, frames)) for start in range(0, frames, size)]


# -- norms -------------------------------------------------------------------------------------------------------------


class Affine(NamedTuple):
    """What a norm does to the frames that it has seen: x * gain + shift, both fp32.

    Each is [B, C, 1, 1, 1], or [B, C, F, h, w] with one entry for a block of H / h rows and W / w columns.
    """

    gain: Tensor
    shift: Tensor

    def apply(self, x: Tensor, part: slice, out: Tensor) -> Tensor:
        """Write frames `part` of `x`, given as `x` [B, C, f, H, W], to `out`; computed in fp32, rounded once."""
        gain, shift = (each if each.shape[2] == 1 else each[:, :, part] for each in self)
        rows, columns = gain.shape[-2:]
        gain, shift = (each[:, :, :, :, None, :, None] for each in (gain, shift))
        x, blocks = (torch.unflatten(torch.unflatten(each, 4, (columns, -1)), 3, (rows, -1)) for each in (x, out))
        torch.addcmul(shift, x, gain, out=blocks)  # [B, C, f, h, H / h, w, W / w]
        return out


class GroupNorm(nn.GroupNorm):
    """The group norm of [B, C, F, H, W] over all its frames, as what it does to each of them."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Affine:  # type: ignore[override]
        """Look at `x` [B, C, F, H, W]."""
        means, variances = [], []
        for part in frame_parts(x, shrink=4):
            # By rows: over all of a picture, with its channels innermost, CUDA's kernel takes half a gigabyte for itself.
            variance, mean = torch.var_mean(x[:, :, part].float(), dim=4, correction=0)  # [B, C, f, H]
            variances.append(variance)
            means.append(mean)
        # Rows are of equal size, so the variance is that within them and that between them.
        within, between = (
            torch.unflatten(torch.cat(each, dim=2), 1, (self.num_groups, -1)) for each in (variances, means)
        )  # [B, G, C / G, F, H] each
        variance = within.mean((2, 3, 4)) + between.var((2, 3, 4), correction=0)
        scale = torch.rsqrt(variance + self.eps)[..., None]  # [B, G, 1]
        gain = scale * self.weight.float().view(self.num_groups, -1)  # [B, G, C / G]
        shift = self.bias.float().view(self.num_groups, -1) - between.mean((2, 3, 4))[..., None] * gain
        return Affine(*(each.flatten(1)[..., None, None, None] for each in (gain, shift)))


class SpatialNorm(nn.Module):
    """A group norm whose result is scaled and shifted by what the latents say of each place.

    Source: MoVQ (arXiv:2209.09002). The latents are stretched to the size of the frames by repeating them, so their two
    convolutions, which see one position at a time, are done before that.
    """

    def __init__(self, channels: int, latent_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = PointwiseConv3d(latent_channels, channels)
        self.conv_b = PointwiseConv3d(latent_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Affine:
        """Look at `x` [B, C, F, H, W] and the latents `z` [B, Z, T, h, w] that it comes from."""
        gain, shift = self.norm_layer(x)
        frames = latent_of_frame(x.shape[2], z.shape[2])
        y, b = (_chosen(conv(z).float(), frames) for conv in (self.conv_y, self.conv_b))  # [B, C, F, h, w]
        return Affine(gain * y, b.addcmul_(shift, y))


def _chosen(z: Tensor, frames: list[int]) -> Tensor:
    """These frames of `z` [B, C, T, h, w], some of them repeated, laid out as `z` is."""
    return torch.cat([z[:, :, frame : frame + 1] for frame in frames], dim=2)


def latent_of_frame(frames: int, latents: int) -> list[int]:
    """The latent frame that each frame comes from: of an odd number the first has one of its own."""
    if frames == 1 or frames % 2 == 0:
        return [frame * latents // frames for frame in range(frames)]
    return [0, *(1 + frame * (latents - 1) // (frames - 1) for frame in range(frames - 1))]


# -- convolutions ------------------------------------------------------------------------------------------------------


class FrameCache:
    """The last input frames of every causal convolution in one pass over a clip."""

    def __init__(self) -> None:
        self._past: dict[CausalConv3d, Tensor] = {}  # each [B, C, past_frames, H, W]

    def take(self, conv: CausalConv3d) -> Tensor | None:
        """Give up what `conv` saw last; None at the beginning of a clip."""
        return self._past.pop(conv, None)

    def keep(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Remember what `conv` saw last."""
        self._past[conv] = frames


class PointwiseConv3d(nn.Module):
    """A convolution of each position by itself, under the name that checkpoints have for it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F, H, W]."""
        out: Tensor = self.conv(x)
        return out


class CausalConv3d(nn.Module):
    """A 3 x 3 x 3 convolution that sees no later frames; the first frame of a clip stands for what was before it."""

    offload_unit: ClassVar[bool] = True
    past_frames: ClassVar[int] = 2

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(
        self,
        x: Tensor,
        cache: FrameCache,
        *,
        activation: Affine | None = None,
        out: Tensor | None = None,
        on_read: Callable[[slice], object] | None = None,
    ) -> Tensor:
        """Convolve `x` [B, C, F, H, W], or silu(activation(x)), and return the result [B, C', F, H, W].

        `out` may be what the result is written to, `x` itself for one: a part of it has been read when it is written.
        `on_read` is told so, with the frames of the part, when it may write to them too.
        """
        past = cache.take(self)
        for part in frame_parts(x):
            window = self._window(x[:, :, part], part, past, activation)
            past = window[:, :, -self.past_frames :].clone()
            if on_read is not None:
                on_read(part)
            y = self.conv(window)
            del window
            if out is None:
                out = y if y.shape[2] == x.shape[2] else new_frames(y, *y.shape[:2], *x.shape[2:])
            if out is not y:
                out[:, :, part] = y
            del y  # before the next window is made
        assert past is not None
        assert out is not None
        cache.keep(self, past)
        return out

    def _window(self, frames: Tensor, part: slice, past: Tensor | None, activation: Affine | None) -> Tensor:
        """The past frames [B, C, 2, H, W] and behind them the new ones, normed and activated where the convolution reads."""
        batch, channels, count, height, width = frames.shape
        window = new_frames(frames, batch, channels, self.past_frames + count, height, width)
        new = window[:, :, self.past_frames :]
        if activation is None:
            new.copy_(frames)
        else:
            F.silu(activation.apply(frames, part, new), inplace=True)
        window[:, :, : self.past_frames] = new[:, :, :1] if past is None else past
        return window


class Downsample(nn.Module):
    """Half the rows and columns and, where `temporal`, the mean of each two frames."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, C, F or (F + 1) // 2, H / 2, W / 2]; of an odd number the first frame stays single."""
        batch, channels, frames, height, width = x.shape
        pairs = frame_pairs(frames, temporal=self.temporal)
        out = new_frames(x, batch, channels, len(pairs), height // 2, width // 2)
        for index, pair in enumerate(pairs):
            padded = new_frames(x, batch, channels, height + 1, width + 1)
            torch.mean(x[:, :, pair], 2, out=padded[..., :-1, :-1])
            padded[..., -1, :] = 0  # zeros at the far edges only
            padded[..., -1] = 0
            out[:, :, index] = self.conv(padded)
        return out


class Upsample(nn.Module):
    """Twice the rows and columns and, where `temporal`, each frame twice."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, C, F or 2 F, 2 H, 2 W]; of an odd number of frames the first stays single."""
        batch, channels, frames, height, width = x.shape
        count = stretched(frames) if self.temporal else frames
        out = new_frames(x, batch, channels, count, 2 * height, 2 * width)
        for index, pair in enumerate(frame_pairs(count, temporal=self.temporal)):
            frame = self.conv(F.interpolate(x[:, :, index], scale_factor=2.0))  # [B, C, 2 H, 2 W]
            out[:, :, pair] = frame[:, :, None]
        return out


# -- blocks ------------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two causal convolutions, each behind a norm and SiLU, and a shortcut; conditioned on latents in the decoder."""

    offload_unit: ClassVar[bool] = True

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, latent_channels: int | None = None
    ) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if latent_channels is None:
                return GroupNorm(groups, channels, eps=eps)
            return SpatialNorm(channels, latent_channels, groups=groups)

        self.norm1 = norm(in_channels)
        self.norm2 = norm(out_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(
        self, x: Tensor, cache: FrameCache, z: Tensor | None = None, spare: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, C, F, H, W], which is overwritten -> [B, C', F, H, W], and memory of that size that is free now, or None.

        `z` are latents [B, Z, T, h, w]; `spare` is such memory, for the result.
        """
        activation, parts = self.norm1(x, z), None
        if isinstance(self.conv_shortcut, nn.Identity):
            h = self.conv1(x, cache, activation=activation, out=spare)
        elif (parts := halves(x, self.conv1.conv.out_channels)) is not None:
            shortcut = self.conv_shortcut
            h = self.conv1(
                x,
                cache,
                activation=activation,
                out=parts[0],
                on_read=lambda part: parts[1][:, :, part].copy_(shortcut(x[:, :, part])),
            )
        else:
            h = self.conv1(x, cache, activation=activation)
        h = self.conv2(h, cache, activation=self.norm2(h, z), out=h)
        if parts is not None:
            return h.add_(parts[1]), parts[1]
        for part in frame_parts(x):
            h[:, :, part] += self.conv_shortcut(x[:, :, part])
        return h, x if x.shape == h.shape else None


def residual_blocks(
    in_channels: int, channels: int, count: int, *, groups: int, eps: float, latent_channels: int | None = None
) -> nn.ModuleList:
    """`count` blocks, the first of which changes the number of channels."""
    widths = [in_channels, *[channels] * count]
    return nn.ModuleList(
        ResidualBlock(a, b, groups=groups, eps=eps, latent_channels=latent_channels) for a, b in pairwise(widths)
    )


class MidBlock(nn.Module):
    """Residual blocks at the smallest size.

    A block takes its input out of the list that it is given, so that nobody holds it longer than needed.
    """

    def __init__(self, resnets: nn.ModuleList) -> None:
        super().__init__()
        self.resnets = resnets

    def forward(self, clip: list[Tensor], cache: FrameCache, z: Tensor | None = None) -> Tensor:
        """[[B, C, F, H, W]] -> [B, C', F, H, W]; `z` are latents [B, Z, T, h, w]."""
        x, spare = clip.pop(), None
        for resnet in self.resnets:
            x, spare = resnet(x, cache, z, spare)
        return x


class DownBlock(MidBlock):
    """Residual blocks and, except at the smallest size, a downsampling."""

    def __init__(self, resnets: nn.ModuleList, downsample: Downsample | None) -> None:
        super().__init__(resnets)
        self.downsamplers = nn.ModuleList() if downsample is None else nn.ModuleList([downsample])

    def forward(self, clip: list[Tensor], cache: FrameCache, z: Tensor | None = None) -> Tensor:
        """[[B, C, F, H, W]] -> [B, C', F or (F + 1) // 2, H or H / 2, W or W / 2]."""
        x = super().forward(clip, cache, z)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpBlock(MidBlock):
    """Residual blocks and, except at full size, an upsampling."""

    def __init__(self, resnets: nn.ModuleList, upsample: Upsample | None) -> None:
        super().__init__(resnets)
        self.upsamplers = nn.ModuleList() if upsample is None else nn.ModuleList([upsample])

    def forward(self, clip: list[Tensor], cache: FrameCache, z: Tensor | None = None) -> Tensor:
        """[[B, C, F, H, W]] -> [B, C', F or 2 F, H or 2 H, W or 2 W]."""
        x = super().forward(clip, cache, z)
        for upsample in self.upsamplers:
            x = compact(x)
            x = upsample(x)
        return x
