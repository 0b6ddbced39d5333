"""A ring of device slots in one allocation. A group takes as many adjacent slots as it needs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.utils.dlpack import from_dlpack

from vramkit.offload.backend import Backend, Fence

__all__ = ["Pieces", "Region", "SlotRing"]


class Pieces(dict[tuple[int, int], torch.Tensor]):
    """Parts of the memory of a region, by offset and bytes, cut when they are first asked for.

    To cut one takes the host as long as to issue a copy to it.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__({(0, memory.numel()): memory})
        self.memory = memory

    def __missing__(self, key: tuple[int, int]) -> torch.Tensor:
        offset, size_bytes = key
        with torch.inference_mode(False):  # it outlives the pass
            piece = self[key] = self.memory[offset : offset + size_bytes]
        return piece


@dataclasses.dataclass(slots=True, eq=False)
class Region:
    """Device memory that one group has for a while. `free` must be passed before it is written.

    A region outside the ring (`count` 0) exists only for a group that nothing could be reserved for.
    """

    pieces: Pieces
    free: Sequence[Fence]
    first: int = 0
    count: int = 0
    memory: torch.Tensor = dataclasses.field(init=False)
    """All of it."""

    def __post_init__(self) -> None:
        self.memory = self.pieces.memory


class SlotRing:
    """`slots` pieces of `slot_bytes`, one behind the other in one allocation, handed out in turn, while it is open.

    Handing out in turn keeps addresses the same in every pass when the slots divide the groups, and lets the first groups of
    the next pass load while the last ones of this pass compute.
    """

    def __init__(
        self, backend: Backend, slots: int, slot_bytes: int, memory: Callable[[int], torch.Tensor] | None = None
    ) -> None:
        """Plan a ring; it has memory from `open` on, by `memory` where that is given, and else of the backend."""
        self.slots = slots if slot_bytes else 0
        self.slot_bytes = slot_bytes
        self.is_open = False
        self._backend = backend
        self._allocate = memory or backend.memory
        self._memory: torch.Tensor | None = None
        self._views: dict[tuple[int, int], torch.Tensor] = {}  # by first slot and count
        self._regions: dict[tuple[int, int], Region] = {}  # one and the same for all of a size, by first slot and bytes
        self._fences: list[Fence] = []
        self._taken = [False] * self.slots
        self._next = 0

    @property
    def size_bytes(self) -> int:
        """Device memory of all slots, while it is open."""
        return self.slots * self.slot_bytes

    def open(self) -> None:
        """Have memory; open already: nothing to do.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        if not self.is_open:
            self._memory = self._allocate(self.size_bytes)
            self._fences = [self._backend.fence()] * self.slots  # after whoever had this memory before
            self.is_open = True

    @property
    def is_full(self) -> bool:
        """Whether nothing can be had from it now, however small."""
        return not self.is_open or False not in self._taken

    def take(self, size_bytes: int) -> Region | None:
        """Reserve adjacent free slots for `size_bytes`, or return None where there are none."""
        if self.is_full:
            return None
        count = -(-size_bytes // self.slot_bytes) or 1
        first = self._next if count == 1 and not self._taken[self._next] else self._first_of(count)
        if first is None:
            return None
        stop = first + count
        region = self._regions.get((first, size_bytes))
        if region is None:
            pieces = Pieces(self._slots(first, count)[:size_bytes])
            region = self._regions[first, size_bytes] = Region(pieces, (), first, count)
        region.free = self._fences[first:stop]
        self._taken[first:stop] = [True] * count
        self._next = stop % self.slots
        return region

    def _first_of(self, count: int) -> int | None:
        """Find so many adjacent free slots, at best those that come next; return the first one."""
        for step in range(self.slots):
            first = (self._next + step) % self.slots
            stop = first + count
            if stop <= self.slots and True not in self._taken[first:stop]:
                return first
        return None

    def make(self, size_bytes: int) -> Region:
        """Allocate a region outside the ring. Whoever used that memory before did so on the computing stream."""
        return Region(Pieces(self._backend.memory(size_bytes)), (self._backend.fence(),))

    def give(self, region: Region, free: Fence | None) -> None:
        """Take a region back; `free` says when its last reader is done (None: nothing has read it)."""
        for slot in range(region.first, region.first + region.count):
            self._taken[slot] = False
            if free is not None and self.is_open:
                self._fences[slot] = free

    def _slots(self, first: int, count: int) -> torch.Tensor:
        """Return adjacent slots as a tensor with a storage of its own, by which it is told who refers to their bytes."""
        if (first, count) not in self._views:
            assert self._memory is not None
            slots = self._memory[first * self.slot_bytes : (first + count) * self.slot_bytes]
            with torch.inference_mode(False):
                self._views[first, count] = from_dlpack(torch._C._to_dlpack(slots))  # noqa: SLF001 (see torch.utils.dlpack)
        return self._views[first, count]

    def renew(self, lost: Sequence[Region]) -> None:
        """Leave the memory of `lost` regions to others, and hand out new memory from now on.

        Regions that are out stay where they are until they are given back.
        """
        self._memory = None
        self._views.clear()
        self._regions.clear()
        self.is_open = False
        with contextlib.suppress(
            torch.OutOfMemoryError
        ):  # then it stays closed until the next pass, which may do with less
            self.open()
        for region in lost:
            self.give(region, None)

    def close(self) -> None:
        """Let the memory go, also while something refers to the ring. What reads it must have been issued by now."""
        fences, self._fences = self._fences, []
        try:
            for fence in fences:  # it may be handed to others who do not compute on the same stream
                fence.synchronize()
        finally:
            self._memory = None
            self._views.clear()
            self._regions.clear()
            self.is_open = False
            self._taken = [False] * self.slots
            self._next = 0

    def reset(self) -> None:
        """Take everything back, whoever had it, after the computation issued so far."""
        self._taken = [False] * self.slots
        self._fences = [self._backend.fence()] * self.slots if self.is_open else []
        self._next = 0
