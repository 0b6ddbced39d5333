"""Weights through the ring in the order in which they are used.

`Streamer.acquire` alone is always right: it finds the group on its way, or loads it now. Everything else is a guess that it
may correct: `Orders` says what to load next, across the end of the pass, and a pass that differs costs time and never a
wrong byte.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from vramkit.offload.backend import Backend, Copying
from vramkit.offload.group import ModuleGroup
from vramkit.offload.loads import OUTDATED, Load
from vramkit.offload.orders import Orders
from vramkit.offload.ring import Region, SlotRing
from vramkit.offload.stats import Counters
from vramkit.offload.transforms import innermost_transform, outside_transforms

if TYPE_CHECKING:
    from vramkit.tracing.recorder import Track

__all__ = ["Streamer"]

_is_profiled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]  # noqa: SLF001 (torch has no public reader)


class Streamer:
    """Owns the copy queue and the orders of one offloaded module. Used by one thread at a time."""

    def __init__(
        self,
        groups: Sequence[ModuleGroup],
        ring: SlotRing,
        backend: Backend,
        counters: Counters,
        *,
        unordered: Sequence[ModuleGroup] = (),
    ) -> None:
        """Stream `groups`, at first in this order, and on demand those of `unordered`."""
        self._backend = backend
        self._device_type = backend.device.type
        self._ring = ring
        self._counters = counters
        self._groups = (*groups, *unordered)
        self._queue = backend.queue(threaded=any(group.needs_thread for group in self._groups))
        self._orders = Orders(groups)
        self._ahead: dict[ModuleGroup, Load] = {}  # loading or loaded, not yet used; the last is the first to drop
        self._held: dict[ModuleGroup, Load] = {}
        self._escaped: list[Load] = []  # let go of, but somebody has a view of their memory
        self._settled: dict[ModuleGroup, Load] = {}  # the same after a pass: their memory is theirs for good
        self.track: Track | None = None
        """Where a trace notes what happens."""
        self._began: dict[ModuleGroup, Any] = {}  # when the computation of groups that are held did
        self.was_cut_short = False
        """Whether an interrupt or an error came in the middle of a step, which only `reset` mends: true inside of one."""

    @property
    def is_clean(self) -> bool:
        """Whether no group is held and no step was cut short."""
        return not self._held and not self.was_cut_short

    @outside_transforms
    def begin_pass(self, entry_point: str) -> None:
        """Load what is expected of a pass that begins at `entry_point`.

        What is acquired outside a pass (a part of the module called by itself) is followed, but not learned.
        """
        was_cut_short, self.was_cut_short = self.was_cut_short, True
        self._orders.begin(entry_point)
        self._keep_expected()
        self._prefetch()
        self.was_cut_short = was_cut_short

    def acquire(self, group: ModuleGroup) -> None:
        """Make `group` ready for computation issued from now on, then load what comes next."""
        if innermost_transform() is not None:
            self._acquire_outside(group)
            return
        held = self._held.get(group)
        if held is not None:
            if held.version == group.version():
                if not group.is_on_show:  # a state dict was taken meanwhile
                    group.show_device(held.region.memory, remember=held.region.count > 0)
                return
            self.release(group)  # written to while it was kept on the device: load it again
        if not group.is_at_rest():
            group.refuse_replaced()
        was_cut_short, self.was_cut_short = self.was_cut_short, True
        if _is_profiled():
            with _span("acquire", group):
                self._show(group, is_used_anew=held is None)
        else:
            self._show(group, is_used_anew=held is None)
        if not self._ring.is_full:
            self._prefetch()
        self.was_cut_short = was_cut_short

    _acquire_outside = outside_transforms(acquire)

    def release(self, group: ModuleGroup) -> None:
        """Let the memory of `group` be reused after the computation issued so far. Not held: nothing to do."""
        if group not in self._held:
            return
        if innermost_transform() is not None:
            self._release_outside(group)
            return
        was_cut_short, self.was_cut_short = self.was_cut_short, True
        load = self._held.pop(group)
        if self._began and self.track is not None and group in self._began:
            self.track.note("compute", group.name, self._began.pop(group), self._backend.moment())
        if _is_profiled():
            with _span("release", group):
                self._let_go(load)
        else:
            self._let_go(load)
        self._prefetch()
        self.was_cut_short = was_cut_short

    _release_outside = outside_transforms(release)

    def release_all(self) -> None:
        """Release whatever is still held."""
        for group in list(self._held):
            self.release(group)

    def drop_loads_of(self, groups: Sequence[ModuleGroup]) -> None:
        """Forget what was loaded of `groups`: their bytes were changed at rest."""
        for load in [load for load in self._ahead.values() if load.group in groups]:
            self._drop(load)
        for group in groups:
            if group in self._settled:
                self._settled[group].version = OUTDATED
            self.release(group)
            group.refresh(all_of_it=True)

    @outside_transforms
    def show_rest(self) -> None:
        """Let the owners of groups that are held have their tensors at rest, with what was written to them."""
        for load in self._held.values():
            load.group.put_away()
            load.note_writes()
        self.keep_late_writes()

    def keep_late_writes(self) -> None:
        """Keep what was written to groups through views that somebody has, after they were released."""
        for load in (*self._escaped, *self._settled.values()):
            if load.group not in self._held:
                load.keep_late_writes()

    @outside_transforms
    def end_pass(self) -> None:
        """Learn the shape of the pass that ends, and load what the next one starts with."""
        was_cut_short, self.was_cut_short = self.was_cut_short, True
        self._counters.passes += self._orders.is_midway
        self.keep_late_writes()
        lost = self._settle()
        if any(region.count for region in lost):
            self._ring.renew(lost)
        self._orders.end()
        self._keep_expected()
        self._prefetch()
        self.was_cut_short = was_cut_short

    @outside_transforms
    def rest(self) -> None:
        """Let go of all device memory, between passes: what is on its way, what is held, the slots.

        What somebody has a view of stays theirs. The next pass goes on as if it were the first, with what was learned.
        """
        was_cut_short, self.was_cut_short = self.was_cut_short, True
        for load in list(self._ahead.values()):
            self._drop(load)
        for group in list(self._held):
            load = self._held.pop(group)
            self._let_go(load)
        self._settle()
        self._queue.drain()  # nothing may be written any more when the memory goes
        for group in self._groups:
            group.close(but=self._settled[group].region.memory if group in self._settled else None)
        self._ring.close()
        self.was_cut_short = was_cut_short

    def reset(self) -> None:
        """Forget what is on its way and held; owners hold their tensors at rest afterwards, with what was written to them.

        Orders stay known.
        """
        self.was_cut_short = True
        self._queue.drain()  # nothing may be written any more when regions are given up
        try:
            self.show_rest()
        finally:
            self._forget()

    def _forget(self) -> None:
        for group in self._groups:
            group.restore()  # all, because a step that was cut short may have shown half of any
        self._counters.dropped_loads += len(self._ahead)
        self._ahead.clear()
        self._held.clear()
        self._began.clear()
        self._escaped.clear()
        self._orders.reset()
        self._ring.reset()
        self.was_cut_short = False

    def prefill(self) -> None:
        """Load what the next pass starts with."""
        was_cut_short, self.was_cut_short = self.was_cut_short, True
        self._prefetch()
        self.was_cut_short = was_cut_short

    @property
    def kept_bytes(self) -> int:
        """Device memory of groups that stay there, because somebody keeps a view of them."""
        return sum(group.size_bytes for group in self._settled)

    @property
    def held_bytes(self) -> int:
        """Device memory of slots, and of groups that are held outside them."""
        outside = sum(load.group.size_bytes for load in self._held.values() if not load.region.count)
        return outside + (self._ring.size_bytes if self._ring.is_open else 0)

    def close(self) -> None:
        """Reset, and end the copy queue. It may be called again, also after a call that was interrupted."""
        try:
            self.reset()
            self._settled.clear()
        finally:
            self._queue.close()

    def _show(self, group: ModuleGroup, *, is_used_anew: bool) -> None:
        """Find the load of `group`, or load it, and let owners have it when it is there."""
        load = self._still_there(group) if self._settled or self._escaped else None
        if is_used_anew and load is None and not self._orders.use(group):
            self._keep_expected(group)
        load = load or self._take(group)
        if self.track is None:
            self._counters.stall_s += load.ready.wait()
        else:
            self._wait_traced(load, self.track)
        self._held[group] = load  # before it is shown: where that fails, what was shown is put away
        group.show_device(load.region.memory, remember=load.region.count > 0)

    def _let_go(self, load: Load) -> None:
        """Put a load away that is no longer held, and have its memory back unless somebody has a view of it."""
        is_held = load.group.put_away()
        if torch.is_autocast_enabled(self._device_type):
            torch.clear_autocast_cache()  # else it had a copy of the whole module in its dtype
        if load.group.kept_writes is not None:
            load.note_writes()
        if is_held:
            self._escaped.append(load)
        elif load.group not in self._settled:
            self._give(load)
        if self._escaped:
            self._give_escaped()

    def _wait_traced(self, load: Load, track: Track) -> None:
        asked = self._backend.moment()
        self._counters.stall_s += load.ready.wait()
        self._began[load.group] = began = self._backend.moment()
        track.note("stall", load.group.name, asked, began)

    def _give(self, load: Load) -> None:
        """Let the memory of a load be reused after the computation issued so far."""
        self._ring.give(load.region, self._backend.fence())
        if not load.region.count:
            load.group.forget(load.region.memory)

    def _give_escaped(self) -> None:
        """Take back what nobody has a view of any more."""
        escaped, self._escaped = self._escaped, []
        for load in escaped:
            load.keep_late_writes()
            if load.group.is_held_by_others(load.region.memory):
                self._escaped.append(load)
            elif self._settled.get(load.group) is not load:
                self._give(load)

    def _settle(self) -> list[Region]:
        """Leave the memory of what is still in use after a pass to whoever has it, and serve the group from there.

        Returns what is newly lost so.
        """
        self._give_escaped()
        if any(load.group not in self._settled for load in self._escaped):
            gc.collect()  # what refers to it may be garbage
            self._give_escaped()
        lost = [load for load in self._escaped if load.group not in self._settled]
        self._settled |= {load.group: load for load in lost}
        self._escaped.clear()
        return [load.region for load in lost]

    def _still_there(self, group: ModuleGroup) -> Load | None:
        """Return the load of a group that was let go of and never left the device, if it is what rests now."""
        load = self._settled.get(group) or _of(group, self._escaped)
        if load is None:
            return None
        load.keep_late_writes()
        if group.is_replaced(load.region.memory):
            self._settled.pop(group, None)
            return None
        self._escaped = [other for other in self._escaped if other is not load]
        if load.version != group.version():  # written at rest: whoever has a view sees that, as everywhere
            load.region.free = (self._backend.fence(),)
            new = self._load(group, load.region)
            load.ready, load.version = new.ready, new.version
        return load

    def _take(self, group: ModuleGroup) -> Load:
        """Find `group` among what is on its way, or load it."""
        load = self._ahead.pop(group, None)
        if load is None:
            return self._load_now(group)
        if load.version != group.version():
            self._ring.give(load.region, self._backend.fence())
            return self._load_now(group)
        return load

    def _load_now(self, group: ModuleGroup) -> Load:
        self._counters.demand_loads += 1
        region = self._ring.take(group.size_bytes)
        while region is None and self._ahead:
            self._drop(next(reversed(self._ahead.values())))
            region = self._ring.take(group.size_bytes)
        return self._load(group, region or self._ring.make(group.size_bytes))

    def _keep_expected(self, used: ModuleGroup | None = None) -> None:
        """Drop what is on its way and not expected soon, after the plan has changed; `used` is taken next."""
        coming = self._orders.ahead(self._ring.slots)
        order = {group: at for at, group in reversed(list(enumerate(coming, 1)))} | ({used: 0} if used else {})
        for load in list(self._ahead.values()):
            if load.group not in order:
                self._drop(load)
        self._ahead = dict(sorted(self._ahead.items(), key=lambda item: order[item[0]]))

    def _prefetch(self) -> None:
        """Fill free slots with what is expected next."""
        for group in self._orders.ahead(self._ring.slots):
            if group in self._ahead:
                continue
            if group in self._held:
                return
            region = self._ring.take(group.size_bytes)
            if region is None:
                return
            self._ahead[group] = self._load(group, region)

    def _load(self, group: ModuleGroup, region: Region) -> Load:
        if not _is_profiled():
            return self._issue(group, region)
        with _span("load", group):
            return self._issue(group, region)

    def _issue(self, group: ModuleGroup, region: Region) -> Load:
        after = (*region.free, self._backend.fence()) if group.refresh() else region.free
        load = Load(group, region, group.version())
        if group.is_joint:
            group.reserve()
        fill: Copying = load.fill
        if self.track is not None:
            fill = self.track.copying(group.name, group.size_bytes, region.first if region.count else None, fill)
        load.ready = self._queue.submit(fill, after)
        self._counters.loads += 1
        self._counters.loaded_bytes += group.size_bytes
        return load

    def _drop(self, load: Load) -> None:
        """Give a load back unused. Its copy ends before later ones begin: the queue is in order.

        What others send is not: a load of several ranks frees its slot when it is all there.
        """
        del self._ahead[load.group]
        load.is_given_up = True
        self._ring.give(load.region, load.ready if load.group.is_joint else None)
        self._counters.dropped_loads += 1


def _of(group: ModuleGroup, loads: Sequence[Load]) -> Load | None:
    for load in loads:
        if load.group is group:
            return load
    return None


def _span(step: str, group: ModuleGroup) -> AbstractContextManager[object]:
    """Name a step for a profiler. Not where none runs: there the name would cost as much host time as the step."""
    return record_function(f"vramkit::{step} {group.name}")
