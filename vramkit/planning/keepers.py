"""Arguments that keep tensors for layers from call to call, as caches of convolutions do, and what calls change there.

What a call does with them is known by what it takes out and puts in. A layer reads its queues from the front alone, so two
calls that find the same at the front do the same, whatever is behind it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch
from torch import nn

__all__ = ["Change", "Keeper", "Kept", "Taken", "is_keeper"]

_Lie: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Keeper(Protocol):
    """Keeps tensors in queues, each for one layer, until calls of that layer take them; has no other state in a call."""

    def kept_for(self, layer: nn.Module) -> Sequence[deque[torch.Tensor]]:
        """Return the queues of `layer` themselves, which may be empty: always equally many in the same order."""

    def way(self) -> Hashable:
        """Return all else that decides what layers do with it."""


def is_keeper(value: Any) -> TypeGuard[Keeper]:
    """Tell whether an argument is one."""
    return hasattr(type(value), "kept_for")


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """What a call took from the front of a queue: another one does the same only where it finds this."""

    front: tuple[_Lie, ...]
    is_all: bool
    """Whether nothing was behind it: a layer may look whether there is something."""

    def is_in_front_of(self, queue: deque[torch.Tensor]) -> bool:
        """Tell whether a call that finds `queue` will take such tensors."""
        count = len(self.front)
        if len(queue) < count or (len(queue) == count) is not self.is_all:
            return False
        return all(_lie(tensor) == lie for tensor, lie in zip(queue, self.front, strict=False))


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What a call did to the queues that it was given, in their order."""

    taken: tuple[Taken, ...]
    taken_storages: tuple[int, ...]
    """Of what it took, by address; most of them are no more."""
    put: tuple[list[torch.Tensor], ...]
    gone_bytes: int
    """Of what was there and is no more."""
    left_storages: dict[int, int]
    """Bytes of what was there and still is, by address."""

    @property
    def is_one(self) -> bool:
        """Whether anything was taken or put."""
        return any(self.put) or any(taken.front for taken in self.taken)


class Kept:
    """The queues of keepers for some layers, at a call."""

    def __init__(self, keepers: Iterable[Keeper], layers: Sequence[nn.Module]) -> None:
        self._queues = [queue for keeper in keepers for layer in layers for queue in keeper.kept_for(layer)]

    def begins_with(self, taken: Sequence[Taken]) -> bool:
        """Tell whether a call that took `taken` would do so again."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - a look that is not of the call
            return all(each.is_in_front_of(queue) for each, queue in zip(taken, self._queues, strict=True))

    def watch(self) -> Callable[[], Change]:
        """Return what tells, after a call, what it changed; nothing is kept alive meanwhile."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            before = [[_Item(tensor) for tensor in queue] for queue in self._queues]
        return lambda: self._changed(before)

    def storages(self, taken: Sequence[Taken]) -> list[int]:
        """Return the storages, by address, of what a call that took `taken` would take."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            pairs = zip(taken, self._queues, strict=True)
            return [queue[at].untyped_storage()._cdata for each, queue in pairs for at in range(len(each.front))]  # noqa: SLF001

    def take(self, taken: Sequence[Taken]) -> None:
        """Take the same as a call did, and let go of it."""
        for each, queue in zip(taken, self._queues, strict=True):
            for _ in each.front:
                queue.popleft()

    def put(self, items: Iterable[Iterable[torch.Tensor]]) -> None:
        """Put the same as a call did."""
        for each, queue in zip(items, self._queues, strict=True):
            queue.extend(each)

    def _changed(self, before: list[list[_Item]]) -> Change:
        taken, storages, put = [], [], []
        for items, queue in zip(before, self._queues, strict=True):
            first = queue[0] if queue else None
            count = next(
                (at for at, item in enumerate(items) if first is not None and item.tensor() is first), len(items)
            )
            taken.append(Taken(tuple(item.lie for item in items[:count]), is_all=count == len(items)))
            storages += [item.storage for item in items[:count]]
            put.append(list(queue)[len(items) - count :])
        known = [(item, item.tensor() is not None) for items in before for item in items]
        return Change(
            taken=tuple(taken),
            taken_storages=tuple(storages),
            put=tuple(put),
            gone_bytes=sum(item.size_bytes for item, is_alive in known if not is_alive),
            left_storages={item.storage: item.size_bytes for item, is_alive in known if is_alive},
        )


class _Item:
    """A tensor in a queue, not kept alive."""

    __slots__ = ("lie", "size_bytes", "storage", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.lie, self.storage, self.size_bytes = _lie(tensor), storage._cdata, storage.nbytes()  # noqa: SLF001
        self.tensor = weakref.ref(tensor)


def _lie(tensor: torch.Tensor) -> _Lie:
    return tensor.shape, tensor.stride(), tensor.dtype
