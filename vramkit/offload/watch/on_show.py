"""What owners have while their group is on the device: what is written to it through ``.data`` is found again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch

from vramkit import tensors
from vramkit.errors import ConflictError
from vramkit.offload.watch.base import ALIAS, SHOWN, Watched, derived, has_memory_of

__all__ = ["data_of", "forget_data", "shown", "stand_in", "stands_for", "with_data", "written_through_data"]


def shown(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Wrap `tensor`, on the device, so that a module can own it as it owns `like`."""
    kind = _shown_class(tensors.kind_of(like)) if tensors.is_plain(like) else None
    owned = tensors.as_owned(tensor, like=like, kind=kind)
    stand_in(owned, like)
    return owned


def stand_in(tensor: torch.Tensor, rest: torch.Tensor) -> None:
    """Note on `tensor` that owners have it for `rest` for a while."""
    setattr(tensor, SHOWN, id(rest))


def stands_for(tensor: torch.Tensor, rest: torch.Tensor) -> bool:
    """Tell whether `tensor` was made to be shown for `rest`, by whichever group."""
    return getattr(tensor, SHOWN, None) == id(rest)


def with_data(shown_tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return those of which ``.data`` was handed out."""
    found = []
    for tensor in shown_tensors:  # asked twice a pass of each group: a comprehension takes longer than what it does
        if ALIAS in tensor.__dict__:
            found.append(tensor)  # noqa: PERF401
    return found


def forget_data(tensor: torch.Tensor) -> None:
    """Forget what was handed out as ``.data`` of a shown tensor."""
    vars(tensor).pop(ALIAS, None)


def data_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what was handed out as ``.data`` of a shown tensor (`with_data`), and may still be written to."""
    return _noted(tensor)[0]


def written_through_data(tensor: torch.Tensor) -> bool:
    """Tell whether somebody wrote to a shown tensor through ``.data`` (`with_data`) since this was asked last."""
    alias, before = _noted(tensor)
    vars(tensor)[ALIAS] = alias, tensors.version(alias)
    return tensors.version(alias) != before


class _Shown(Watched):
    """Mixed into the class of a parameter on show."""


def _noted(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what was handed out as ``.data``, and its version when it was last looked at."""
    noted: tuple[torch.Tensor, int] = vars(tensor)[ALIAS]
    return noted


def _refuse_unlike(tensor: torch.Tensor, given: torch.Tensor) -> None:
    """Raise ConflictError where the tensor at rest could not take the values of what is `given`."""
    if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
        raise ConflictError(
            f"a weight of {list(tensor.shape)}, {tensor.dtype}, was given memory of {list(given.shape)}, {given.dtype}, "
            "while its module is offloaded; resize and cast inside `with offload_of(module).edit():`"
        )


@functools.cache
def _shown_class(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    def get_data(self: Any) -> torch.Tensor:
        held = vars(self)
        if ALIAS not in held:
            held[ALIAS] = cast("Any", kind.data).__get__(self), 0
        alias: torch.Tensor = held[ALIAS][0]
        return alias

    def note_other_memory(self: Any) -> None:
        vars(self)[ALIAS] = cast("Any", kind.data).__get__(self), -1  # no version: that is how the change is found

    def set_data(self: Any, value: torch.Tensor) -> None:
        _refuse_unlike(self, value)
        cast("Any", kind.data).__set__(self, value)
        note_other_memory(self)

    def set_(self: Any, source: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Torch's parametrizations set a parameter to itself at every use, which would count as a write.
        if isinstance(source, torch.Tensor) and not args and not kwargs and has_memory_of(self, source):
            return cast("torch.Tensor", self)
        if isinstance(source, torch.Tensor) and not args and not kwargs:
            _refuse_unlike(self, source)
        kind.set_(self, *(() if source is None else (source, *args)), **kwargs)
        note_other_memory(self)
        return cast("torch.Tensor", self)

    return derived(kind, _Shown, {"data": property(get_data, set_data), "set_": set_})
