"""Figures of an offloaded module: those that are counted while it runs, and what users read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vramkit.memory import format_bytes

__all__ = ["Counters", "OffloadStats"]


@dataclasses.dataclass(slots=True)
class Counters:
    """What has happened since the weights were first offloaded."""

    passes: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    demand_loads: int = 0
    dropped_loads: int = 0
    stall_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class OffloadStats:
    """Figures of one offloaded module. Sizes in bytes, times in seconds; counts since it was applied."""

    groups: int
    """Groups that stream."""
    streamed_bytes: int
    """Bytes of one pass through all of them."""
    resident_bytes: int
    """Weights and buffers that stay on the device."""
    slots: int
    slot_bytes: int
    """The ring takes ``slots * slot_bytes`` of device memory."""
    stores: dict[str, int]
    """Streamed bytes by where they rest."""
    kept_bytes: int
    """Groups that stay on the device, because a view of a weight of theirs was kept beyond a pass."""
    held_bytes: int
    """Device memory now: ``slots * slot_bytes + resident_bytes``, less while the module rests."""
    table_bytes: int
    """Embedding tables that are looked up where they rest."""
    pinned_bytes: int
    """Host memory that is page-locked."""
    passes: int
    loads: int
    loaded_bytes: int
    """What travelled to the device."""
    demand_loads: int
    """Loads that began only when they were needed."""
    dropped_loads: int
    """Loads that were not needed after all."""
    stall_s: float
    """How long the computing thread was held up by a worker thread (disk and pageable stores)."""
    returned_bytes: int
    """Weight bytes that were copied from the device to the host: none while models run, some when applying or removing."""

    def lines(self) -> Iterator[str]:
        """Yield a line of text for each of the figures that users ask for."""
        places = [f"{format_bytes(size)} {kind}" for kind, size in self.stores.items()]
        rows = {
            "streams": f"{format_bytes(self.streamed_bytes)} in {self.groups} groups ({', '.join(places) or 'nothing'})",
            "slots": f"{self.slots} of {format_bytes(self.slot_bytes)}",
            "stays": format_bytes(self.resident_bytes),
            "tables": format_bytes(self.table_bytes),
            "on the device": f"{format_bytes(self.held_bytes)} now",
            "page-locked": format_bytes(self.pinned_bytes),
            "so far": f"{self.passes} passes, {format_bytes(self.loaded_bytes)} loaded, stalled {self.stall_s:.3g} s",
        }
        return (f"  {title:<14}{text}" for title, text in rows.items())
