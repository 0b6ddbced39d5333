"""Pictures computed in stripes of rows from top to bottom: no seams, no row computed twice.

A convolution of three rows gives the last row of a stripe only when it sees the row below, which is in the next stripe. So
a stripe gives what it can, and what a layer will need of its input again, two rows of each frame, it leaves to the stripe
below, which puts them above its own. From layer to layer the rows given lag further behind the rows taken; the last stripe,
with the lower edge of the picture, catches up. Halos around each stripe would be simpler, and with few rows and many layers
most of the work would be to compute them.

Ranks that compute a part of the rows each have halos, at the edges of their parts: nothing is sent from layer to layer, and
a part is so high that its halo is little. Where a part ends inside of the picture, its first stripe has nothing above and
its last one nothing below; both give what they can, and take so much more that this is the part.

Alive are, beside what a layer makes of a stripe, two rows of all frames for each convolution.

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Rows", "Stripe", "stripe_edges"]

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of its input that a layer reads: those that the stripe above left, and below them new ones.

    `top` and `bottom` count the zeros beyond the edges of the picture. A whole picture has none, as it has no borders: its
    convolutions pad it.
    """

    new: Tensor  # [B, C, F, H, W]
    above: Tensor | None = None  # [B, C, F, k, W]
    top: int = 0
    bottom: int = 0
    has_borders: bool = False  # whether all rows are here that are read for those that are given
    lost: int = 0  # rows at the top, of which two kernels one after the other give nothing, as nobody left any above

    @property
    def count(self) -> int:
        """How many rows there are, zeros included."""
        left = 0 if self.above is None else self.above.shape[-2]
        return self.top + left + self.new.shape[-2] + self.bottom

    @property
    def middle(self) -> int:
        """The row, zeros not counted, at which the first row is that a kernel of three rows gives."""
        return 1 - self.top if self.has_borders else 0

    def pieces(self, start: int, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows `start` to `start + count`, zeros not counted, as pieces, each with its place among these rows."""
        at = 0
        for rows in (self.new,) if self.above is None else (self.above, self.new):
            height = rows.shape[-2]
            first, stop = max(start - at, 0), min(start + count - at, height)
            if first < stop:
                yield slice(at + first - start, at + stop - start), _between(rows, first, stop, height)
            at += height

    def fill(
        self, window: Tensor, frames: slice = _ALL, put: Callable[[Tensor, Tensor], object] | None = None
    ) -> Tensor:
        """Write these rows of `frames` to `window` [B, C, f, count, W], or what `put(rows, place)` writes, and return it."""
        height = window.shape[-2]
        for zeros in (slice(0, self.top), slice(height - self.bottom, height)):
            if zeros.start < zeros.stop:
                window[..., zeros, :] = 0
        for place, rows in self.pieces(0, height):
            target = _between(window, self.top + place.start, self.top + place.stop, height)
            new = rows if frames == _ALL else rows[:, :, frames]
            _ = target.copy_(new) if put is None else put(new, target)
        return window

    def joined(self) -> Tensor:
        """These rows without zeros, in one tensor."""
        return self.new if self.above is None else torch.cat((self.above, self.new), dim=-2)


def _between(rows: Tensor, first: int, stop: int, height: int) -> Tensor:
    """Rows `first` to `stop` of `rows` [..., `height`, W], which of whole pictures are all."""
    return rows if stop - first == height else rows[..., first:stop, :]


@dataclass(slots=True)
class _Left:
    """What the stripes of one picture leave to one another: for each layer the rows of its frames, in their order."""

    rows: dict[Hashable, deque[Tensor]] = field(default_factory=lambda: defaultdict(deque))
    pictures: dict[Hashable, deque[Tensor]] = field(default_factory=lambda: defaultdict(deque))  # none or one each
    given: int = 0  # finished rows


class Stripe:
    """One stripe of a picture on its way through the layers; made by itself, the whole picture.

    A layer asks once for each frame and stripe, with the same frames in the same order in each stripe. How many frames it
    asks for at once may differ.
    """

    def __init__(self) -> None:
        self.is_first = True
        self.is_last = True
        self._ends = (True, True)  # whether the stripes begin and end where the picture does
        self._spare = (1, 0)
        self.taken = slice(None)  # rows of the picture that was split
        self._size = (0, 0)  # of that picture
        self._left = _Left()

    def split(
        self,
        height: int,
        width: int,
        count: int,
        *,
        lag: int,
        last: float = 1.0,
        part: slice | None = None,
        spare: tuple[int, int] = (1, 0),
    ) -> Iterator[Stripe]:
        """Stripes of this whole picture, to be computed in this order; the first arguments are those of `stripe_edges`.

        With `part` of its rows, they take `lag` rows more above and below it, as far as there are some. `spare` tells how
        many rows of the result become of one, and how many of the result are made of these more than are needed, if
        `enlarged` is to leave them out.
        """
        begin, end = (0, height) if part is None else (part.start, part.stop)
        edges = [begin + edge for edge in stripe_edges(end - begin, count, lag=lag, last=last)]
        edges[0], edges[-1] = max(0, begin - lag), min(height, end + lag)
        left, ends = _Left(), (edges[0] == 0, edges[-1] == height)
        for start, stop in itertools.pairwise(edges):
            stripe = Stripe()
            stripe.is_first, stripe.is_last, stripe._ends = start == edges[0], stop == edges[-1], ends
            stripe.taken, stripe._size, stripe._left = slice(start, stop), (height, width), left
            stripe._spare = spare
            yield stripe

    def give(self, count: int) -> slice:
        """The place of the next `count` finished rows in the result."""
        start = self._left.given
        self._left.given += count
        return slice(start, start + count)

    def given_by(self, convolutions: int, rows: int) -> int:
        """How many rows so many convolutions, one after the other, make of `rows` new ones: fewer at first, more at last."""
        return rows + convolutions * (self.is_bottom - self.is_first - (self.is_first and not self.is_top))

    @property
    def is_top(self) -> bool:
        """Whether the upper edge of the picture is that of this stripe."""
        return self.is_first and self._ends[0]

    @property
    def is_bottom(self) -> bool:
        """Whether the lower edge of the picture is that of this stripe."""
        return self.is_last and self._ends[1]

    @property
    def left_out(self) -> int:
        """How many rows of the result `enlarged` leaves out that are not needed."""
        edges = (self.is_first and not self.is_top) + (self.is_last and not self.is_bottom)
        return edges * self._spare[1]

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the picture."""
        return self.is_top and self.is_bottom

    def rows(
        self, layer: Hashable, x: Tensor, *, top: int = 1, bottom: int = 1, stride: int = 1, multiple: int = 1
    ) -> Rows:
        """The rows that a kernel of three rows reads, and of which it gives all that it can.

        Args:
            layer: whose input it is.
            x: the new rows, [B, C, F, H, W]. What will be needed again is copied.
            top: rows of zeros above the picture.
            bottom: rows of zeros below it.
            stride: the distance from one row of the result to the next, in rows of the input.
            multiple: of how many rows the result has to be.
        """
        if self.is_whole:
            return Rows(x)
        top, bottom, lost = top * self.is_top, bottom * self.is_bottom, 2 * (self.is_first and not self.is_top)
        above = None if self.is_first else self._take(layer, x.shape[2])
        rows = Rows(x, above, top, bottom, has_borders=True, lost=lost)
        if self.is_last:
            return rows
        given = ((rows.count - 3) // stride + 1) // multiple * multiple
        self._leave(layer, rows, first=stride * given - top)
        read = stride * (given - 1) + 3  # without those after the last multiple
        return replace(rows, new=x[..., : x.shape[-2] - (rows.count - read), :])

    def above(self, layer: Hashable, x: Tensor) -> Tensor:
        """`x` with the last row that the stripe above gave this layer; the last one of `x` is copied for the next stripe."""
        if self.is_whole:
            return x
        rows = Rows(x, None if self.is_first else self._take(layer, x.shape[2]))
        if not self.is_last:
            self._leave(layer, rows, first=rows.count - 1)
        return rows.joined()

    def enlarged(self, y: Tensor) -> Tensor:
        """`y` [..., H, W], of which there are twice as many rows as before, without those whose neighbours are missing.

        At the inner edges of a part of the picture, rows that are not needed are left out too.
        """
        if self.is_whole:
            return y
        ratio, spare = self._spare
        each = max(1, ratio * self._size[1] // y.shape[-1])  # rows of the result for one of y
        inner = 1 + spare % (2 * each) // each
        top = inner if self.is_first and not self.is_top else int(not self.is_first)
        bottom = inner if self.is_last and not self.is_bottom else int(not self.is_last)
        return y[..., top : y.shape[-2] - bottom, :]

    def height_of_picture(self, x: Tensor) -> int:
        """How many rows the whole picture has of which `x` [B, C, F, H, W] is this stripe."""
        return x.shape[-2] if self.is_whole else self._size[0] * x.shape[-1] // self._size[1]

    def picture(self, layer: Hashable, make: Callable[[], Tensor], rows: int) -> Tensor:
        """The next `rows` of a picture [..., H, W] that `make` makes once for all stripes."""
        if self.is_whole:
            return make()
        left = self._left.pictures[layer]
        picture = make() if self.is_first else left.popleft()
        if not self.is_last:
            left.append(picture[..., rows:, :])
        return picture[..., :rows, :]

    def kept_for(self, layer: Hashable) -> list[deque[Tensor]]:
        """What the stripe above left for `layer`, and behind it what this one leaves: rows, and the rest of a picture."""
        return [self._left.rows[layer], self._left.pictures[layer]]

    def way(self) -> Hashable:
        """All else that decides what layers do with it."""
        return self.is_first, self.is_last, self._ends, self._spare, self._size

    def _take(self, layer: Hashable, frames: int) -> Tensor:
        """What the stripe above left of the next frames."""
        queue, taken = self._left.rows[layer], []
        while frames:
            rows = queue.popleft()
            if rows.shape[2] > frames:
                queue.appendleft(rows[:, :, frames:])
                rows = rows[:, :, :frames]
            taken.append(rows)
            frames -= rows.shape[2]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)

    def _leave(self, layer: Hashable, rows: Rows, *, first: int) -> None:
        """Keep the rows from `first` on, zeros not counted, for the stripe below."""
        kept = [piece for _, piece in rows.pieces(first, rows.count - first)]
        self._left.rows[layer].append(kept[0].clone() if len(kept) == 1 else torch.cat(kept, dim=-2))


def stripe_edges(height: int, count: int, *, lag: int, last: float = 1.0) -> list[int]:
    """Edges of at most `count` stripes of a picture that give equally many rows, or in the last stripe this part of it.

    Rows given are `lag` behind those taken, so the first stripe takes more and the last one less. A picture of few rows is
    cut into fewer stripes.
    """
    size = height / (count - 1 + last)
    edges = {min(height, math.ceil(size * index) + lag) for index in range(1, count)}
    return sorted({0, *edges, height})
