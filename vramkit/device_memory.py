"""What tensors take of a device: what torch's allocator counts, and what was allocated beside it."""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import torch

__all__ = ["DeviceMemory", "Taken", "memory_of"]


class Taken(NamedTuple):
    """What was taken of a device at a moment."""

    allocated_bytes: int
    peak_bytes: int
    """The most that was allocated since torch's statistics of peaks were last reset."""
    failures: int
    """How often torch's allocator has found no memory, whoever did without."""


class DeviceMemory:
    """An accelerator's memory as torch's statistics have it, with what does not pass through its allocator.

    The statistics are others' as well, and so never reset. A peak of torch's is known to be one of both together only if it
    rose while so much was beside it; where it did not, the peak may be more than what is said here, and is never less.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._statistics: Any = getattr(torch, device.type)
        self.beside_bytes = 0
        """What is allocated beside torch's allocator now."""
        self._seen_bytes = 0  # torch's peak
        self._peak_bytes = 0
        self._lock = threading.RLock()  # memory may be let go of by the garbage collector, in any thread

    def add(self, size_bytes: int) -> None:
        """Count so much more beside torch's allocator; less, where it is below zero."""
        with self._lock:
            self.look()
            self.beside_bytes += size_bytes
            self.look()

    @property
    def allocated_bytes(self) -> int:
        """What is allocated now."""
        return self.look().allocated_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated since torch's statistics of peaks were last reset."""
        return self.look().peak_bytes

    def look(self) -> Taken:
        """Return all of it, by one look at torch's statistics: around each call of a module it has to be quick."""
        with self._lock:
            found = self._statistics.memory_stats_as_nested_dict(self._device)
            of_tensors = found.get("allocated_bytes", {}).get("all", {})  # nothing where nothing was allocated yet
            seen_bytes, now_bytes = of_tensors.get("peak", 0), of_tensors.get("current", 0) + self.beside_bytes
            if seen_bytes < self._seen_bytes:  # somebody has reset it
                self._peak_bytes = 0
            if seen_bytes != self._seen_bytes:
                self._seen_bytes = seen_bytes
                self._peak_bytes = max(self._peak_bytes, seen_bytes + self.beside_bytes)
            self._peak_bytes = max(self._peak_bytes, now_bytes)
            return Taken(now_bytes, self._peak_bytes, found.get("num_ooms", 0))


@functools.cache
def _memory_of(device: torch.device) -> DeviceMemory:
    return DeviceMemory(device)


def memory_of(device: torch.device) -> DeviceMemory:
    """Return the one of an accelerator; a device without a number is the current one."""
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return _memory_of(torch.device(device.type, index))
