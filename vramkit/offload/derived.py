"""Classes that stand in the place of the class of an object, and that code of others takes for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

__all__ = ["derived_class"]


class _AsItsOriginal(type):
    """The class of derived classes. Who compares classes, as ``from_pipe`` of diffusers does, finds the original's equal."""

    def __eq__(cls, other: object) -> bool:
        """Tell whether both stand for one class."""
        return _original(cls) is _original(other)

    def __hash__(cls) -> int:
        """Return that of the class that it stands for."""
        return hash(_original(cls))


def derived_class(kind: type, members: Mapping[str, Any]) -> Any:
    """Return a subclass of `kind` with `members`, for one object; ``offloaded_kind`` in it is the class of copies."""
    told = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    derive: Any = _metaclass(type(kind))
    return derive(kind.__name__, (kind,), {**told, "offloaded_kind": _original(kind), **members})


@functools.cache
def _metaclass(of_kind: type) -> type:
    return of_kind if issubclass(of_kind, _AsItsOriginal) else type(of_kind.__name__, (_AsItsOriginal, of_kind), {})


def _original(kind: Any) -> Any:
    return vars(kind).get("offloaded_kind", kind) if isinstance(kind, _AsItsOriginal) else kind
