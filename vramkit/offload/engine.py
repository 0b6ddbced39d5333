"""The offloading of one module while it is on: hooks, passes, and who may use it.

A *pass* is one forward of the module, or one call of another entry point (``decode``, ``generate``) or of a part. Groups are
acquired and released by hooks on the modules that need them, or because a weight is read where it rests. The pass tells
where the recorded order begins and ends, moves the inputs, and mends what a pass that was torn off (Ctrl-C) left behind.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from types import FrameType
from typing import Any

import torch
from torch import nn

from vramkit import hooks
from vramkit.errors import ConcurrentUseError, ConflictError
from vramkit.offload.arguments import moved_call
from vramkit.offload.assembly import assemble
from vramkit.offload.backend import Fence, backend_for
from vramkit.offload.call_hooks import EncoderHook, GroupHook, PartHook, PassHook, wrap_entry_points
from vramkit.offload.config import OffloadConfig
from vramkit.offload.facade import Facade
from vramkit.offload.group import ModuleGroup
from vramkit.offload.keeper import WeightKeeper
from vramkit.offload.owner import Owner
from vramkit.offload.partition import parts_of
from vramkit.offload.passes import Calls, OpenCall, frame_of_module_call
from vramkit.offload.refusals import refuse_fork, refuse_tracing, refuse_training
from vramkit.offload.residents import Resident
from vramkit.offload.resting import RestingPlace
from vramkit.offload.ring import SlotRing
from vramkit.offload.stats import Counters
from vramkit.offload.streamer import Streamer
from vramkit.offload.tables import TableHook
from vramkit.offload.transforms import outside_transforms
from vramkit.offload.uses import Uses
from vramkit.offload.watch import is_resting
from vramkit.tracing.recorder import track_of

__all__ = ["Engine"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Engine:
    """Built and opened when offloading is applied, closed when it is removed. `owner` is the handle that users hold."""

    def __init__(
        self,
        module: nn.Module,
        config: OffloadConfig,
        place: RestingPlace,
        counters: Counters,
        *,
        owner: Owner,
        uses: Uses,
        holds_on: bool = False,
        on_device: dict[int, torch.Tensor] | None = None,
    ) -> None:
        """Assemble the groups; see `assemble` for errors. The module shows nothing of it before `open`.

        Args:
            module: what is offloaded.
            config: how.
            place: where its weights rest.
            counters: that go on counting.
            owner: is told what happens. It may close this engine then.
            uses: where uses are recorded.
            holds_on: whether groups stay on the device after a pass, until `rest`.
            on_device: see `assemble`.
        """
        self.module = module
        self.config = config
        self.owner = owner
        self._place = place
        self._process = os.getpid()
        self.assembly = assemble(module, config, place, uses.times(module), on_device)
        self._holds_on = holds_on
        self._uses = uses
        self._backend = backend_for(config.device)
        memory = None if config.mesh is None else functools.partial(config.mesh.memory, self._backend)
        self.ring = SlotRing(self._backend, config.slots, self.assembly.slot_bytes, memory)
        self._streamer = Streamer(
            self.assembly.groups, self.ring, self._backend, counters, unordered=self.assembly.table_groups
        )
        self._trainable = any(parameter.requires_grad for parameter in module.parameters())
        self.returned_bytes = 0  # copied back when what stays was let go
        self._lingering: list[ModuleGroup] = []  # held although none of their modules runs, until another is needed
        self._calls = Calls()
        self._lock = threading.RLock()  # traced by a debugger, a Ctrl-C before the end of a `with` leaves it taken
        self.is_stale = False  # modules were added or replaced since
        self._computed: Fence | None = None  # the end of the latest pass
        self._handled: BaseException | None = None  # by whoever began the pass that runs
        self._began: Any = None  # when it did, if there is a trace
        self._group_hooks: list[GroupHook] = []
        self._hook_of: dict[ModuleGroup, GroupHook] = {}
        self._table_hooks = [
            TableHook(slot, place.pinned_memory(slot.rest), config.device) for _, slot in self.assembly.tables
        ]
        tables = {id(hook.table.slot.rest): hook.table for hook in self._table_hooks}
        self._keeper = WeightKeeper(module, self.assembly, tables, config.device, weakref.proxy(self))
        self._attachments: list[hooks.Attachment] = []

    def open(self) -> None:
        """Show what stays on the device, attach the hooks, load what the first pass starts with.

        Where that fails, or is interrupted, `close` undoes what was done.
        """
        for resident in self.assembly.residents:
            resident.show()
        self._backend.fence().synchronize()  # they were copied on this stream; forwards may come on others
        self.owner.make_room()
        self.ring.open()
        self._group_hooks += [GroupHook(self, group) for group in self.assembly.groups]
        self._hook_of |= {hook.group: hook for hook in self._group_hooks}
        self._uses.watch(entry for group in self.assembly.groups for entry in group.entries)
        self._attach()
        self._keeper.watch()
        self._streamer.prefill()

    def close(self) -> int:
        """Take hooks off, show tensors at rest, end the copy queue; return the bytes that were copied back to the host.

        Each step is taken although one before it failed, and all of them may be taken again.
        """
        returned: list[int] = []

        def restore(resident: Resident) -> None:
            returned.append(resident.rest())

        with contextlib.ExitStack() as steps:  # the last one that is put on it is taken first
            for resident in self.assembly.residents:
                steps.callback(restore, resident)
            for group in self.assembly.groups:  # memory goes although something still refers to this engine:
                steps.callback(group.close)  # a pass that ends by rearranging runs in it, and its successor has a ring
            steps.callback(self.ring.close)
            if self._computed is not None:
                steps.callback(self._computed.synchronize)  # what stays may go to others
            steps.callback(self._calls.open.clear)
            steps.callback(self._hook_of.clear)
            steps.callback(self._group_hooks.clear)
            steps.callback(self._streamer.close)
            if self._holds_on:
                steps.callback(self._streamer.release_all)  # what users wrote to it meanwhile is kept
            for hook in self._table_hooks:
                steps.callback(hook.forget)
            for attachment in self._attachments:
                steps.callback(attachment.remove)
            steps.callback(self._keeper.release)
        return sum(returned)

    def reset(self) -> None:
        """Forget a pass that was torn off, whichever thread it ran in."""
        with self._lock:
            self._calls = Calls()
        self._forget_pass()

    @outside_transforms
    def wake(self) -> None:
        """Have what a pass needs on the device, and let others make room for it first.

        Raises:
            torch.OutOfMemoryError: there is no room. What there was room for stays.
        """
        self.owner.make_room()  # not under the lock, which those who make room for others ask for
        if self.is_awake:
            return
        with self._lock, torch.inference_mode(False):  # the pass may run in it, and what is loaded outlives the pass
            if not self.assembly.residents.are_loaded:
                self.assembly.residents.load_again()
                self._backend.fence().synchronize()
            self.ring.open()

    def rest(self, *, resident: bool) -> int:
        """Let go of slots, and with `resident` of what stays as well; return the bytes, 0 where a pass runs."""
        with self._lock:
            if not self._calls.is_idle():
                return 0
            self._mend()
            before = self.held_bytes
            self._streamer.rest()
            if resident and self.assembly.residents.are_loaded:
                if self._computed is not None:
                    self._computed.synchronize()  # others may get the memory, who do not compute on the same stream
                self.returned_bytes += self.assembly.residents.rest()
            given = before - self.held_bytes
            if given:
                self._backend.trim()
            return given

    @property
    def is_awake(self) -> bool:
        """Whether slots and what stays are on the device."""
        return self.ring.is_open and self.assembly.residents.are_loaded

    @property
    def is_busy(self) -> bool:
        """Whether a pass runs, in whatever thread."""
        with self._lock:
            return not self._calls.is_idle()

    @property
    def resident_bytes(self) -> int:
        """What stays on the device while this is awake."""
        return self.assembly.residents.size_bytes

    @property
    def held_bytes(self) -> int:
        """Device memory of slots, of groups that are held outside them, and of what stays."""
        return self._streamer.held_bytes + (self.resident_bytes if self.assembly.residents.are_loaded else 0)

    @property
    def wanted_bytes(self) -> int:
        """Device memory that a pass holds."""
        whole = sum(group.size_bytes for group in self.assembly.groups) if self._is_whole else self.ring.size_bytes
        return whole + self.resident_bytes

    def unwritten_residents(self) -> dict[int, torch.Tensor]:
        """Return what stays on the device and is as it rests, by the id of the tensor at rest.

        Raises:
            ConflictError: a parameter was swapped, or one that is read from a file was written to.
        """
        self._streamer.drop_loads_of(self._keeper.take_changes())
        return self.assembly.residents.unwritten()

    def prefetch(self) -> None:
        """Load what the next pass starts with, where slots are there for it; unless one is open or was torn off."""
        with self._lock:
            if self._calls.thread is None and self._streamer.is_clean:
                self._streamer.prefill()

    @property
    def kept_bytes(self) -> int:
        """Device memory of groups that stay there, because somebody keeps a view of them."""
        return self._streamer.kept_bytes

    # --- passes

    def is_inside(self) -> bool:
        """Whether the calling thread is in a pass, or in a method that is one as soon as it needs weights."""
        return self._calls.is_inside()

    def begin(self, name: str, *, frame: FrameType | None = None, is_whole: bool = True) -> None:
        """Open a pass, or a call inside one.

        Raises:
            ConcurrentUseError: another thread is inside, or this process was forked since.
            TrainingError: gradients are asked for.
            ConflictError: a parameter was replaced since.
            StoreError: a file that weights rest in is no longer what it was.
        """
        refuse_fork(self.module, self._process)
        call = OpenCall(name, frame or frame_of_module_call(), is_whole)
        with self._lock:
            self._refuse_other_threads()
            self._mend()
            is_outermost = not self._calls.open
            if is_outermost:
                self._check_use()
            self._calls.begin(call)
        if is_outermost:
            self._handled = sys.exc_info()[1]
            self._streamer.track = track_of(self.module, self._backend)
            self.wake()
            self._began = self._backend.moment() if self._streamer.track is not None else None
            self.owner.begin_turn()
            self.assembly.residents.ask()
        if not is_outermost and name == "forward":
            self._end_pass()  # generate() called an encoder first: that is no part of the passes of its tokens
        if is_whole and (is_outermost or name == "forward"):
            self._streamer.begin_pass(name)
        if self._is_whole:
            for group in self.assembly.groups:
                self._streamer.acquire(group)

    def end(self, name: str) -> None:
        """Close what `begin` opened; nothing to do where `begin` refused."""
        with self._lock:
            call = self._calls.end(name)
        if call is None:
            return
        try:
            self._let_go(call, is_outermost=not self._calls.open)
            if not self._calls.open:
                self._after_pass(sys.exc_info()[1])
        finally:
            if not self._calls.open:
                self._handled = None
                self._calls.thread = None  # only now, so that no other thread begins while groups are being released

    def arm(self, name: str, frame: FrameType) -> OpenCall:
        """Note that a method runs, which is a pass from when it first needs weights."""
        call = OpenCall(name, frame)
        self._calls.arm(call)
        return call

    def disarm(self, call: OpenCall) -> None:
        """End what `arm` began, and the pass that it may have become."""
        if self._calls.disarm(call):
            self.end(call.name)

    def begin_if_outside(self, name: str, *, is_whole: bool) -> bool:
        """Have a pass open: the one that is, the method's that runs, or a new one by this name; tell if it is that."""
        if self._calls.is_running_here():
            return False
        self._refuse_other_threads()
        armed = self._calls.armed()
        if armed is not None:
            self.begin(armed.name, frame=armed.frame)
            return False
        self.begin(name, is_whole=is_whole)
        return True

    # --- groups

    def enter(self, group: ModuleGroup, module: nn.Module) -> None:
        """Acquire a group for `module`, after letting go of groups that nothing runs in."""
        if self._lingering and self._lingering != [group]:
            self._leave_lingering(group)
        if self._calls.open[0].is_whole:
            self._uses.note(module, group)
        self._streamer.acquire(group)

    def leave(self, group: ModuleGroup, *, is_last: bool) -> None:
        """Release a group after the last of its modules; after others, when the next group is entered."""
        lingering = self._lingering
        if is_last:
            if group in lingering:
                lingering.remove(group)
            self._streamer.release(group)
        elif group not in lingering:
            lingering.append(group)

    def read(self, group: ModuleGroup, owner: nn.Module) -> None:
        """Acquire a group because a weight of `owner` is read where it rests; it stays until another one is needed."""
        self.begin_if_outside(group.name, is_whole=False)
        self.enter(group, owner)
        hook = self._hook_of.get(group)
        if (hook is None or not hook.is_running) and group not in self._lingering and not self._is_whole:
            self._lingering.append(group)

    def moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the arguments of a call with tensors on the device."""
        return moved_call(args, kwargs, self.config.device, self.config.unmoved_kwargs)

    def keep_writes(self) -> None:
        """Let tensors at rest have what was written to those on the device, and owners have those at rest."""
        self._place.check_files()
        self._streamer.show_rest()

    def given(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a call of the module gives for `tensor`: for a weight at rest, the one on the device."""
        if not is_resting(tensor) or not self._calls.open or not self._keeper.knows(tensor):
            return tensor
        return self._keeper.serve(tensor, self.given)

    @property
    def _is_whole(self) -> bool:
        return self.config.granularity == "model_level"

    def _attach(self) -> None:
        record = self._attachments
        entries = [] if self._is_whole else [(entry, hook) for hook in self._group_hooks for entry in hook.entries]
        for entry, hook in entries:
            hooks.attach(entry, hook, record)
        for (table, _), lookup in zip(self.assembly.tables, self._table_hooks, strict=True):
            hooks.attach(table, lookup, record)
        for part in self.module.modules():
            if isinstance(part, nn.TransformerEncoder):
                hooks.attach(part, EncoderHook(), record)
        for name, part in parts_of(self.module, {entry for entry, _ in entries}):
            hooks.attach(part, PartHook(self, name), record)
        wrap_entry_points(self.module, self, record)
        for part in self.module.modules():
            hooks.mark(part, self, self._before_state_dict, record)
        Facade(self).attach(record)
        # Last, because hooks are put before those that are there: on the root itself the pass begins before its group.
        hooks.attach(self.module, PassHook(self), record)

    def _leave_lingering(self, wanted: ModuleGroup) -> None:
        lingering, self._lingering = self._lingering, []
        for group in lingering:
            if group is wanted:
                self._lingering.append(group)
                continue
            if group in self._hook_of:
                self._hook_of[group].learn_last()
            self._streamer.release(group)

    def _let_go(self, call: OpenCall, *, is_outermost: bool) -> None:
        self._lingering.clear()
        if is_outermost:
            for hook in self._group_hooks:
                hook.end_pass()
        if not self._holds_on and (is_outermost or not self._is_whole):
            self._streamer.release_all()
        if is_outermost:
            self._computed = self._backend.fence()
            if self._streamer.track is not None and self._began is not None:
                self._streamer.track.note("pass", call.name, self._began, self._backend.moment())
        if call.is_whole and (is_outermost or call.name == "forward"):
            self._end_pass()

    def _after_pass(self, error: BaseException | None) -> None:
        """Do what waits for the end of the outermost call. `error` is on its way, if any, or was before the call began."""
        if error is None or error is self._handled:
            self._place.check_files()  # what was written to meanwhile may be in what was computed
            if self._uses.has_returned and not self.kept_bytes:  # who has a weight may write to it
                self.owner.rearrange()
        elif isinstance(error, torch.OutOfMemoryError):
            self.owner.give_memory()

    def _end_pass(self) -> None:
        self._streamer.end_pass()
        self._uses.end_pass()

    def _before_state_dict(self) -> None:
        self._place.check_files()
        # After Ctrl-C groups are still on show in slots, which the next call overwrites.
        if not self._holds_on:
            self._streamer.show_rest()

    def _mend(self) -> None:
        """Forget what calls that no longer run left behind."""
        is_unclean = self._streamer.was_cut_short or (not self._holds_on and not self._streamer.is_clean)
        if self._calls.drop_torn() or (not self._calls.open and is_unclean):
            self._forget_pass()

    def _forget_pass(self) -> None:
        self._streamer.reset()
        self._uses.forget_pass()
        self._lingering.clear()
        for hook in self._group_hooks:
            hook.forget()
        for lookup in self._table_hooks:
            lookup.forget()

    def _refuse_other_threads(self) -> None:
        if self._calls.are_elsewhere:
            raise ConcurrentUseError(
                f"{type(self.module).__name__} is offloaded and running in another thread; its weights have one place on "
                "the device. Run one call at a time, or give each thread a model of its own. (If that thread is gone: "
                "offload_of(module).reset().)"
            )

    def _check_use(self) -> None:
        self._place.check_files()
        refuse_tracing(self.module)
        if self._trainable:
            refuse_training(self.module)
        self._streamer.drop_loads_of(self._keeper.take_changes())
        for group in self.assembly.groups:
            if group.is_outdated():
                raise ConflictError(
                    f"weights of {group.name or type(self.module).__name__} were written to, but they are read from a file "
                    "that does not change. The change is there: `with offload_of(module).edit(): pass` takes it in; make "
                    "others inside such a block"
                )
        holders: list[ModuleGroup | Resident] = []
        if self.assembly.residents.are_loaded:
            holders += [resident for resident in self.assembly.residents if not resident.is_buffer]
        holders += [] if self._holds_on else self.assembly.groups
        for holder in holders:
            replaced = holder.replaced()
            if replaced is not None:
                raise ConflictError(
                    f"{replaced} was replaced while its module is offloaded, which goes on reading the old one. The new one "
                    "is there: `with offload_of(module).edit(): pass` takes it in; replace others inside such a block"
                )
