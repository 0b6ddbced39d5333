"""Where the bytes of one leaf rest, and how they get into a slot. A new kind of place is a new class with `fill`.

=============  ==========================================  =======================================  ============
kind           the bytes rest in                           they travel                              needs a thread
=============  ==========================================  =======================================  ============
registered     RAM, page-locked where it lies              by one asynchronous copy                 no
mapped         the page cache of a file, page-locked       by one asynchronous copy                 no
pageable       RAM                                         through page-locked staging              yes
disk           a file                                      read by threads, then through staging    yes
=============  ==========================================  =======================================  ============
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch

from vramkit.offload.backend import Backend, Fence
from vramkit.offload.disk import FileReader, FileSpan

__all__ = ["DiskStore", "PageableStore", "PinnedStore", "Staging", "Store", "StoreKind"]

StoreKind = Literal["registered", "mapped", "pageable", "disk"]

_STAGE_BYTES = 32 * 2**20  # each of two: long enough for full link speed, short enough to start early


class Store(Protocol):
    """The resting place of one leaf."""

    kind: StoreKind
    needs_thread: bool

    def fill(self, target: torch.Tensor) -> None:
        """Put the bytes into `target` (1-D uint8 in a slot), in order with the current stream of the calling thread.

        Raises:
            StoreError: the bytes cannot be had.
        """


class PinnedStore:
    """Page-locked host memory: a registered tensor, or a read-only mapping of a file."""

    needs_thread = False

    def __init__(self, memory: torch.Tensor, kind: StoreKind) -> None:
        self.kind = kind
        self._memory = memory

    def fill(self, target: torch.Tensor) -> None:
        """Issue one asynchronous copy."""
        target.copy_(self._memory, non_blocking=True)


class Staging:
    """Two page-locked buffers through which other bytes pass: one is filled by the host while the other one travels."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffers: list[torch.Tensor] | None = None
        self._sent: list[Fence | None] = [None, None]

    @property
    def size_bytes(self) -> int:
        """Page-locked bytes held (0 until the first use)."""
        return sum(buffer.numel() for buffer in self._buffers or ())

    def send(self, target: torch.Tensor, produce: Callable[[int, torch.Tensor], None]) -> None:
        """Fill `target`: ``produce(offset, host)`` is called for each piece and writes ``len(host)`` bytes of it."""
        if self._backend.device.type == "cpu":
            produce(0, target)
            return
        if self._buffers is None:
            self._buffers = [_page_locked(_STAGE_BYTES) for _ in range(2)]
        for turn, offset in enumerate(range(0, target.numel(), _STAGE_BYTES)):
            piece, which = target[offset : offset + _STAGE_BYTES], turn % 2
            sent = self._sent[which]
            if sent is not None:
                sent.synchronize()
            host = self._buffers[which][: piece.numel()]
            produce(offset, host)
            piece.copy_(host, non_blocking=True)
            self._sent[which] = self._backend.fence()


def _page_locked(size_bytes: int) -> torch.Tensor:
    with torch.inference_mode(False):
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # no memory may be locked here: copies from ordinary memory are right too, only slower
            return torch.empty(size_bytes, dtype=torch.uint8)


class PageableStore:
    """Ordinary host memory, also a mapped file that is not page-locked."""

    kind: StoreKind = "pageable"
    needs_thread = True

    def __init__(self, memory: torch.Tensor, staging: Staging) -> None:
        self._memory = memory
        self._staging = staging

    def fill(self, target: torch.Tensor) -> None:
        """Copy piece by piece through staging; on the CPU in one go."""
        self._staging.send(target, self._copy)

    def _copy(self, offset: int, host: torch.Tensor) -> None:
        host.copy_(self._memory[offset : offset + host.numel()])


class DiskStore:
    """A span of a file, read anew each time."""

    kind: StoreKind = "disk"
    needs_thread = True

    def __init__(self, span: FileSpan, reader: FileReader, staging: Staging) -> None:
        self._span = span
        self._reader = reader
        self._staging = staging

    def fill(self, target: torch.Tensor) -> None:
        """Read piece by piece through staging; on the CPU straight into the slot."""
        self._staging.send(target, lambda offset, host: self._reader.read(self._span.offset + offset, host))
