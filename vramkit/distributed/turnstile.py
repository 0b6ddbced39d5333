"""The order in which threads of one rank come to the collectives of one group: that in which they were told to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["Turnstile"]

_POLL_S = 0.2


class Turnstile:
    """Numbers that are taken in the order of the program, which is that of all ranks, and let through in turn.

    Each module that streams has a copy thread of its own. Without this, two of them would come to the same group of ranks in
    one order here and in another one there.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        """Take what raises where a rank has failed, so that nobody waits for ever."""
        self._check = check
        self._taken = 0
        self._passed = 0
        self._moved = threading.Condition()

    def take(self) -> int:
        """Return the next number."""
        with self._moved:
            self._taken += 1
            return self._taken

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait until all before `number` are through; the next one follows at the end, also after an error."""
        with self._moved:
            while self._passed < number - 1:
                self._check()
                self._moved.wait(_POLL_S)
        try:
            yield
        finally:
            with self._moved:
                self._passed = max(self._passed, number)
                self._moved.notify_all()
