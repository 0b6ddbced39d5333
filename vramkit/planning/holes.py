"""How much memory torch's caching allocator wants beside what is alive: the holes between tensors that come and go.

Its segments grow and shrink by pages (`vramkit.offload.allocator`). Of the free blocks it takes the smallest that is large
enough, and splits it. Where there is none it maps pages; where the device has no more of them it unmaps all that are free
and tries again, which takes milliseconds, and pages that are in use in part stay. All of this follows from the sizes of
tensors and from the order in which they are made and die, so it is played here on numbers.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from vramkit.memory import MIB
from vramkit.offload.allocator import PAGE_BYTES

__all__ = ["NO_ROOM", "Course", "Lives", "Room", "is_small", "room_for"]

Lives: TypeAlias = list[tuple[int, int]]
"""(number of a tensor, its bytes) where it is made, and the same with less than no bytes where it dies."""

_SMALL_BYTES = MIB  # tensors up to this size have pages of their own, and leave next to no holes there
_GRANULE_BYTES = 512
_TRIES = 32  # parts of what is alive that are tried, one more each time, as room for holes


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """Bytes beside the most that is alive at once."""

    needed_bytes: int
    """With less than this, a tensor finds no place."""
    ample_bytes: int
    """With less than this, pages are unmapped and the device waits, now and then."""

    def at_least(self, size_bytes: int) -> Room:
        """Return this, or so much where that is more, and four times as much where it is ample."""
        return Room(max(self.needed_bytes, size_bytes), max(self.ample_bytes, 4 * size_bytes))


NO_ROOM = Room(0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
    """What tensors came and went during a call."""

    lives: Lives
    gone: tuple[int | None, ...] = ()
    """Numbers of those that it took from queues, in their order."""
    born: tuple[int, ...] = ()
    """Numbers of those that it made to stay."""

    @classmethod
    def of(cls, lives: Lives, *, gone: Sequence[int | None], born: Sequence[int]) -> Course:
        """Return what of `lives` another call of that kind will do too.

        Where not all that stays was made in them, nobody knows when it was.
        """
        made = {number for number, size_bytes in lives if size_bytes > 0}
        died = {number for number, size_bytes in lives if size_bytes < 0}
        if not made.issuperset(born):
            gone, born = (), ()
        told = (made & died).union(born, died.intersection(gone))
        return cls([each for each in lives if each[0] in told], tuple(gone), tuple(born))


def is_small(size_bytes: int) -> bool:
    """Tell whether a tensor lies where holes do not matter."""
    return size_bytes <= _SMALL_BYTES


def room_for(lives: Lives) -> Room:
    """Play `lives` on as many pages as they ask for, and then on few and more until all find a place."""
    alive = peak = 0
    for _, size_bytes in lives:
        alive += size_bytes
        peak = max(peak, alive)
    ample = max(_most_mapped(lives) or 0, peak)
    tries = (peak + peak * part // _TRIES for part in range(_TRIES))
    needed = next((tried for tried in tries if tried < ample and _most_mapped(lives, tried) is not None), ample)
    return Room(needed - peak, ample - peak)


def _most_mapped(lives: Iterable[tuple[int, int]], limit: int | None = None) -> int | None:
    """Return the most bytes that are mapped at once, at most `limit`; None where a tensor finds no place so."""
    used: dict[int, _Block] = {}
    segment = _Segment(limit)
    for number, size_bytes in lives:
        if size_bytes < 0:
            segment.give(used.pop(number))
            continue
        block = segment.take(size_bytes)
        if block is None:
            return None
        used[number] = block
    return segment.most_mapped


class _Block:
    """A piece of address space between two others."""

    __slots__ = ("address", "before", "behind", "is_mapped", "is_used", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.is_mapped = self.is_used = False
        self.before: _Block | None = None
        self.behind: _Block | None = None

    def is_one_with(self, other: _Block | None) -> bool:
        return other is not None and not (self.is_used or other.is_used) and self.is_mapped is other.is_mapped

    def absorb(self, behind: _Block) -> None:
        """Take the place of the block behind this one too."""
        self.size += behind.size
        self.behind = behind.behind
        if self.behind is not None:
            self.behind.before = self

    @property
    def reach(self) -> int:
        """What a free block can grow to."""
        behind = self.behind
        return self.size + (behind.size if behind is not None and not behind.is_mapped else 0)

    def has_unused(self, size: int) -> bool:
        """Whether so many bytes from here on are not used."""
        block: _Block | None = self
        while size > 0 and block is not None and not block.is_used:
            size -= block.size
            block = block.behind
        return size <= 0


class _Segment:
    """Address space without end, of which at most `limit` bytes are mapped at once."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._first = _Block(0, 1 << 62)
        self._free: list[tuple[int, int, _Block]] = []  # mapped and not used, the smallest first, then by address
        self._mapped = self.most_mapped = 0

    def take(self, size_bytes: int) -> _Block | None:
        """Find a place, on other pages if need be."""
        size = -(-size_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        block = self._found(size) or self._grown(size)
        if block is None:
            self._unmap_free()
            block = self._grown(size)
        if block is not None:
            self._unlist(block)
            block.is_used = True
            if block.size - size > _SMALL_BYTES:
                rest = self._cut(block, size)
                rest.is_used = False
                self._list(rest)
        return block

    def give(self, block: _Block) -> None:
        """Let a block be free."""
        block.is_used = False
        before, behind = block.before, block.behind
        if behind is not None and behind.is_mapped and not behind.is_used:
            self._unlist(behind)
            block.absorb(behind)
        if before is not None and before.is_mapped and not before.is_used:
            self._unlist(before)
            before.absorb(block)
            block = before
        self._list(block)

    def _found(self, size: int) -> _Block | None:
        """Return the smallest free block that is large enough, counting what it can grow by."""
        free, at = self._free, bisect.bisect_left(self._free, (size,))
        if at == len(free):
            return None
        block = free[at][2]
        reach = block.reach
        for _, _, other in itertools.islice(free, at + 1, None):
            other_reach = other.reach
            if other_reach >= reach:
                break
            block, reach = other, other_reach
        return block

    def _grown(self, size: int) -> _Block | None:
        """Map pages at the lowest address where that makes a free block large enough."""
        block: _Block | None = self._first
        while block is not None:
            if not block.is_mapped:
                start = block.before if block.before is not None and not block.before.is_used else block
                if start.has_unused(size):
                    return self._mapped_from(start, size)
            block = block.behind
        return None

    def _mapped_from(self, block: _Block, size: int) -> _Block | None:
        while not block.is_mapped or block.size < size:
            bare = block.behind if block.is_mapped else block
            assert bare is not None
            wanted = min(bare.size, size - (block.size if block.is_mapped else 0))
            wanted = -(-wanted // PAGE_BYTES) * PAGE_BYTES
            if self._limit is not None and self._mapped + wanted > self._limit:
                return None
            self._mapped += wanted
            self.most_mapped = max(self.most_mapped, self._mapped)
            if bare.size > wanted:
                self._cut(bare, wanted)
            bare.is_mapped = True
            self._list(bare)
            block = self._joined(bare)
        return block

    def _unmap_free(self) -> None:
        """Give back the whole pages of what is free."""
        for size, address, block in list(self._free):
            first, end = -(-address // PAGE_BYTES) * PAGE_BYTES, (address + size) // PAGE_BYTES * PAGE_BYTES
            if first >= end:
                continue
            self._unlist(block)
            if address + size > end:
                self._list(self._cut(block, end - address))
            whole = self._cut(block, first - address) if first > address else block
            if whole is not block:
                self._list(block)
            whole.is_mapped = False
            self._mapped -= end - first
            self._joined(whole)

    def _cut(self, block: _Block, size: int) -> _Block:
        """Cut a block that is not listed; return what is behind its first `size` bytes."""
        rest = _Block(block.address + size, block.size - size)
        rest.is_mapped, rest.is_used = block.is_mapped, block.is_used
        rest.before, rest.behind = block, block.behind
        if rest.behind is not None:
            rest.behind.before = rest
        block.size, block.behind = size, rest
        return rest

    def _joined(self, block: _Block) -> _Block:
        """Make one of a block and those beside it that are like it."""
        before = block.before
        if before is not None and before.is_one_with(block):
            block = self._appended(before)
        if block.is_one_with(block.behind):
            block = self._appended(block)
        return block

    def _appended(self, block: _Block) -> _Block:
        behind = block.behind
        assert behind is not None
        for each in (block, behind):
            if each.is_mapped:
                self._unlist(each)
        block.absorb(behind)
        if block.is_mapped:
            self._list(block)
        return block

    def _list(self, block: _Block) -> None:
        bisect.insort(self._free, (block.size, block.address, block))

    def _unlist(self, block: _Block) -> None:
        del self._free[bisect.bisect_left(self._free, (block.size, block.address))]
