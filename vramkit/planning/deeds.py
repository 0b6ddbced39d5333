"""What calls did, told so that it can be entered again without running them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vramkit.offload.arguments import with_tensors
from vramkit.planning.answers import Results
from vramkit.planning.holes import Course
from vramkit.planning.keepers import Taken

__all__ = ["Deed", "Known", "Outline"]


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Nobody is told of tensors that are made meanwhile, nor asked."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # noqa: SLF001 - torch has no public names
        yield


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: among those that were given, or in a storage of a result."""

    given: int | None
    storage: int  # its address
    numbers: int  # that the storage holds
    offset: int
    strides: tuple[int, ...]


class Outline:
    """A value whose tensors are known by how they lie in memory alone, or as one of those that were `given`."""

    def __init__(self, value: Any, given: Sequence[torch.Tensor | None] = ()) -> None:
        """Take `value`; its tensors are not kept alive."""
        self._places: dict[int, _Place] = {}
        at = {id(tensor): place for place, tensor in enumerate(given) if tensor is not None}
        with _unseen():
            self._value = with_tensors(value, lambda tensor: self._note(tensor, at.get(id(tensor))))

    def filled(
        self, given: Sequence[torch.Tensor | None] = (), enter: Callable[[torch.Tensor], None] = lambda _: None
    ) -> Any:
        """Return the value with new tensors, without memory, in the place of its own; `enter` is told of each."""
        storages: dict[tuple[int, torch.dtype], torch.Tensor] = {}

        def make(bare: torch.Tensor) -> torch.Tensor:
            place = self._places[id(bare)]
            known = None if place.given is None else given[place.given]
            if known is not None:
                return known
            key = place.storage, bare.dtype
            if key in storages:
                return storages[key].as_strided(bare.shape, place.strides, place.offset)
            storages[key] = new = _made(bare, place)
            enter(new)
            return new

        with _unseen():
            return with_tensors(self._value, make)

    def _note(self, tensor: torch.Tensor, given: int | None) -> torch.Tensor:
        bare = torch.empty((), dtype=tensor.dtype, device="meta").expand(tensor.shape)
        storage = tensor.untyped_storage()
        numbers = storage.nbytes() // tensor.itemsize
        place = _Place(given, storage._cdata, numbers, int(tensor.storage_offset()), tensor.stride())  # noqa: SLF001
        self._places[id(bare)] = place
        return bare


def _made(bare: torch.Tensor, place: _Place) -> torch.Tensor:
    """Return a tensor that lies in `place`, in a storage that is as large."""
    if place.numbers == bare.numel() and not place.offset:
        return torch.empty_strided(bare.shape, place.strides, dtype=bare.dtype, device="meta")
    whole = torch.empty(place.numbers, dtype=bare.dtype, device="meta")
    return whole.as_strided(bare.shape, place.strides, place.offset)


@dataclasses.dataclass(frozen=True, slots=True)
class Deed:
    """What a call of one kind did."""

    output: Outline | None
    """What it returned, what the lists hold then that it wrote to, by their place among those that it was given, and what
    it put into queues of keepers.

    None where it holds or writes to what may keep state: such a call is run again.
    """
    taken: tuple[Taken, ...]
    """What it took from these queues; the same has to be there for it to be done again."""
    grown_bytes: int  # peak over what was alive when it began
    kept_bytes: int  # tables that the first call made for all that follow
    flops: int
    course: Course


@dataclasses.dataclass(slots=True)
class Known:
    """What rehearsals have seen: calls by component, what of it was called, and shapes of the arguments; operators."""

    deeds: dict[Any, list[Deed]] = dataclasses.field(default_factory=dict)
    results: Results = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How each component computes now: what it did otherwise does not count."""
    is_repeated: bool = True
    """Whether what was done before is entered again; else all is run each time."""
