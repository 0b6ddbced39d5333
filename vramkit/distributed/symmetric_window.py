"""A window in device memory: torch's symmetric memory, into which cards of one host copy by their copy engines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vramkit.device_memory import memory_of
from vramkit.distributed.ranks import Ranks

__all__ = ["SymmetricWindow"]


class SymmetricWindow:
    """Slots of ranks that compute on CUDA devices which reach one another's memory.

    Ranks meet on the device: a barrier is a kernel of one small block. Barriers and pushes have a stream of their own, so
    that the link goes on meanwhile, and goes before kernels that compute.
    """

    def __init__(self, size_bytes: int, device: torch.device, ranks: Ranks, stream: Any) -> None:
        """Count the memory, which torch's allocator does not."""
        self._device = device
        self._ranks = ranks
        self._size_bytes = size_bytes
        self._stream = stream
        self._handle: Any = None
        self._others: list[tuple[int, Tensor]] = []
        # As NCCL, which ends a process that waits for longer than what the heartbeats allow.
        self._timeout_ms = int(ranks.timeout_s * 1000)
        memory_of(device).add(size_bytes)

    @classmethod
    def made(cls, size_bytes: int, device: torch.device, ranks: Ranks) -> tuple[SymmetricWindow, Tensor]:
        """Return a new one with its memory.

        Raises:
            RuntimeError: there is no room, or this device or build of torch has no such memory.
        """
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # copies have no use for what torch makes else
        stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):  # torch waits for it, and not for what computes
            try:
                memory = _allocated(size_bytes, device)
            except RuntimeError:
                torch.cuda.empty_cache()  # what the caching allocator keeps back is no room for others
                memory = _allocated(size_bytes, device)
        return cls(size_bytes, device, ranks, stream), memory

    def open(self, memory: Tensor) -> None:
        """Map those of the others; see `Window.open`."""
        from torch.distributed import _symmetric_memory  # noqa: PLC0415 - it takes a while, and builds may have none

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._handle = _symmetric_memory.rendezvous(memory, self._ranks.group.group_name)
        if self._handle is None:
            raise RuntimeError("torch does not take this memory for its symmetric memory")
        # Each rank begins with the next one, so that not all of them write to the same card.
        others = [(self._ranks.rank + step) % self._ranks.size for step in range(1, self._ranks.size)]
        self._others = [(rank, self._handle.get_buffer(rank, (memory.nbytes,), torch.uint8)) for rank in others]

    def enter(self) -> None:
        """Let pushes wait for all ranks, and no copy over the link."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device.index))
        with torch.cuda.stream(self._stream):
            self._handle.barrier(timeout_ms=self._timeout_ms)

    def push(self, given: Tensor, offsets: Sequence[int]) -> None:
        """Copy by the copy engines."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device.index))
        with torch.cuda.stream(self._stream):
            for rank, memory in self._others:
                memory[offsets[rank] : offsets[rank] + given.nbytes].copy_(given, non_blocking=True)

    def leave(self) -> _Left:
        """Wait for all ranks behind the pushes."""
        with torch.cuda.stream(self._stream):
            self._handle.barrier(timeout_ms=self._timeout_ms)
            return _Left(self._stream.record_event(), self._device.index)

    def close(self) -> None:
        """Let all go, when the device is through.

        To unmap memory torch waits for the device, with Python's lock held: what watches the ranks could not look then.
        """
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            torch.cuda.synchronize(self._device)
        self._others.clear()
        self._handle = None
        memory_of(self._device).add(-self._size_bytes)


class _Left:
    """That all ranks have left."""

    def __init__(self, event: Any, index: int) -> None:
        self._event = event
        self._index = index

    def wait(self) -> None:
        """Let the current stream wait."""
        self._event.wait(torch.cuda.current_stream(self._index))


def _allocated(size_bytes: int, device: torch.device) -> Tensor:
    """Allocate past `symmetric_memory.empty`, which keeps back what is let go of: ranks would not agree on what is new."""
    try:
        from torch._C._distributed_c10d import _SymmetricMemory  # noqa: PLC0415 - builds may have none
    except ImportError as error:
        raise RuntimeError("this build of torch has no symmetric memory") from error
    return _SymmetricMemory.empty_strided_p2p((size_bytes,), (1,), torch.uint8, device)
