"""What applying returns: take the offloading off, change weights under it, read its figures."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from vramkit import hooks
from vramkit.errors import ConflictError, StoreError
from vramkit.memory import format_bytes, module_bytes, tensor_bytes
from vramkit.offload.assembly import partitioned
from vramkit.offload.backend import backend_for
from vramkit.offload.collector import collector_paused
from vramkit.offload.config import OffloadConfig
from vramkit.offload.engine import Engine
from vramkit.offload.partition import moved_bytes
from vramkit.offload.resting import RestingPlace
from vramkit.offload.stats import Counters, OffloadStats
from vramkit.offload.turns import Turns, chosen_turns
from vramkit.offload.uses import Uses
from vramkit.offload.watch import refuse_lost

__all__ = ["Offload"]

_REARRANGEMENTS = 3  # one for the first whole pass, two for other kinds of passes


class Offload:
    """The offloading of one module, from `apply_group_offloading` until `remove`."""

    def __init__(
        self, module: nn.Module, config: OffloadConfig, *, turns: Turns | None = None, holds_on: bool = False
    ) -> None:
        """Apply `config`; see `apply_group_offloading` for errors. On an error nothing stays attached.

        It takes turns with what shares `turns`; None: with all on its device that have none of their own. What it has
        loaded stays after a pass if it `holds_on`.
        """
        self.module = module
        self.config = config
        self._granted = config  # what there was room for
        self._turns = chosen_turns(turns, config.device)
        self._holds_on = holds_on
        self._counters = Counters()
        self._returned_bytes = 0
        self._uses = Uses(is_recording=config.granularity != "model_level")
        self._rearrangements = 0
        self._has_warned = self._was_moved = self._is_edited = False
        hooks.prepare()
        self._place = RestingPlace(config, backend_for(config.device))
        self._engine: Engine | None = None
        self._turns.add(self)
        try:
            self._start()
        finally:
            self._place.end_applying(is_applied=self._engine is not None)

    @property
    def is_active(self) -> bool:
        """Whether the module is offloaded now."""
        return self._engine is not None

    @property
    def is_edited(self) -> bool:
        """Whether the module is open for changes now, after which it is offloaded again."""
        return self._is_edited

    @property
    def is_running_elsewhere(self) -> bool:
        """Whether a pass runs in another thread."""
        return self._engine is not None and self._engine.is_busy and not self._engine.is_inside()

    def remove(self) -> None:
        """Take hooks off and give the module its tensors back, in host memory. Inside `edit`, where it has them, for good.

        Later calls do nothing, or finish what one that failed has left undone.

        Raises:
            StoreError: a file that weights rest in was cut or written to. The module is taken off all the same, and its
                weights are lost: of a file that was cut, whoever touches one gets a StoreError until it is replaced.
        """
        self._is_edited = False
        try:
            self._end()
        except BaseException:
            self._end()  # what an interrupt has cut short goes to its end: each step may be taken again
            raise

    @contextlib.contextmanager
    def edit(self) -> Iterator[nn.Module]:
        """Open the module for changes: set or merge weights, add or replace modules (adapters), cast.

        Inside, it is an ordinary module in host memory, without hooks. Afterwards it is offloaded as before.
        """
        was_active = self._engine is not None
        self._place.check_files()
        self._is_edited |= was_active
        try:
            self._stop()
            yield self.module
        finally:
            if was_active and self._is_edited:  # not removed meanwhile
                self._stop()  # again, if it was interrupted
                self._is_edited = False
                self._uses.keep(self.module.modules())
                self._start()

    def reset(self) -> None:
        """Forget a pass that was torn off in a thread that is gone. A later call in the same thread does that by itself."""
        if self._engine is not None:
            self._engine.reset()

    def __repr__(self) -> str:
        """Return a short table: what streams through which slots, what stays, where the rest lies."""
        name = type(self.module).__name__
        if self._engine is None:
            return f"Offload of {name}: removed"
        where = f"{self.config.granularity.replace('_', ' ')} on {self.config.device}"
        return "\n".join([f"Offload of {name}, {where}", *self.stats().lines()])

    # --- memory

    def rest(self, *, resident: bool = True) -> int:
        """Let go of device memory until the next pass, which has it again: slots, and with `resident` what stays as well.

        Returns the bytes; 0 where a pass runs.
        """
        return 0 if self._engine is None else self._engine.rest(resident=resident)

    def adapt(self, *, slots: int | None = None, resident: int | str | None = None) -> None:
        """Have more or fewer `slots`, or more or fewer `resident` bytes (or text), from the next pass on.

        Weights stay where they rest, and those on the device that still belong there do not move. What is None stays as it
        was asked for, also where there was no room for it before. All or nothing, as `edit` is.

        Raises:
            ConfigError: an option cannot be used.
            ConflictError: a pass runs, or the module is not offloaded.
        """
        config = self.config.adapted(slots=slots, resident=resident)
        self._place.check_files()
        if self._engine is None or self._engine.is_inside() or self._engine.is_busy:
            what = "is not offloaded any more" if self._engine is None else "is running"
            raise ConflictError(
                f"{type(self.module).__name__} {what}; adapt() changes a module that is offloaded, between calls"
            )
        before = self.config, self._granted
        try:
            self.config = self._granted = config
            self._restart()
        except BaseException:
            self.config, self._granted = before
            self._stop()
            self._start()
            raise

    def join(self, turns: Turns | None, *, activation_bytes: int = 0) -> None:
        """Take `turns` from now on, and no others; None: with all on its device that have none of their own.

        Of their budget, `activation_bytes` are left free while it runs.

        Raises:
            ConfigError: `turns` are none, or `activation_bytes` are below 0.
        """
        turns = chosen_turns(turns, self.config.device)
        turns.add(self, activation_bytes=activation_bytes)
        if turns is not self._turns:
            self._turns.remove(self)
            self._turns = turns

    @property
    def is_at_rest(self) -> bool:
        """Whether it would need room to run: its slots are not on the device, or (model level) its weights."""
        engine = self._engine
        if engine is None or self.config.granularity == "model_level":
            return engine is None or engine.held_bytes <= engine.resident_bytes
        return engine.ring.slots > 0 and not engine.ring.is_open

    @property
    def held_bytes(self) -> int:
        """Device memory that it holds now: slots, and weights that stay."""
        return 0 if self._engine is None else self._engine.held_bytes

    @property
    def wanted_bytes(self) -> int:
        """Device memory that it holds while it runs."""
        return self._granted.resident_bytes if self._engine is None else self._engine.wanted_bytes

    def prefetch(self) -> None:
        """Begin loading what the next call starts with, where it is not there: for callers who know that it is near.

        What is idle makes room for it, as in that call.
        """
        if (engine := self.current_engine()) is not None:
            engine.prefetch()

    def stats(self) -> OffloadStats:
        """Return the figures; those of the groups are zero after `remove`."""
        engine = self._engine
        groups = engine.assembly.groups if engine else []
        stores: Counter[str] = Counter()
        for group in groups:
            for _, size_bytes, store in group.stores:
                stores[store.kind] += size_bytes
        return OffloadStats(
            groups=len(groups),
            streamed_bytes=sum(group.size_bytes for group in groups),
            resident_bytes=engine.resident_bytes if engine else 0,
            slots=engine.ring.slots if engine else 0,
            slot_bytes=engine.ring.slot_bytes if engine else 0,
            stores=dict(stores),
            kept_bytes=engine.kept_bytes if engine else 0,
            table_bytes=sum(tensor_bytes(slot.rest) for _, slot in engine.assembly.tables) if engine else 0,
            pinned_bytes=self._place.pinned_bytes,
            held_bytes=self.held_bytes,
            returned_bytes=self._returned_bytes
            + (engine.returned_bytes if engine else 0)
            + self._place.copied_to_host_bytes,
            **dataclasses.asdict(self._counters),
        )

    # --- what the engine asks for

    def current_engine(self) -> Engine | None:
        """Return the engine that runs, ready for a pass.

        Where modules were added or replaced outside `edit`, they are first taken in; where there is no room for what it
        had, it has less.
        """
        if self._engine is None or self._engine.is_inside() or self._engine.is_busy:
            return self._engine
        if self._engine.is_stale:
            with self.edit():
                pass
        if self._engine.config != self._granted:
            self._restart()
        asked = self._granted
        if not self._has_woken():
            self._restart()
            self._tell_of_less(asked)
        return self._engine

    def begin_turn(self) -> None:
        """Note that a pass begins."""
        self._turns.begin(self)

    def make_room(self) -> None:
        """Let others go, as far as it is needed."""
        self._turns.make_room(self)

    def is_first_move(self) -> bool:
        """Whether nobody has tried to move the module before."""
        was_moved, self._was_moved = self._was_moved, True
        return not was_moved

    def give_memory(self) -> None:
        """Let go of all that can be spared: a pass ended because the device had no room for what the module computes.

        Whether it is repeated is for the caller to say, who knows what it has changed.
        """
        if self.config.mesh is not None:
            return  # the error ends all ranks
        asked = self._granted
        freed = self._turns.relieve(self)
        spared = asked.adapted(slots=min(asked.slots, 2), resident=0)
        self._granted = spared if spared != asked else asked.lesser(0) or asked
        if self._granted == asked and not freed:
            self._warn_of_memory("There is nothing left to give: take a smaller input, tiles, or leaf level")
            return
        freed += self.rest()
        self._warn_of_memory(
            f"Let go of {format_bytes(freed)} for another try; from now on it has {_share(self._granted)}"
        )

    def rearrange(self) -> None:
        """Form units by the uses that were recorded, where that moves fewer bytes than the units of now."""
        self._uses.has_returned = False
        self._rearrangements += 1
        self._uses.is_recording = self._rearrangements < _REARRANGEMENTS
        times = self._uses.times(self.module)
        if self._engine is None or times is None:
            return
        present = set(self.module.modules())
        if not all(present.issuperset(unit.holders) for unit in self._engine.assembly.units):
            return  # the forward replaced modules
        units = partitioned(self.module, self._granted, times).units
        if moved_bytes(units, times) < moved_bytes(self._engine.assembly.units, times):
            with torch.inference_mode(mode=False):  # the call that ends may run in it, and the slots outlive the call
                self._stop()
                try:
                    self._start(or_less=False)
                except (RuntimeError, OSError):
                    self._uses.give_up()  # there was room for the units of before
                    self._start()

    # --- engines

    def _restart(self) -> None:
        """Run as `_granted` says; what is on the device and belongs there stays."""
        assert self._engine is not None
        with torch.inference_mode(mode=False):  # a call may begin in it, and what is made here outlives the call
            on_device = self._engine.unwritten_residents()
            self._stop()
            self._start(on_device)

    @collector_paused()
    def _start(self, on_device: dict[int, torch.Tensor] | None = None, *, or_less: bool = True) -> None:
        """Have an engine, with less than `_granted` where there is no room for that, if it may be less."""
        asked = self._granted
        try:
            while not self._has_started(on_device, or_less=or_less):
                on_device = None
        except BaseException:
            self.remove()
            raise
        self._tell_of_less(asked)

    def _has_started(self, on_device: dict[int, torch.Tensor] | None, *, or_less: bool) -> bool:
        try:
            self._turns.make_room(self)
            self._engine = Engine(
                self.module,
                self._granted,
                self._place,
                self._counters,
                owner=self,
                uses=self._uses,
                holds_on=self._holds_on,
                on_device=on_device,
            )
            self._engine.open()
        except torch.OutOfMemoryError:
            if not or_less or not self._has_less():
                raise
        else:
            return True
        self._stop()  # only now: while the error was handled, its traceback kept what had been allocated
        return False

    def _has_woken(self) -> bool:
        """Wake the engine; where there is no room for what it had, settle for less and return False."""
        assert self._engine is not None
        try:
            self._engine.wake()
        except torch.OutOfMemoryError:
            if not self._has_less():
                raise
            return False
        return True

    def _has_less(self) -> bool:
        """Let others go, or else settle for less; tell if there was something to give."""
        if self.config.mesh is not None:
            return False  # what one rank has less of, the others would have to have less of as well
        if self._turns.relieve(self):
            return True
        lesser = self._granted.lesser(module_bytes(self.module))
        self._granted = lesser or self._granted
        return lesser is not None

    def _tell_of_less(self, asked: OffloadConfig) -> None:
        if self._granted != asked:
            self._warn_of_memory(f"Of {_share(asked)} it has {_share(self._granted)}")

    def _warn_of_memory(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            name = type(self.module).__name__
            warnings.warn(
                f"the device had no room for {name}, others may use it too. {what}. (This is said once.)",
                RuntimeWarning,
                stacklevel=2,
            )

    @collector_paused()
    def _stop(self) -> None:
        if self._engine is not None:
            self._returned_bytes += self._engine.close() + self._engine.returned_bytes
            self._engine = None

    def _end(self) -> None:
        self._stop()
        self._turns.remove(self)
        try:
            self._place.close()
        except StoreError:
            refuse_lost(self.module)
            raise


def _share(config: OffloadConfig) -> str:
    return f"{config.slots} slots and {format_bytes(config.resident_bytes)} that stay"
