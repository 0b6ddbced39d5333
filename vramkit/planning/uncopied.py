"""What attributes of modules hold that has no copy: a twin shares it where that changes nothing, or has a stand-in."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

__all__ = ["stand_in_for_uncopied"]

_SHARED = (types.ModuleType, type(threading.Lock()), type(threading.RLock()), threading.local)


def stand_in_for_uncopied(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put into the `memo` of a copy what it is to have for all that has none, in attributes of `module` and its parts."""
    seen: set[int] = set()
    for part in module.modules():
        for name, held in vars(part).items():
            if name != "_modules":
                _look_into(held, memo, seen)


def _look_into(held: Any, memo: dict[int, Any], seen: set[int]) -> None:
    if id(held) in memo or id(held) in seen or isinstance(held, nn.Module) or _has_copy(held, memo):
        return
    seen.add(id(held))
    if not isinstance(held, _SHARED):
        within = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple | set) else ()
        for each in (*within, *getattr(held, "__dict__", {}).values()):
            _look_into(each, memo, seen)
        if _has_copy(held, memo):
            return
    memo[id(held)] = held if isinstance(held, _SHARED) else _StandIn(type(held).__name__)


def _has_copy(held: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(held, dict(memo))
    except Exception:  # noqa: BLE001 - of any class
        return False
    return True


class _StandIn:
    """Refuses to be used: what a rehearsal did to the original would be seen by the call."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise RuntimeError(f"it uses a {self._kind}, of which there is no copy")

    __call__ = __iter__ = __next__ = __enter__ = __exit__ = __len__ = __getitem__ = __contains__ = _refuse
