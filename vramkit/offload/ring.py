"""A ring of device slots, allocated once. A group takes as many adjacent slots as it needs."""

from __future__ import annotations

import dataclasses

import torch

from vramkit.offload.backend import Backend, Fence

__all__ = ["Region", "SlotRing"]


@dataclasses.dataclass(slots=True, eq=False)
class Region:
    """Device memory that one group has for a while. `free` must be passed before it is written.

    A region outside the ring (`count` 0) exists only for a group that nothing could be reserved for.
    """

    memory: torch.Tensor
    free: tuple[Fence, ...]
    first: int = 0
    count: int = 0


class SlotRing:
    """`slots` pieces of `slot_bytes`, one behind the other in one allocation, handed out in turn.

    Handing out in turn keeps addresses the same in every pass when the slots divide the groups, and lets the first groups of
    the next pass load while the last ones of this pass compute.
    """

    def __init__(self, backend: Backend, slots: int, slot_bytes: int) -> None:
        self.slots = slots if slot_bytes else 0
        self.slot_bytes = slot_bytes
        self._backend = backend
        self._memory = backend.memory(self.slots * slot_bytes)
        self._fences: list[Fence] = [backend.fence()] * self.slots
        self._taken = [False] * self.slots
        self._next = 0

    @property
    def size_bytes(self) -> int:
        """Device memory of all slots."""
        return self.slots * self.slot_bytes

    def take(self, size_bytes: int) -> Region | None:
        """Reserve adjacent free slots for `size_bytes`, or return None where there are none."""
        count = max(1, -(-size_bytes // self.slot_bytes)) if self.slots else 1
        for step in range(self.slots):
            first = (self._next + step) % self.slots
            wanted = range(first, first + count)
            if wanted.stop <= self.slots and not any(self._taken[slot] for slot in wanted):
                for slot in wanted:
                    self._taken[slot] = True
                self._next = wanted.stop % self.slots
                start = first * self.slot_bytes
                free = tuple(self._fences[slot] for slot in wanted)
                return Region(self._memory[start : start + size_bytes], free, first, count)
        return None

    def make(self, size_bytes: int) -> Region:
        """Allocate a region outside the ring. Whoever used that memory before did so on the computing stream."""
        return Region(self._backend.memory(size_bytes), (self._backend.fence(),))

    def give(self, region: Region, free: Fence | None) -> None:
        """Take a region back; `free` says when its last reader is done (None: nothing has read it)."""
        for slot in range(region.first, region.first + region.count):
            self._taken[slot] = False
            if free is not None:
                self._fences[slot] = free

    def reset(self) -> None:
        """Take everything back, whoever had it, after the computation issued so far."""
        self._taken = [False] * self.slots
        self._fences = [self._backend.fence()] * self.slots
        self._next = 0
