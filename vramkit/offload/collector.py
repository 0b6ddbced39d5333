"""Python's garbage collector, which waits while offloading is put on and taken off."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]

_PAUSES: set[object] = set()  # those that found the collector at work


@contextmanager
def collector_paused() -> Iterator[None]:
    """Make many objects that stay; also a decorator.

    A large model is offloaded by some ten thousand of them, and the collector goes through all that the process has several
    times meanwhile, which takes longer than to make them. What nobody refers to any more goes at once all the same.
    """
    was_enabled = gc.isenabled()
    pause = object()
    try:
        if was_enabled:
            _PAUSES.add(pause)
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
        _PAUSES.discard(pause)


def _end_pauses() -> None:
    """Let it work in a fork of this process, which the threads that pause it are not in."""
    if _PAUSES:
        _PAUSES.clear()
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_pauses)
