"""Which call is inside a pipeline or one of its parts, and who has to wait for it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vramkit.errors import ConcurrentUseError

__all__ = ["refuse_within_call", "used"]

_USE = "_vramkit_use"


@contextmanager
def used(holder: Any, *, by: str) -> Iterator[None]:
    """Be the one call that is inside `holder`, of a pipeline called `by`.

    Raises:
        ConcurrentUseError: another call is.
    """
    use: _Use = vars(holder).setdefault(_USE, _Use())
    call = _Inside(threading.get_ident())
    try:  # before it is taken: a Ctrl-C may come after any operation
        inside = use.take(call)
        # Models remember what they do during a step only, so a callback may use those of the call around it.
        is_free = inside is call or (isinstance(holder, nn.Module) and inside.thread == call.thread)
        if not is_free:
            raise ConcurrentUseError(
                f"{by}: the {type(holder).__name__} is in use by another call, of another thread or around this one. Run "
                "one call at a time, or give each thread a pipeline and a scheduler of its own around the same models, "
                "which must not be offloaded then: "
                f"{by}.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))"
            )
        yield
    finally:
        use.leave(call)


def refuse_within_call(pipeline: Any, change: str) -> None:
    """Refuse a change of what a call computes while a call of another thread is inside; a callback, of its own, may do it.

    Raises:
        ConcurrentUseError: one is.
    """
    use: _Use | None = vars(pipeline).get(_USE)
    if use is not None and use.is_inside_elsewhere:
        raise ConcurrentUseError(
            f"{change} of a {type(pipeline).__name__} that is in use by a call of another thread, whose clip it would "
            "change from the next step on: wait for that call, or do it in its callback_on_step_end"
        )


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Inside:
    """One call that is inside an object."""

    thread: int


class _Use:
    """Which call is inside an object; it stays with the object, and copies of that have one of their own."""

    def __init__(self) -> None:
        self._calls: dict[str, _Inside] = {}

    def take(self, call: _Inside) -> _Inside:
        """Let a call in unless another one is inside, and say which one is; no thread comes between the two."""
        return self._calls.setdefault("inside", call)

    @property
    def is_inside_elsewhere(self) -> bool:
        """Whether a call of another thread is inside."""
        inside = self._calls.get("inside")
        return inside is not None and inside.thread != threading.get_ident()

    def leave(self, call: _Inside) -> None:
        """Let a call out that is inside."""
        if self._calls.get("inside") is call:
            del self._calls["inside"]

    def __reduce__(self) -> tuple[type[_Use], tuple[()]]:
        return type(self), ()
