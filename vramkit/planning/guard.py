"""Look at a call before and after it: a class derived from that of a pipeline or of a module, on the same object."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["Guard"]


class Guard:
    """While it is on, every call of `target` is made inside of ``around(args, kwargs)``."""

    def __init__(
        self, target: Any, around: Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
    ) -> None:
        kind = type(target)

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not target:
                return kind.__call__(this, *args, **kwargs)
            with around(args, kwargs):
                return kind.__call__(this, *args, **kwargs)

        call.__wrapped__ = kind.__call__  # type: ignore[attr-defined] # its signature is looked at
        derive: Any = type(kind)
        names: dict[str, Any] = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        names["offloaded_kind"] = kind  # that of copies
        self._target, self._kind = target, kind
        self._derived = derive(kind.__name__, (kind,), {**names, "__call__": call})
        target.__class__ = self._derived

    def remove(self) -> None:
        """Give the object its class back."""
        if type(self._target) is self._derived:
            self._target.__class__ = self._kind
