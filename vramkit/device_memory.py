"""What tensors take of a device: what torch's allocator counts, and what was allocated beside it."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

__all__ = ["DeviceMemory", "memory_of"]


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
            self._look()
            self.beside_bytes += size_bytes
            self._look()

    @property
    def allocated_bytes(self) -> int:
        """What is allocated now."""
        return int(self._statistics.memory_allocated(self._device)) + self.beside_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated since torch's statistics of peaks were last reset."""
        with self._lock:
            self._look()
            return self._peak_bytes

    @property
    def failures(self) -> int:
        """How often torch's allocator found no memory, whoever did without."""
        return int(self._statistics.memory_stats_as_nested_dict(self._device).get("num_ooms", 0))

    def _look(self) -> None:
        seen_bytes = int(self._statistics.max_memory_allocated(self._device))
        if seen_bytes < self._seen_bytes:  # somebody has reset it
            self._peak_bytes = 0
        if seen_bytes != self._seen_bytes:
            self._seen_bytes = seen_bytes
            self._peak_bytes = max(self._peak_bytes, seen_bytes + self.beside_bytes)
        self._peak_bytes = max(self._peak_bytes, self.allocated_bytes)


@functools.cache
def _memory_of(device: torch.device) -> DeviceMemory:
    return DeviceMemory(device)


def memory_of(device: torch.device) -> DeviceMemory:
    """Return the one of an accelerator; a device without a number is the current one."""
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return _memory_of(torch.device(device.type, index))
