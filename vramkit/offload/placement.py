"""The tensors of a group in one piece of device memory, and whether anybody else still has them.

A module may return a view of its own weight, keep one, or put it into a closure. The memory must not be used for anything
else then. Python counts who refers to a tensor and torch counts who refers to a storage (each region has one of its own), so
both counts are compared with what they were before the tensors were shown.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence

import torch

from vramkit import tensors
from vramkit.offload.watch import data_of, forget_data, with_data, written_through_data

__all__ = ["Placement"]


class Placement:
    """Tensors in one region. Made when nobody else has seen them yet."""

    def __init__(self, memory: torch.Tensor, placed: Iterable[torch.Tensor]) -> None:
        """Take `placed`, views of `memory`, and count who refers to them: nobody."""
        self.tensors = list(placed)
        self.address = memory.data_ptr()
        # What torch counts writes to (of a tensor with inner ones, those), and whose it is.
        self._counted: list[torch.Tensor] = []
        self._places: list[int] = []
        self._find_counted()
        self._addresses = self._find()
        self._versions = self._count_writes()
        self._references = _references(self.tensors)  # no local variable may refer to one now
        self._memory: torch.Tensor | None = None
        self._is_held = False
        self._may_have_data = True  # handed out
        self.is_replaced = False
        """Whether the module was given other tensors for some of these, so that they are what others have and no more."""
        self.asks = False
        """Whether those ask for gradients that do so at rest."""
        self.begin(memory)

    def ask(self, flags: Iterable[bool]) -> None:
        """Let tensors ask for gradients, or not, one flag for each."""
        for tensor, flag in zip(self.tensors, flags, strict=True):
            tensor.requires_grad_(flag)

    def begin(self, memory: torch.Tensor) -> None:
        """Count who refers to the storage of `memory`, where the tensors are: nobody will see them before this.

        Not where somebody has them still, from before the group was put away.
        """
        if self._is_held:
            return
        if self._may_have_data:
            for tensor in with_data(self.tensors):
                forget_data(tensor)
        self._may_have_data = True
        if memory is not self._memory:  # mostly it is, and to ask takes a microsecond
            self._storage = memory.untyped_storage()._cdata  # noqa: SLF001 (how torch names a storage to its counter)
            self._memory = memory  # last: a Ctrl-C may come before
        self._views = torch._C._storage_Use_Count(self._storage)  # noqa: SLF001

    def is_held_by_others(self) -> bool:
        """Tell whether somebody refers to a tensor, or to a view of one. Ask when no module has them any more."""
        views: int = torch._C._storage_Use_Count(self._storage)  # noqa: SLF001
        is_referred_to = any(map(operator.gt, _references(self.tensors), self._references))  # before anything here does
        own = self._views
        noted = with_data(self.tensors)
        self._may_have_data = bool(noted)
        if noted:
            # What was given other memory is noted, and neither it nor its ``.data`` is here any more.
            gone = 0 if self.is_whole() else sum(map(operator.ne, self._find(), self._addresses))
            own += len(noted) - 2 * gone
            is_referred_to |= _is_referred_to([data_of(tensor) for tensor in noted])
        self._is_held = is_referred_to or views > own
        return self._is_held

    def written(self) -> list[int]:
        """Return the places of tensors that were written to since this was asked last, in any way."""
        now, before = self._count_writes(), self._versions
        noted = with_data(self.tensors)
        if now == before and not noted:
            return []
        self._versions = now
        written = {at for at, new, old in zip(self._places, now, before, strict=True) if new != old}
        through_data = {id(tensor) for tensor in noted if written_through_data(tensor)}
        return [at for at, tensor in enumerate(self.tensors) if at in written or id(tensor) in through_data]

    def _find_counted(self) -> None:
        for at, tensor in enumerate(self.tensors):
            leaves = [leaf for leaf in _leaves(tensor) if not tensors.is_inference_made(leaf)]
            self._counted += leaves
            self._places += [at] * len(leaves)

    def _count_writes(self) -> list[int]:
        return list(map(tensors.write_count, self._counted))

    def is_whole(self) -> bool:
        """Tell whether all tensors are still where they were: not where one was given other memory (``.data``, ``set_``)."""
        return self._find() == self._addresses

    def _find(self) -> list[list[int]]:
        return [[leaf.data_ptr() for leaf in _leaves(tensor)] for tensor in self.tensors]


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if tensors.is_plain(tensor) else tensors.leaves(tensor)


def _is_referred_to(handed_out: list[torch.Tensor]) -> bool:
    """Tell whether anybody but the notes on tensors refers to what was handed out as their ``.data``."""
    return any(count > _references([object()])[0] + 1 for count in _references(handed_out))


def _references(placed: Sequence[object]) -> list[int]:
    return list(map(sys.getrefcount, placed))  # no variable of this function refers to one meanwhile
