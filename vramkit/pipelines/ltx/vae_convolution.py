"""The convolution of the LTX-Video autoencoder: over frames, causal or not, with the first and last frame repeated.

It takes a few frames, has them prepared where it reads them, and hands its result over to be written, added or spread.

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.pipelines.networks.layers import token_chunks
from vramkit.pipelines.networks.layout import new_frames
from vramkit.pipelines.networks.stripes import Rows

__all__ = ["Prepare", "Rates", "Store", "VideoConv3d", "frames_with_ends", "put"]

# Numbers that go into a convolution, or come out of it, at once: five frames of 512 x 768 pixels at 128 channels.
_PART_NUMBERS = 2**24

# By how much frames, rows and columns become more or fewer.
Rates: TypeAlias = tuple[int, int, int]
# (frames of a convolution's input, where it reads them): writes what it is to read.
Prepare: TypeAlias = Callable[[Tensor, Tensor], object]
# (which frames of a convolution's result, these frames): puts them where they belong.
Store: TypeAlias = Callable[[slice, Tensor], object]


class _PaddedConv3d(nn.Conv3d):
    """A convolution that may be given the rows beyond those that it gives; its own module because checkpoints name it so."""

    def forward(self, window: Tensor, *, has_borders: bool = False) -> Tensor:
        """Pad rows, unless they are there, and columns."""
        rows, columns = (0 if has_borders else int(self.padding[1])), int(self.padding[2])
        return F.conv3d(window, self.weight, self.bias, self.stride, (0, rows, columns))


class VideoConv3d(nn.Module):
    """A convolution over [B, C, F, H, W] a few frames at a time.

    Where the kernel reaches beyond the clip, the first or last frame is repeated (a causal one reaches back only), rows and
    columns are zero. Inner edges of stripes are left to whoever calls it with `rows`.
    """

    offload_unit: ClassVar[bool] = True  # runs its weight once for each part of the frames

    def __init__(
        self, in_channels: int, out_channels: int, *, causal: bool, kernel_size: int = 3, stride: Rates = (1, 1, 1)
    ) -> None:
        super().__init__()
        border = kernel_size // 2
        self.conv = _PaddedConv3d(in_channels, out_channels, kernel_size, stride=stride, padding=(0, border, border))
        self.frames_before = kernel_size - 1 if causal else border
        self.frames_after = kernel_size - 1 - self.frames_before

    def forward(
        self,
        x: Tensor | Rows,
        store: Store | None = None,
        *,
        prepare: Prepare | None = None,
        lead: int = 0,
        multiple: int = 1,
    ) -> Tensor:
        """Convolve `x` [B, C, F, H, W].

        Args:
            x: the input, or the rows of it that a stripe has.
            store: takes the frames of the result in parts; without it they are put into a new tensor.
            prepare: makes of frames of `x` what the convolution reads; without it, `x` itself.
            lead: how often the first frame is repeated before the clip begins.
            multiple: parts are whole multiples of so many frames, which the result has to be too.

        Returns:
            The new tensor [B, C', F', H', W'], or `x` with `store`.
        """
        rows = x if isinstance(x, Rows) else Rows(x)
        result = rows.new
        if store is None:
            result = self.new_result(rows)
            store = partial(put, result)
        for part in self.parts(rows, lead=lead, multiple=multiple):
            store(part, self.part(rows, part, prepare=prepare, lead=lead))
        return result

    def parts(self, rows: Rows, *, lead: int = 0, multiple: int = 1) -> list[slice]:
        """Cut the frames of the result of `rows` so that a part has not too many numbers."""
        step, x = self.conv.stride[0], rows.new
        frames = (lead + x.shape[2] - 1) // step + 1
        numbers = max(step * self.conv.in_channels, self.conv.out_channels) * x.shape[0] * rows.count * x.shape[4]
        units = token_chunks(frames // multiple, max(1, _PART_NUMBERS // (multiple * numbers)))
        return [slice(unit.start * multiple, unit.stop * multiple) for unit in units]

    def part(self, rows: Rows, part: slice, *, prepare: Prepare | None = None, lead: int = 0) -> Tensor:
        """Frames `part` of the result of `rows`; the other arguments are those of `forward`."""
        step = self.conv.stride[0]
        first = part.start * step - self.frames_before - lead
        stop = (part.stop - 1) * step + 1 + self.frames_after - lead
        y: Tensor = self.conv(frames_with_ends(rows, first, stop, prepare), has_borders=rows.has_borders)
        return y

    def new_result(self, rows: Rows) -> Tensor:
        """Memory for the result of `rows` [B, C, F, H, W]: [B, C', F', H', W']."""
        step, x = self.conv.stride, rows.new
        frames, width = ((x.shape[dim] - 1) // step[dim - 2] + 1 for dim in (2, 4))
        height = self.height(rows)
        return new_frames(x, x.shape[0], self.conv.out_channels, frames, height, width)

    def height(self, rows: Rows) -> int:
        """How many rows the result of `rows` has."""
        padded = rows.count + (0 if rows.has_borders else 2 * int(self.conv.padding[1]))
        return (padded - self.conv.kernel_size[1]) // self.conv.stride[1] + 1


def frames_with_ends(rows: Rows, first: int, stop: int, prepare: Prepare | None = None) -> Tensor:
    """Frames `first` to `stop` of `rows` [B, C, F, H, W], prepared; those outside of it are the first or the last one."""
    x = rows.new
    before, after = max(0, -first), max(0, stop - x.shape[2])
    taken = slice(first + before, stop - after)
    if prepare is None and not (before or after or rows.has_borders):
        return x[:, :, taken]
    window = new_frames(x, *x.shape[:2], stop - first, rows.count, x.shape[4])
    inner = window[:, :, before : stop - first - after]
    if prepare is not None and not rows.has_borders:
        prepare(x[:, :, taken], inner)
    else:
        rows.fill(inner, taken)
        if prepare is not None:  # of zeros it may make something else
            kept = inner[..., rows.top : rows.count - rows.bottom, :]
            prepare(kept, kept)
    window[:, :, :before] = inner[:, :, :1]
    window[:, :, stop - first - after :] = inner[:, :, -1:]
    return window


def put(out: Tensor, part: slice, y: Tensor) -> None:
    """Write frames `y` of a result [B, C, F, H, W] to where they are in `out`."""
    out[:, :, part].copy_(y)
