"""What applying returns: take the offloading off, change weights under it, read its figures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator

from torch import nn

from vramkit import hooks
from vramkit.errors import ConflictError
from vramkit.memory import tensor_bytes
from vramkit.offload.backend import backend_for
from vramkit.offload.config import OffloadConfig
from vramkit.offload.engine import Engine, PassHook
from vramkit.offload.resting import RestingPlace
from vramkit.offload.streamer import Counters
from vramkit.offload.turns import Turns

__all__ = ["Offload", "OffloadStats", "editable", "offload_of"]


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


class Offload:
    """The offloading of one module, from `apply_group_offloading` until `remove`."""

    def __init__(self, module: nn.Module, config: OffloadConfig, *, turns: Turns | None = None) -> None:
        """Apply `config`; see `apply_group_offloading` for errors. On an error nothing stays attached."""
        self.module = module
        self.config = config
        self._turns = turns
        self._counters = Counters()
        self._returned_bytes = 0
        hooks.prepare()
        self._place = RestingPlace(config, backend_for(config.device))
        try:
            self._engine: Engine | None = self._start()
        except BaseException:
            self._place.close()
            raise

    @property
    def is_active(self) -> bool:
        """Whether the module is offloaded now."""
        return self._engine is not None

    def remove(self) -> None:
        """Take hooks off and give the module its tensors back, in host memory. Later calls do nothing."""
        if self._engine is not None:
            self._stop()
            self._place.close()

    @contextlib.contextmanager
    def edit(self) -> Iterator[nn.Module]:
        """Open the module for changes: set or merge weights, add or replace modules (adapters), cast.

        Inside, it is an ordinary module in host memory, without hooks. Afterwards it is offloaded as before.
        """
        was_active = self._engine is not None
        if was_active:
            self._stop()
        try:
            yield self.module
        finally:
            if was_active:
                try:
                    self._engine = self._start()
                except BaseException:
                    self._place.close()
                    raise

    def reset(self) -> None:
        """Forget a pass that was torn off in a thread that is gone. A later call in the same thread does that by itself."""
        if self._engine is not None:
            self._engine.reset()

    def evict(self) -> None:
        """Give back device memory that is kept between calls (model offload)."""
        if self._engine is not None:
            self._engine.evict()

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
            resident_bytes=sum(resident.size_bytes for resident in engine.assembly.residents) if engine else 0,
            slots=engine.ring.slots if engine else 0,
            slot_bytes=engine.ring.slot_bytes if engine else 0,
            stores=dict(stores),
            table_bytes=sum(tensor_bytes(slot.rest) for _, slot in engine.assembly.tables) if engine else 0,
            pinned_bytes=self._place.pinned_bytes,
            returned_bytes=self._returned_bytes + self._place.copied_to_host_bytes,
            **dataclasses.asdict(self._counters),
        )

    def _start(self) -> Engine:
        return Engine(self.module, self.config, self._place, self._counters, turns=self._turns, owner=self)

    def _stop(self) -> None:
        assert self._engine is not None
        self._returned_bytes += self._engine.close()
        self._engine = None


def offload_of(module: nn.Module) -> Offload | None:
    """Return the handle of an offloaded `module`, or None."""
    for hook in hooks.attached(module, PassHook):
        if isinstance(hook.engine.owner, Offload):
            return hook.engine.owner
    return None


@contextlib.contextmanager
def editable(module: nn.Module) -> Iterator[None]:
    """Open every offloaded part of `module` for changes: `Offload.edit` of whatever is offloaded, itself or below it."""
    with contextlib.ExitStack() as stack:
        for part in list(module.modules()):
            offload = offload_of(part)
            if offload is not None:
                stack.enter_context(offload.edit())
        yield


def refuse_part_of_offloaded(module: nn.Module) -> None:
    """Raise ConflictError where a part of `module` belongs to a larger module that is offloaded."""
    covered = {part for root in module.modules() if offload_of(root) is not None for part in root.modules()}
    for name, part in module.named_modules():
        if part not in covered and any(isinstance(owner, Engine) for owner in hooks.marks(part)):
            raise ConflictError(
                f"{name or type(module).__name__} belongs to a larger module that is offloaded; change it inside "
                "`with offload_of(that module).edit():`, or change that module"
            )
