"""Look at a call before and after it: a class derived from that of a pipeline or of a module, on the same object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from vramkit.offload.derived import derived_class

__all__ = ["Around", "Guard"]

Around: TypeAlias = Callable[[str, tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]


_GUARD = "_guard"  # of a class that one has made


class Guard:
    """Between `attach` and `remove`, calls of `target` and of its `methods` are made in ``around(method, args, kwargs)``.

    Copies and pickles of the object are of its own class.
    """

    def __init__(self, target: Any, around: Around, methods: Sequence[str] = (), *, owner: Any = None) -> None:
        self.owner = owner
        kind = type(target)
        derived_from: Any = kind

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not target:
                return kind.__call__(this, *args, **kwargs)
            with around("__call__", args, kwargs):
                return kind.__call__(this, *args, **kwargs)

        def reduce(this: Any, protocol: Any) -> Any:
            made: Any = derived_from.__reduce_ex__(this, protocol)
            if isinstance(made, str):
                return made
            make, given, *rest = made
            given = tuple(kind if each is self._derived else each for each in given)
            return _made_anew if make.__name__ == "__newobj__" else make, given, *rest

        call.__wrapped__ = kind.__call__  # type: ignore[attr-defined] # its signature is looked at
        guarded = {name: _Guarded(name, kind, target, around) for name in methods if hasattr(kind, name)}
        self._target, self._kind = target, kind
        self._derived = derived_class(kind, {**guarded, "__call__": call, "__reduce_ex__": reduce, _GUARD: self})

    @staticmethod
    def of(target: Any) -> Guard | None:
        """Return the guard that was attached to `target` last and was not removed, if there is one."""
        found = vars(type(target)).get(_GUARD)
        return found if isinstance(found, Guard) else None

    def attach(self) -> None:
        """Give the object the class that looks at its calls."""
        self._target.__class__ = self._derived

    def remove(self) -> None:
        """Give the object its class back."""
        if type(self._target) is self._derived:
            self._target.__class__ = self._kind


def _made_anew(kind: Any, *given: Any) -> Any:
    """Do as `copyreg.__newobj__`, which pickle lets make nothing of another class than that of the object."""
    return kind.__new__(kind, *given)


class _Guarded:
    """A method of a guarded object. What offloading puts on the object under its name runs inside of the guard."""

    def __init__(self, name: str, kind: type, target: Any, around: Around) -> None:
        self._name, self._kind, self._target, self._around = name, kind, target, around

    def __get__(self, this: Any, _kind: type) -> Any:
        if this is None:
            return getattr(self._kind, self._name)
        method = vars(this).get(self._name) or getattr(self._kind, self._name).__get__(this)
        if this is not self._target:
            return method

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self._around(self._name, args, kwargs):
                return method(*args, **kwargs)

        return guarded

    def __set__(self, this: Any, value: Any) -> None:
        vars(this)[self._name] = value

    def __delete__(self, this: Any) -> None:
        if self._name not in vars(this):
            raise AttributeError(self._name)
        del vars(this)[self._name]
