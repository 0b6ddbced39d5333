"""What resting and shown weights have in common: a class derived from the one that they had, and taken off for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch

from vramkit import tensors

__all__ = ["ALIAS", "SHOWN", "Watched", "as_they_were", "derived", "has_memory_of"]

_Result = TypeVar("_Result")

ALIAS, SHOWN = "_vramkit_data", "_vramkit_shown"  # notes that a shown tensor carries, and pickles of it do not


class Watched:
    """Mixed into the class of a parameter; copies, pickles and prints are of the parameter that it was."""

    watched_kind: type[torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        tensor = cast("torch.Tensor", self)
        copied: torch.Tensor = as_they_were([tensor], lambda: tensor.__deepcopy__(memo))  # type: ignore[no-untyped-call]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor = cast("torch.Tensor", self)
        make, made_of, *rest = as_they_were([tensor], lambda: tensor.__reduce_ex__(protocol))  # type: ignore[no-untyped-call]
        return make, tuple(map(_without_notes, made_of)), *rest

    def __repr__(self) -> str:
        tensor = cast("torch.Tensor", self)
        return as_they_were([tensor], repr, tensor)


def as_they_were(
    watched: Iterable[torch.Tensor], function: Callable[..., _Result], /, *args: Any, **kwargs: Any
) -> _Result:
    """Call `function` while tensors are of the class that they had."""
    classes = [(cast("Any", tensor), type(tensor)) for tensor in watched if isinstance(tensor, Watched)]
    try:
        for tensor, kind in classes:
            tensor.__class__ = kind.watched_kind
        result = function(*args, **kwargs)
        _put_back(classes)
    except BaseException:  # not `finally`: a Ctrl-C may come in the middle of putting back
        _put_back(classes)
        raise
    return result


def _put_back(classes: Iterable[tuple[Any, type]]) -> None:
    for tensor, kind in classes:
        tensor.__class__ = kind


def derived(kind: type[torch.Tensor], mixin: type, members: dict[str, Any]) -> type[torch.Tensor]:
    """Derive a class from `kind` that goes by its name: messages and files that name classes stay as they were."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "watched_kind": kind}
    derive: Any = type(kind)
    return cast("type[torch.Tensor]", derive(kind.__name__, (mixin, kind), named | members))


def has_memory_of(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two plain tensors are the same numbers in the same memory."""
    if not tensors.is_plain(tensor) or not tensors.is_plain(other) or other.device != tensor.device:
        return False
    mine = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return mine == (other.data_ptr(), other.dtype, other.shape, other.stride())


def _without_notes(attributes: Any) -> Any:
    is_noted = type(attributes) is dict and SHOWN in attributes
    return {key: attributes[key] for key in attributes if key not in (ALIAS, SHOWN)} if is_noted else attributes
