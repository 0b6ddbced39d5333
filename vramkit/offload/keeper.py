"""Answers for the weights of one offloaded module, whoever touches them (see `vramkit.offload.watch`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from vramkit import tensors
from vramkit.errors import ConflictError
from vramkit.offload.assembly import Assembly
from vramkit.offload.disk import check_files_of
from vramkit.offload.group import ModuleGroup
from vramkit.offload.tables import Table
from vramkit.offload.tensor_slot import TensorSlot
from vramkit.offload.watch import data_at_rest, is_resting, released, resting

__all__ = ["WeightKeeper"]

_LOOKUPS = (F.embedding, torch.embedding)


class Pass(Protocol):
    """What the keeper asks of the engine."""

    def is_inside(self) -> bool:
        """Whether the calling thread is in a pass."""

    def read(self, group: ModuleGroup, owner: nn.Module) -> None:
        """Have `group` on the device, because a weight of `owner` is read."""


class WeightKeeper:
    """Knows where the values of each parameter of a module are, and what was done to it at rest."""

    def __init__(
        self, module: nn.Module, assembly: Assembly, tables: Mapping[int, Table], device: torch.device, passes: Pass
    ) -> None:
        self._module = module
        self._passes = passes
        self._device = device
        self._tables = tables  # by the id of their tensor at rest, as all of these
        self._groups: dict[int, list[tuple[ModuleGroup, TensorSlot]]] = {}
        for group in (*assembly.groups, *assembly.table_groups):
            for slot in group.slots():
                self._groups.setdefault(id(slot.rest), []).append((group, slot))
        self._residents = {
            id(resident.slot.rest): resident
            for resident in assembly.residents
            if not resident.is_buffer and resident.on_device is not resident.slot.rest
        }
        self._rests = {id(slot.rest): slot.rest for held in self._groups.values() for _, slot in held}
        self._rests |= {id(resident.slot.rest): resident.slot.rest for resident in self._residents.values()}
        self._aliases: dict[
            int, tuple[torch.Tensor, int]
        ] = {}  # what `.data` is, and its version when it was last seen
        self._handed_out: set[int] = set()

    def watch(self) -> None:
        """Begin to see who touches the parameters."""
        for rest in self._rests.values():
            resting(rest, self)

    def release(self) -> None:
        """Let the parameters be what they were. May be called again."""
        for rest in self._rests.values():
            released(rest, self)
        self._aliases.clear()

    def take_changes(self) -> list[ModuleGroup]:
        """Return the groups whose bytes may have been changed at rest since the last time, behind the back of torch.

        Raises:
            ConflictError: such a group is read from a file, which does not change; or a parameter was swapped.
        """
        for rest in self._rests.values():
            if not is_resting(rest):  # ``torch.utils.swap_tensors`` gives it another class, too
                self.refuse_replacing(rest)
        changed = [key for key, (alias, version) in self._aliases.items() if tensors.version(alias) != version]
        for key, resident in self._residents.items():
            resident.refresh(anyway=key in changed or key in self._handed_out)
            if key in self._groups:  # a tied weight that travels for others
                resident.keep_writes()
        if not changed and not self._handed_out:
            return []
        groups: dict[int, ModuleGroup] = {}
        for group, slot in (held for key in {*changed, *self._handed_out} for held in self._groups.get(key, ())):
            if group.differs_from_file(slot):
                raise ConflictError(
                    f"{self._name(slot.rest)} was written to, but it is read from a file that does not change. The change "
                    "is there: `with offload_of(module).edit(): pass` takes it in; make others inside such a block"
                )
            groups[id(group)] = group
        for key in changed:
            alias, _ = self._aliases[key]
            self._aliases[key] = alias, tensors.version(alias)
        self._handed_out.clear()
        return list(groups.values())

    # What `vramkit.offload.watch.Keeper` asks for.

    def knows(self, rest: torch.Tensor) -> bool:
        """Whether `rest` is one of them."""
        return self._rests.get(id(rest)) is rest

    def is_inside(self) -> bool:
        """Whether the calling thread is in a pass."""
        return self._passes.is_inside()

    def witness(self) -> torch.Tensor:
        """Return an empty tensor on the device that computes."""
        return torch.empty(0, device=self._device)

    def serve(self, rest: torch.Tensor, reader: Callable[..., Any]) -> torch.Tensor:
        """Return what is on the device for `rest`, for the function `reader`."""
        if id(rest) in self._residents:
            return self._residents[id(rest)].on_device
        if id(rest) in self._tables and reader in _LOOKUPS:
            return self._tables[id(rest)].on_device
        held = self._groups[id(rest)]
        group, slot = next((pair for pair in held if pair[0].on_device(rest) is not None), held[0])
        self._passes.read(group, slot.owners[0][0])
        placed = group.on_device(rest)
        assert placed is not None
        return placed

    def check(self, rest: torch.Tensor) -> None:
        """Raise StoreError where the memory of `rest` may not be touched: its file is no longer what it was."""
        check_files_of(tensors.leaves(rest))

    def alias(self, rest: torch.Tensor) -> torch.Tensor:
        """Return ``rest.data``, one and the same for all who ask, so that writes to it are counted."""
        if id(rest) not in self._aliases:
            alias = data_at_rest(rest)
            self._aliases[id(rest)] = alias, tensors.version(alias)
        return self._aliases[id(rest)][0]

    def handed_out(self, rest: torch.Tensor) -> None:
        """Note that somebody has the memory of `rest`, and may write to it without a trace."""
        self._handed_out.add(id(rest))

    def refuse_replacing(self, rest: torch.Tensor) -> NoReturn:
        """Raise ConflictError: the memory of `rest` would be replaced."""
        raise ConflictError(
            f"{self._name(rest)} was given other memory (.data, set_, swap_tensors) while its module is offloaded, which "
            "would never be used; change weights inside `with offload_of(module).edit():`"
        )

    def _name(self, rest: torch.Tensor) -> str:
        names: Sequence[str] = [name for name, held in self._module.named_parameters() if held is rest]
        return names[0] if names else "a weight"
