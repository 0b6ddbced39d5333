"""The offloading of one module while it is on: hooks, passes, and who may use it.

A *pass* is one forward of the module, or one call of another entry point (``decode``, ``generate``). Groups are acquired and
released by hooks on the modules that need them; the pass tells where the recorded order begins and ends, moves the inputs,
and mends what a pass that was torn off (Ctrl-C) left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vramkit import hooks
from vramkit.errors import ConcurrentUseError, ConflictError, TrainingError
from vramkit.offload.arguments import any_requires_grad, moved_call
from vramkit.offload.assembly import Resident, assemble
from vramkit.offload.backend import backend_for
from vramkit.offload.config import OffloadConfig
from vramkit.offload.group import ModuleGroup
from vramkit.offload.resting import RestingPlace
from vramkit.offload.ring import SlotRing
from vramkit.offload.streamer import Counters, Streamer
from vramkit.offload.tables import TableHook
from vramkit.offload.turns import Turns

__all__ = ["Engine", "GroupHook", "PassHook"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Engine:
    """Built when offloading is applied, closed when it is removed. `owner` is the handle that users hold."""

    def __init__(
        self,
        module: nn.Module,
        config: OffloadConfig,
        place: RestingPlace,
        counters: Counters,
        *,
        turns: Turns | None,
        owner: object,
    ) -> None:
        """Assemble the groups, show what stays on the device, attach the hooks; see `assemble` for errors."""
        self.config = config
        self.owner = owner
        self.assembly = assemble(module, config, place)
        self._module = module
        self._turns = turns
        backend = backend_for(config.device)
        self.ring = SlotRing(backend, config.slots, self.assembly.slot_bytes)
        self._streamer = Streamer(self.assembly.groups, self.ring, backend, counters)
        self._trainable = any(parameter.requires_grad for parameter in module.parameters())
        self._lingering: GroupHook | None = None  # held although none of its modules runs
        self._open: list[str] = []  # entry points that are running, outermost first
        self._thread: int | None = None  # that they run in
        self._lock = threading.Lock()
        for resident in self.assembly.residents:
            resident.show()
        backend.fence().synchronize()  # they were copied on this stream; forwards may come on others
        self._group_hooks = [GroupHook(self, group) for group in self.assembly.groups]
        self._attachments = self._attach(place)
        self._streamer.prefill()

    def close(self) -> int:
        """Take hooks off, show tensors at rest, end the copy queue; return the bytes that were copied back to the host."""
        for attachment in self._attachments:
            attachment.remove()
        if self._turns is not None:
            self.evict()
        self._streamer.close()
        self._group_hooks.clear()  # they refer to this engine: device memory would wait for the garbage collector
        return sum(resident.restore() for resident in self.assembly.residents)

    def reset(self) -> None:
        """Forget a pass that was torn off, whichever thread it ran in."""
        with self._lock:
            self._open.clear()
            self._thread = None
        self._forget_pass()

    def evict(self) -> None:
        """Give back device memory that was kept for the next call; what users wrote to it meanwhile is kept."""
        for group in self.assembly.groups:
            group.keep_writes()
        self._streamer.release_all()

    def begin(self, entry_point: str) -> None:
        """Open a pass, or a call inside one.

        Raises:
            ConcurrentUseError: another thread is inside.
            TrainingError: gradients are asked for.
            ConflictError: a parameter was replaced since.
        """
        with self._lock:
            self._refuse_other_threads()
            was_torn = entry_point in self._open or (
                not self._open and self._turns is None and not self._streamer.is_clean
            )
            if was_torn:  # first of all, because it left groups on show that a check would take for replaced weights
                self._open.clear()
                self._forget_pass()
            is_outermost = not self._open
            if is_outermost:
                self._check_use()
            self._thread = threading.get_ident()
            self._open.append(entry_point)
        if is_outermost and self._turns is not None:
            self._turns.take(self)
        if self._is_whole:
            for group in self.assembly.groups:
                self._streamer.acquire(group)

    def end(self, entry_point: str) -> None:
        """Close what `begin` opened; nothing to do where `begin` refused."""
        with self._lock:
            if self._thread != threading.get_ident() or entry_point not in self._open:
                return
            del self._open[self._open.index(entry_point) :]
        try:
            self._let_go(entry_point, is_outermost=not self._open)
        finally:
            if not self._open:
                self._thread = None  # only now, so that no other thread begins while groups are being released

    def enter(self, hook: GroupHook) -> bool:
        """Acquire a group for one of its modules, after letting go of groups that nothing runs in; tell if in a pass."""
        self._refuse_other_threads()
        other, self._lingering = self._lingering, None
        if other is not None and other is not hook:
            other.learn_last()
            self._streamer.release(other.group)
        is_in_pass = bool(self._open)
        self._streamer.acquire(hook.group, in_pass=is_in_pass)
        return is_in_pass

    def leave(self, hook: GroupHook, *, is_last: bool) -> None:
        """Release a group after the last of its modules; after others, when the next group is entered."""
        self._lingering = None if is_last else hook
        if is_last:
            self._streamer.release(hook.group)

    @property
    def _is_whole(self) -> bool:
        return self.config.granularity == "model_level"

    def _attach(self, place: RestingPlace) -> list[hooks.Attachment]:
        attachments = [
            hooks.attach(entry, hook)
            for hook in ([] if self._is_whole else self._group_hooks)
            for entry in hook.group.entries
        ]
        for module, slot in self.assembly.tables:
            hook = TableHook(slot, place.pinned_memory(slot.rest), self.config.device)
            attachments.append(hooks.attach(module, hook))
        attachments += [hooks.wrap_method(self._module, name, self._around(name)) for name in self.config.entry_points]
        attachments += [hooks.mark(part, self, self._before_state_dict) for part in self._module.modules()]
        # Last, because hooks are put before those that are there: on the root itself the pass begins before its group.
        return [*attachments, hooks.attach(self._module, PassHook(self))]

    def _around(self, name: str) -> Callable[..., Any]:
        def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            try:
                args, kwargs = self.moved(args, kwargs)
                return method(*args, **kwargs)
            finally:
                self.end(name)

        return around

    def moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the arguments of a call with tensors on the device."""
        return moved_call(args, kwargs, self.config.device, self.config.unmoved_kwargs)

    def _let_go(self, entry_point: str, *, is_outermost: bool) -> None:
        self._lingering = None
        if is_outermost:
            for hook in self._group_hooks:  # a KeyboardInterrupt skips the hooks of the modules that it went through
                hook.learn_last()
                hook.forget()
        if self._turns is None and (is_outermost or not self._is_whole):
            self._streamer.release_all()
        if is_outermost or entry_point == "forward":
            self._streamer.end_pass()

    def _before_state_dict(self) -> None:
        # After Ctrl-C groups are still on show in slots, which the next call overwrites.
        if self._turns is None:
            self._streamer.show_rest()

    def _forget_pass(self) -> None:
        self._streamer.reset()
        self._lingering = None
        for hook in self._group_hooks:
            hook.forget()

    def _refuse_other_threads(self) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise ConcurrentUseError(
                f"{type(self._module).__name__} is offloaded and running in another thread; its weights have one place on "
                "the device. Run one call at a time, or give each thread a model of its own. (If that thread is gone: "
                "offload_of(module).reset().)"
            )

    def _check_use(self) -> None:
        if self._trainable and self._module.training and torch.is_grad_enabled():
            raise TrainingError(
                f"{type(self._module).__name__} is offloaded and in training mode with gradients on; streamed weights are "
                "overwritten before a backward could use them. Call it under torch.no_grad() (or .eval()), or remove() first"
            )
        for group in self.assembly.groups:
            if group.is_outdated():
                raise ConflictError(
                    f"weights of {group.name or type(self._module).__name__} were written to, but they are read from a file "
                    "that does not change; change weights inside `with offload_of(module).edit():`"
                )
        holders: list[ModuleGroup | Resident] = [r for r in self.assembly.residents if not r.is_buffer]
        holders += self.assembly.groups if self._turns is None else []
        for replaced in filter(None, (holder.replaced() for holder in holders)):
            raise ConflictError(
                f"{replaced} was replaced while its module is offloaded, so the new weights would never be used; "
                "change weights inside `with offload_of(module).edit():`"
            )


class PassHook(hooks.ModuleHook):
    """Opens and closes a pass around the forward of the offloaded module."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Open the pass and move the inputs."""
        self.engine.begin("forward")
        return self.engine.moved(args, kwargs)

    def post_forward(self, module: nn.Module) -> None:
        """Close the pass."""
        self.engine.end("forward")


class GroupHook(hooks.ModuleHook):
    """Acquires and releases one group around the modules that enter it.

    The group is released after the last of them. Which one that is, is taken from the definition and corrected by what runs.
    """

    def __init__(self, engine: Engine, group: ModuleGroup) -> None:
        self.group = group
        self._engine = engine
        self._entries = set(group.entries)
        self._last: nn.Module = group.entries[-1]
        self._recent: nn.Module | None = None  # left since the group was acquired
        self._running = 0

    def learn_last(self) -> None:
        """Take the module that was left most recently for the last one of a pass."""
        self._last, self._recent = self._recent or self._last, None

    def forget(self) -> None:
        """Forget a pass that was torn off."""
        self._recent, self._running = None, 0

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Have the group on the device."""
        if module not in self._entries:
            raise ConflictError(
                f"this {type(module).__name__} is a copy of an offloaded module and shares its hooks; "
                "copy after remove(), or build a second model"
            )
        if torch.is_grad_enabled() and (any_requires_grad(args) or any_requires_grad(kwargs)):
            raise TrainingError(
                f"an input of {self.group.name or type(module).__name__} asks for gradients, which would pass through "
                "streamed weights that are overwritten by then; detach() it, use torch.no_grad(), or remove() the offloading"
            )
        is_in_pass = self._engine.enter(self)
        self._running += 1
        return None if is_in_pass else self._engine.moved(args, kwargs)

    def post_forward(self, module: nn.Module) -> None:
        """Let the group go after its last module."""
        if module not in self._entries or not self._running:
            return
        self._running -= 1
        self._recent = module
        if not self._running:
            self._engine.leave(self, is_last=module is self._last)
