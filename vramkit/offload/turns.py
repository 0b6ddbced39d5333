"""Whole components take turns on the device: the one that had it leaves before the next one needs the room."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Turns"]


class _Evictable(Protocol):
    def evict(self) -> None:
        """Give back device memory."""


class Turns:
    """Which of several components is on the device."""

    def __init__(self) -> None:
        self._current: _Evictable | None = None

    def take(self, component: _Evictable) -> None:
        """Give `component` the device; the one before it leaves first."""
        if self._current is not component:
            self.end()
            self._current = component

    def end(self) -> None:
        """Let whoever has the device leave."""
        current, self._current = self._current, None
        if current is not None:
            current.evict()
