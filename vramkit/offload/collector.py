"""Python's garbage collector, which waits while offloading is put on and taken off."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Make many objects that stay; also a decorator.

    A large model is offloaded by some ten thousand of them, and the collector goes through all that the process has several
    times meanwhile, which takes longer than to make them. What nobody refers to any more goes at once all the same.
    """
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
