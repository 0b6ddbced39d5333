"""Layers of the LTX-Video autoencoder: convolutions over frames, causal or not, with the first and last frame repeated.

Norms look at one position at a time, so everything between two convolutions is done where the second one reads it: a
convolution takes a few frames, prepares them (norm, modulation, SiLU) in a window, and hands the result over to be
written, added or spread into a larger clip. A residual block adds to the clip that it is given, its two convolutions taking
turns. So beside the clip nothing of its size is alive.

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.pipelines.layers import TimestepEmbedding, sinusoidal_embedding, token_chunks

__all__ = [
    "DownBlock",
    "Modulation",
    "Rates",
    "ResidualBlocks",
    "TimeEmbedder",
    "UpBlock",
    "VideoConv3d",
    "normalize",
    "patchify",
    "unpatchify",
]

# Numbers that go into a convolution, or come out of it, at once: five frames of 512 x 768 pixels at 128 channels.
_PART_NUMBERS = 2**24

# By how much frames, rows and columns become more or fewer.
Rates: TypeAlias = tuple[int, int, int]
# Scale and shift of a norm, each [B, C, 1, 1, 1]; the norm is multiplied by 1 + scale.
Modulation: TypeAlias = tuple[Tensor, Tensor]
# (frames of a convolution's input, where it reads them): writes what it is to read.
Prepare: TypeAlias = Callable[[Tensor, Tensor], object]
# (which frames of a convolution's result, these frames): puts them where they belong.
Store: TypeAlias = Callable[[slice, Tensor], object]


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
    x = torch.unflatten(x, 1, (-1, *rates)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, C, F, rf, H, rh, W, rw]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def space_to_depth(x: Tensor, rates: Rates) -> Tensor:
    """[B, C, rf F, rh H, rw W] -> [B, C rf rh rw, F, H, W]."""
    for dim, rate in zip((4, 3, 2), reversed(rates), strict=True):  # from the last, which leaves the others in place
        x = torch.unflatten(x, dim, (-1, rate))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [B, C, rf, rh, rw, F, H, W] before it is flattened


def patchify(video: Tensor, size: int) -> Tensor:
    """[B, C, F, H, W] -> [B, C size size, F, H / size, W / size]; columns of a patch before its rows."""
    patches = torch.unflatten(space_to_depth(video, (1, size, size)), 1, (-1, size, size))
    return patches.transpose(2, 3).flatten(1, 3)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """[B, C size size, F, H, W] -> [B, C, F, size H, size W]."""
    patches = torch.unflatten(patches, 1, (-1, size, size)).transpose(2, 3).flatten(1, 3)
    return depth_to_space(patches, (1, size, size))


class VideoConv3d(nn.Module):
    """A convolution over [B, C, F, H, W] a few frames at a time.

    Where the kernel reaches beyond the clip, the first or last frame is repeated (a causal one reaches back only), rows and
    columns are zero.
    """

    offload_unit: ClassVar[bool] = True  # runs its weight once for each part of the frames

    def __init__(
        self, in_channels: int, out_channels: int, *, causal: bool, kernel_size: int = 3, stride: Rates = (1, 1, 1)
    ) -> None:
        super().__init__()
        border = kernel_size // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride, padding=(0, border, border))
        self.frames_before = kernel_size - 1 if causal else border
        self.frames_after = kernel_size - 1 - self.frames_before

    def forward(
        self, x: Tensor, store: Store | None = None, *, prepare: Prepare | None = None, lead: int = 0, multiple: int = 1
    ) -> Tensor:
        """Convolve `x` [B, C, F, H, W].

        Args:
            x: the input.
            store: takes the frames of the result in parts; without it they are put into a new tensor.
            prepare: makes of frames of `x` what the convolution reads; without it, `x` itself.
            lead: how often the first frame is repeated before the clip begins.
            multiple: parts are whole multiples of so many frames, which the result has to be too.

        Returns:
            The new tensor [B, C', F', H', W'], or `x` with `store`.
        """
        result = x
        if store is None:
            result = self.new_result(x)
            store = partial(_put, result)
        for part in self.parts(x, lead=lead, multiple=multiple):
            store(part, self.part(x, part, prepare=prepare, lead=lead))
        return result

    def parts(self, x: Tensor, *, lead: int = 0, multiple: int = 1) -> list[slice]:
        """Cut the frames of the result of `x` so that a part has not too many numbers."""
        step = self.conv.stride[0]
        frames = (lead + x.shape[2] - 1) // step + 1
        numbers = max(step * self.conv.in_channels, self.conv.out_channels) * x.shape[0] * x.shape[3] * x.shape[4]
        units = token_chunks(frames // multiple, max(1, _PART_NUMBERS // (multiple * numbers)))
        return [slice(unit.start * multiple, unit.stop * multiple) for unit in units]

    def part(self, x: Tensor, part: slice, *, prepare: Prepare | None = None, lead: int = 0) -> Tensor:
        """Frames `part` of the result of `x`; the other arguments are those of `forward`."""
        step = self.conv.stride[0]
        first = part.start * step - self.frames_before - lead
        stop = (part.stop - 1) * step + 1 + self.frames_after - lead
        y: Tensor = self.conv(frames_with_ends(x, first, stop, prepare))
        return y

    def new_result(self, x: Tensor) -> Tensor:
        """Memory for the result of `x` [B, C, F, H, W]: [B, C', F', H', W']."""
        sizes = ((size - 1) // step + 1 for size, step in zip(x.shape[2:], self.conv.stride, strict=True))
        return x.new_empty(x.shape[0], self.conv.out_channels, *sizes)


def frames_with_ends(x: Tensor, first: int, stop: int, prepare: Prepare | None = None) -> Tensor:
    """Frames `first` to `stop` of `x` [B, C, F, H, W], prepared; those outside of it are the first or the last one."""
    before, after = max(0, -first), max(0, stop - x.shape[2])
    taken = x[:, :, first + before : stop - after]
    if prepare is None and not (before or after):
        return taken
    window = x.new_empty(*x.shape[:2], stop - first, *x.shape[3:])
    inner = window[:, :, before : stop - first - after]
    if prepare is None:
        inner.copy_(taken)
    else:
        prepare(taken, inner)
    window[:, :, :before] = inner[:, :, :1]
    window[:, :, stop - first - after :] = inner[:, :, -1:]
    return window


def _put(out: Tensor, part: slice, y: Tensor) -> None:
    out[:, :, part].copy_(y)


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

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F, H, W], which is `x` itself, overwritten, where the channels stay.

        `time` [B, 4 C] holds two shifts and scales, each shift first.
        """
        before1, before2 = (partial(normalize, modulation=m) for m in self._modulations(time))
        noise1, noise2 = (self._noise(x, scale) for scale in (self.per_channel_scale1, self.per_channel_scale2))
        out = x if self.conv_shortcut is None else self.conv_shortcut(x, prepare=self.norm3)
        behind = self.conv1.frames_before  # the second convolution looks as far back, and ahead no further
        done = 0  # frames that are finished
        between: Tensor | None = None  # the last frames of the first convolution
        for part in self.conv1.parts(x):
            new = _plus(self.conv1.part(x, part, prepare=before1), noise1)
            between = new if between is None else torch.cat((between, new), dim=2)
            del new
            start = part.stop - between.shape[2]
            stop = max(done, part.stop if part.stop == x.shape[2] else part.stop - behind)
            if stop > done:
                y = self.conv2.part(between, slice(done - start, stop - start), prepare=before2)
                out[:, :, done:stop].add_(_plus(y, noise2))
                del y
            done = stop
            between = between[:, :, max(0, done - behind - start) :].clone()
        return out

    def _modulations(self, time: Tensor | None) -> tuple[Modulation | None, Modulation | None]:
        if self.scale_shift_table is None or time is None:
            return None, None
        table = torch.unflatten(time, 1, (4, -1)) + self.scale_shift_table
        shift1, scale1, shift2, scale2 = table[..., None, None, None].unbind(1)  # [B, C, 1, 1, 1] each
        return (scale1, shift1), (scale2, shift2)

    @staticmethod
    def _noise(x: Tensor, scale: Tensor | None) -> Tensor | None:
        """One noisy picture [C, 1, H, W] for all frames, from the device's own generator as in the published decoder."""
        return None if scale is None else (torch.randn(x.shape[-2:], device=x.device, dtype=x.dtype) * scale)[:, None]


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

    def forward(self, clip: list[Tensor], timestep: Tensor | None = None) -> Tensor:
        """Update [B, C, F, H, W], taken out of `clip`, in place and return it; `timestep` [B]."""
        return self._refine(clip.pop(), timestep)

    def _refine(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        embedded = None
        if self.time_embedder is not None and timestep is not None:
            embedded = self.time_embedder(timestep, x.dtype)
        for resnet in self.resnets:
            x = resnet(x, embedded)
        return x


class _Downsampler(nn.Module):
    """A convolution whose result is folded into channels, added to the means of the folded input."""

    def __init__(self, in_channels: int, out_channels: int, *, rates: Rates, causal: bool) -> None:
        super().__init__()
        self.rates = rates
        self.out_channels = out_channels
        self.conv = VideoConv3d(in_channels, out_channels // math.prod(rates), causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, C', (F - 1) / rate + 1, H / rate, W / rate]; the first frame stands for `rate` frames."""
        rate = self.rates[0]
        lead = rate - 1
        sizes = (size // by for size, by in zip((x.shape[2] + lead, *x.shape[3:]), self.rates, strict=True))
        out = x.new_empty(x.shape[0], self.out_channels, *sizes)

        def store(part: slice, y: Tensor) -> None:
            folded = space_to_depth(frames_with_ends(x, part.start - lead, part.stop - lead), self.rates)
            means = torch.unflatten(folded, 1, (self.out_channels, -1)).mean(dim=2)
            torch.add(space_to_depth(y, self.rates), means, out=out[:, :, part.start // rate : part.stop // rate])

        self.conv(x, store, lead=lead, multiple=rate)
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
        changes = not folded and in_channels != out_channels
        self.conv_out = ResidualBlock(in_channels, out_channels, causal=causal, eps=eps) if changes else None

    def forward(self, clip: list[Tensor], timestep: Tensor | None = None) -> Tensor:
        """[B, C, F, H, W], taken out of `clip` and overwritten -> [B, C', F', H', W']."""
        x = self._refine(clip.pop(), timestep)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
        return x if self.conv_out is None else self.conv_out(x)


class _Upsampler(nn.Module):
    """A convolution whose channels are unfolded into positions, if asked for added to the unfolded input."""

    def __init__(self, in_channels: int, *, factor: int, residual: bool, causal: bool) -> None:
        super().__init__()
        self.rates: Rates = (2, 2, 2)
        self.residual = residual
        self.out_channels = in_channels // factor
        self.conv = VideoConv3d(in_channels, in_channels * math.prod(self.rates) // factor, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, C / factor, 2 F - 1, 2 H, 2 W]; the first of two first frames is left out."""
        rate = self.rates[0]
        sizes = [size * by for size, by in zip(x.shape[2:], self.rates, strict=True)]
        out = x.new_empty(x.shape[0], self.out_channels, sizes[0] - (rate - 1), *sizes[1:])

        def store(part: slice, y: Tensor) -> None:
            frames = depth_to_space(y, self.rates)
            if self.residual:
                added = depth_to_space(x[:, :, part], self.rates)  # repeated to as many channels as there are
                torch.unflatten(frames, 1, (-1, added.shape[1])).add_(added[:, None])
            start = part.start * rate - (rate - 1)
            missing = max(0, -start)
            out[:, :, start + missing : start + frames.shape[2]] = frames[:, :, missing:]

        self.conv(x, store)
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

    def forward(self, clip: list[Tensor], timestep: Tensor | None = None) -> Tensor:
        """[B, C, F, H, W], taken out of `clip` and overwritten -> [B, C', F', H', W']."""
        x = clip.pop()
        if self.conv_in is not None:
            x = self.conv_in(x)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x)
        return self._refine(x, timestep)
