"""How much arguments of a call ask for, noted when they are given: what is noted does not change with them later.

Looked into are lists and other sequences, sets, mappings, dataclasses, `functools.partial`, and what a function has as
defaults and in its closure, one level deep: a closure in a closure is known by its code. Not looked into are objects of
other classes (caches, modules, the object of a bound method, iterators), attributes of what is looked into, and globals that
a function reads: of these, two of one kind count as equally large.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
import types
from collections import deque
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from vramkit.offload.arguments import fields_of

__all__ = ["Extent"]

_VALUES = (bool, np.bool_, enum.Enum, torch.dtype, torch.device, type)  # of another kind where they differ
_BY_LENGTH = (str, bytes, bytearray, range)


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """What kind of value something is, and how large that and all in it are."""

    kind: Any
    """Its class, or that and what else makes values of that class unlike each other."""
    size: tuple[Any, ...] | None = None
    parts: Mapping[Any, Extent] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, *, inside: tuple[int, ...] = (), is_in_closure: bool = False) -> Extent:
        """Note the extent of `value`, which lies inside of the objects that have the ids `inside`."""
        kind, size = _kind_of(value), _size_of(value)
        if size is not None or id(value) in inside:
            return cls(kind, size)
        is_closed = is_in_closure and isinstance(value, types.FunctionType)
        held = {} if is_closed else _held_by(value)
        is_in_closure = is_in_closure or isinstance(value, types.FunctionType)
        note = functools.partial(cls.of, inside=(*inside, id(value)), is_in_closure=is_in_closure)
        parts = {key: note(each) for key, each in held.items()}
        if isinstance(value, Set):
            parts = dict(enumerate(sorted(parts.values(), key=_order)))
        return cls(kind, None, parts)

    def is_within(self, planned: Extent) -> bool:
        """Whether nothing here is larger than in what was `planned`, or of another kind; one text may lie in a list."""
        if self.is_a(list) and len(self.parts) == 1 and planned.is_a(str):
            return self.parts[0].is_within(planned)
        if self.is_a(types.NoneType):
            return planned.is_a(types.NoneType, str, torch.Tensor)
        if self.size is not None and planned.size is not None:
            same = len(self.size) == len(planned.size)
            return same and all(each <= most for each, most in zip(self.size, planned.size, strict=True))
        return (
            bool(self.kind == planned.kind)
            and self.parts.keys() == planned.parts.keys()
            and all(part.is_within(planned.parts[key]) for key, part in self.parts.items())
        )

    def is_a(self, *kinds: type) -> bool:
        """Whether this is of a value of one of these classes."""
        return isinstance(self.kind, type) and issubclass(self.kind, kinds)


def _kind_of(value: Any) -> Any:
    if isinstance(value, _VALUES):
        return type(value), value
    if isinstance(value, types.FunctionType):
        return type(value), value.__code__
    if isinstance(value, types.MethodType):
        return type(value), value.__func__
    if isinstance(value, types.BuiltinFunctionType):
        return type(value), value.__qualname__
    return type(value)


def _size_of(value: Any) -> tuple[Any, ...] | None:
    """Return what tells how much a value asks for, that of a picture too; None where it is not known by itself."""
    if isinstance(value, _VALUES):
        return None
    if isinstance(value, torch.Tensor | np.ndarray):
        return (*value.shape, value.dtype.itemsize)
    if isinstance(value, _BY_LENGTH):
        return (len(value),)
    if isinstance(value, numbers.Real):
        return (value,)
    size = getattr(value, "size", None)
    return size if isinstance(size, tuple) else None


def _held_by(value: Any) -> Mapping[Any, Any]:
    """Return what a value holds, by key or place; nothing for objects that are not looked into."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Sequence | deque | Set):
        return dict(enumerate(value))
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.FunctionType):
        cells = dict(zip(value.__code__.co_freevars, map(_in_cell, value.__closure__ or ()), strict=True))
        return {"closure": cells, "defaults": value.__defaults__, "named defaults": value.__kwdefaults__}
    return fields_of(value)


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _order(extent: Extent) -> tuple[str, tuple[Any, ...]]:
    """Return by what parts of sets are put in an order, for they have none."""
    return str(extent.kind), extent.size or ()
