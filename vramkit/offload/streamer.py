"""Weights through the ring in the order in which they are used.

`Streamer.acquire` alone is always right: it finds the group on its way, or loads it now. Everything else is a guess that it
may correct: the order of the last pass says what to load next, wrapping around to the next pass, and a pass that differs
costs time and never a wrong byte.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

from vramkit.offload.backend import Backend, Fence
from vramkit.offload.group import ModuleGroup
from vramkit.offload.ring import Region, SlotRing

__all__ = ["Counters", "Streamer"]

_NO_SPAN = nullcontext()


@dataclasses.dataclass(slots=True)
class Counters:
    """What has happened since the weights were first offloaded."""

    passes: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    demand_loads: int = 0
    dropped_loads: int = 0
    stall_s: float = 0.0


@dataclasses.dataclass(slots=True, eq=False)
class _Load:
    """A group on its way into a region, or there. `place` is its position in the expected order."""

    group: ModuleGroup
    region: Region
    ready: Fence
    version: int
    place: int


class Streamer:
    """Owns the copy queue and the expected order of one offloaded module. Used by one thread at a time."""

    def __init__(self, groups: Sequence[ModuleGroup], ring: SlotRing, backend: Backend, counters: Counters) -> None:
        self._backend = backend
        self._ring = ring
        self._counters = counters
        self._queue = backend.queue(threaded=any(group.needs_thread for group in groups))
        self._groups = tuple(groups)
        self._order = list(groups)  # of the last whole pass; until there is one, the order of definition
        self._seen: list[ModuleGroup] = []  # this pass so far
        self._previous = self._order  # the last pass, whole or not
        self._ahead: deque[_Load] = deque()  # loading or loaded, not yet used
        self._held: dict[ModuleGroup, _Load] = {}
        self._cursor = 0  # place in the order that is expected next
        self._midway = False  # inside acquire, release or prefetch: true elsewhere only after a KeyboardInterrupt

    @property
    def is_clean(self) -> bool:
        """Whether no group is held and no step was cut short."""
        return not self._held and not self._midway

    def acquire(self, group: ModuleGroup, *, in_pass: bool = True) -> None:
        """Make `group` ready for computation issued from now on, then load what comes next.

        What is acquired outside a pass (a part of the module called by itself) does not count for the order.
        """
        held = self._held.get(group)
        if held is not None:
            if held.version == group.version():
                return
            self.release(group)  # written to while it was kept on the device: load it again
        self._midway = True
        with _span("acquire", group):
            load = self._take(group)
            self._counters.stall_s += load.ready.wait()
            group.show_device(load.region.memory, remember=load.region.count > 0)
            self._held[group] = load
            if in_pass:
                self._seen.append(group)
        self._prefetch()
        self._midway = False

    def release(self, group: ModuleGroup) -> None:
        """Let the memory of `group` be reused after the computation issued so far. Not held: nothing to do."""
        load = self._held.pop(group, None)
        if load is None:
            return
        self._midway = True
        with _span("release", group):
            group.show_rest()
            self._ring.give(load.region, self._backend.fence())
        self._prefetch()
        self._midway = False

    def release_all(self) -> None:
        """Release whatever is still held."""
        for group in list(self._held):
            self.release(group)

    def show_rest(self) -> None:
        """Let the owners of groups that are held have their tensors at rest."""
        for group in self._held:
            group.show_rest()

    def end_pass(self) -> None:
        """Learn the order of the pass that ends, and load what the next one starts with.

        A pass that stopped midway (an exception) does not count, unless the next one stops at the same place.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        self._counters.passes += 1
        was_cut_short = len(seen) < len(self._order) and seen == self._order[: len(seen)] and seen != self._previous
        self._previous = seen
        if not was_cut_short:
            self._order = seen
        self._turn_to(0)
        self._prefetch()

    def reset(self) -> None:
        """Forget what is on its way and held; owners hold their tensors at rest afterwards. The order stays known."""
        self._queue.drain()  # nothing may be written any more when regions are given up
        for group in self._groups:
            group.show_rest()  # all, because a step that was cut short may have shown half of any
        self._counters.dropped_loads += len(self._ahead)
        self._ahead.clear()
        self._held.clear()
        self._seen.clear()
        self._cursor = 0
        self._ring.reset()
        self._midway = False

    def prefill(self) -> None:
        """Load what the next pass starts with."""
        if self._order:
            self._prefetch()

    def close(self) -> None:
        """Reset, and end the copy queue."""
        self.reset()
        self._queue.close()

    def _take(self, group: ModuleGroup) -> _Load:
        """Find `group` among what is on its way, dropping what was loaded for groups that the pass has skipped."""
        skipped = next((at for at, load in enumerate(self._ahead) if load.group is group), None)
        if skipped is None:
            return self._load_now(group)
        self._drop(skipped)
        load = self._ahead.popleft()
        self._cursor = (load.place + 1) % len(self._order)
        if load.version != group.version():
            self._ring.give(load.region, self._backend.fence())
            return self._load_now(group)
        return load

    def _load_now(self, group: ModuleGroup) -> _Load:
        self._counters.demand_loads += 1
        place = self._find(group)
        if place is not None:  # what was expected before it is skipped, or comes later
            self._drop(len(self._ahead))
            self._cursor = (place + 1) % len(self._order)
        region = self._ring.take(group.size_bytes)
        while region is None and self._ahead:
            self._drop_last()
            region = self._ring.take(group.size_bytes)
        return self._load(group, region or self._ring.make(group.size_bytes), self._cursor - 1)

    def _find(self, group: ModuleGroup) -> int | None:
        count = len(self._order)
        places = ((self._cursor + step) % count for step in range(count))
        return next((place for place in places if self._order[place] is group), None)

    def _prefetch(self) -> None:
        """Fill free slots with what is expected next."""
        while len(self._ahead) < self._ring.slots:
            place = (self._ahead[-1].place + 1 if self._ahead else self._cursor) % len(self._order)
            group = self._order[place]
            if group in self._held or any(load.group is group for load in self._ahead):
                return
            region = self._ring.take(group.size_bytes)
            if region is None:
                return
            self._ahead.append(self._load(group, region, place))

    def _load(self, group: ModuleGroup, region: Region, place: int) -> _Load:
        with _span("load", group):
            version = group.version()
            ready = self._queue.submit(_filling(group, region), region.free)
        self._counters.loads += 1
        self._counters.loaded_bytes += group.size_bytes
        return _Load(group, region, ready, version, place)

    def _drop(self, count: int) -> None:
        """Give back the next `count` loads unused. Their copies end before later ones begin: the queue is in order."""
        for _ in range(count):
            self._ring.give(self._ahead.popleft().region, None)
            self._counters.dropped_loads += 1

    def _drop_last(self) -> None:
        self._ring.give(self._ahead.pop().region, None)
        self._counters.dropped_loads += 1

    def _turn_to(self, place: int) -> None:
        """Expect `place` next; keep what is on its way only if it is what comes next."""
        self._cursor = place
        kept = 0
        for step, load in enumerate(self._ahead):
            expected = (place + step) % len(self._order)
            if load.group is not self._order[expected]:
                break
            load.place, kept = expected, kept + 1
        while len(self._ahead) > kept:
            self._drop_last()


def _span(step: str, group: ModuleGroup) -> AbstractContextManager[object]:
    """Name a step for a profiler, if one runs: otherwise the name would cost as much host time as the step."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]  # noqa: SLF001 (torch has no public reader)
        return _NO_SPAN
    return record_function(f"vramkit::{step} {group.name}")


def _filling(group: ModuleGroup, region: Region) -> Callable[[], None]:
    return lambda: group.fill(region.memory)
