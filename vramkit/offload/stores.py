"""Where the bytes of one leaf rest, and how they get into a slot. A new kind of place is a new class with `fill`.

=============  ==========================================  =======================================  ============
kind           the bytes rest in                           they travel                              needs a thread
=============  ==========================================  =======================================  ============
registered     RAM, page-locked where it lies              by one asynchronous copy                 no
mapped         the page cache of a file, page-locked       by one asynchronous copy                 no
pageable       RAM                                         through page-locked staging              yes
disk           a file                                      read by threads, then through staging    yes
peer           another device                              by one asynchronous copy between them    no
=============  ==========================================  =======================================  ============
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from vramkit.offload.backend import Arrival, Backend, Fence
from vramkit.offload.disk import FileReader, FileSpan, MappedFile
from vramkit.offload.memory_map import own_pages

__all__ = [
    "DiskStore",
    "JointStore",
    "PageableStore",
    "PartedStore",
    "PeerStore",
    "PinnedStore",
    "Sharing",
    "Staging",
    "Store",
    "StoreKind",
]

StoreKind = Literal["registered", "mapped", "pageable", "disk", "peer"]

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


class PartedStore(Store, Protocol):
    """One of which ranks can read a part each."""

    def part(self, start: int, stop: int) -> Store:
        """Return a store of the bytes from `start` to `stop` of this one."""


class JointStore(ABC):
    """A store for each of whose fills other ranks wait."""

    @abstractmethod
    def reserve(self) -> None:
        """Take a place for the next fill, in the order in which this is called among all such stores."""

    @abstractmethod
    def begin(self, target: torch.Tensor) -> Arrival:
        """Do as `fill` does, but for what others send, which the result stands for.

        Raises:
            StoreError: the bytes cannot be had.
            RankError: a rank has failed.
        """


class Sharing(Protocol):
    """Ranks that read a part of each group and give it to one another; `vramkit.distributed.Mesh` is one."""

    @property
    def apart(self) -> Sharing:
        """The same ranks, each of which reads all for itself."""

    def prepare(self, module: nn.Module, options: dict[str, Any], disk_folder: Path | None) -> None:
        """Refuse `options` and weights that are not the same on all ranks, and have weights once on each host."""

    def shared(
        self, name: str, stores: Sequence[tuple[int, int, PartedStore]], size_bytes: int
    ) -> Sequence[tuple[int, int, Store]]:
        """Return the stores of a group, of which this rank reads a part by `stores`: (offset in the slot, bytes, store)."""

    def memory(self, backend: Backend, size_bytes: int) -> torch.Tensor:
        """Return device memory for slots, as that of the backend."""


class PinnedStore:
    """Page-locked host memory: a registered tensor, or a read-only mapping of a file."""

    needs_thread = False

    def __init__(self, memory: torch.Tensor, kind: StoreKind) -> None:
        self.kind = kind
        self._memory = memory

    def fill(self, target: torch.Tensor) -> None:
        """Issue one asynchronous copy."""
        target.copy_(self._memory, non_blocking=True)

    def part(self, start: int, stop: int) -> PinnedStore:
        """Return one of a part of the same memory."""
        return PinnedStore(self._memory[start:stop], self.kind)


class Staging:
    """Two page-locked buffers through which other bytes pass: one is filled by the host while the other one travels."""

    def __init__(self, backend: Backend, lock: Callable[[torch.Tensor], bool] | None = None) -> None:
        """Take what locks memory from `own_pages`, and tells if it could; None: torch's allocator does."""
        self._backend = backend
        self._lock = lock
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Fence | None] = [None, None]

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers, when it has them."""
        return _STAGE_BYTES * len(self._sent)

    def prepare(self) -> None:
        """Have the buffers."""
        while len(self._buffers) < len(self._sent):
            self._buffers.append(self._buffer())

    def close(self) -> None:
        """Let the buffers go, which nothing reads any more."""
        self._buffers.clear()
        self._sent = [None, None]

    def _buffer(self) -> torch.Tensor:
        if self._lock is None:
            return _page_locked(_STAGE_BYTES)
        buffer = own_pages(_STAGE_BYTES)
        self._lock(buffer)  # where that is not possible, copies from it are right too, only slower
        return buffer

    def send(self, target: torch.Tensor, produce: Callable[[int, torch.Tensor], None]) -> None:
        """Fill `target`: ``produce(offset, host)`` is called for each piece and writes ``len(host)`` bytes of it."""
        if self._backend.device.type == "cpu":
            produce(0, target)
            return
        self.prepare()
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
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # no memory may be locked here: copies from ordinary memory are right too, only slower
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


class PageableStore:
    """Ordinary host memory, also a mapped file that is not page-locked."""

    kind: StoreKind = "pageable"
    needs_thread = True

    def __init__(self, memory: torch.Tensor, staging: Staging, file: MappedFile | None = None) -> None:
        """Read `memory`, whose pages may be those of `file`."""
        self._memory = memory
        self._staging = staging
        self._file = file

    def fill(self, target: torch.Tensor) -> None:
        """Copy piece by piece through staging; on the CPU in one go."""
        if self._file is not None:
            self._file.check()  # where it was cut there are no pages
        self._staging.send(target, self._copy)

    def part(self, start: int, stop: int) -> PageableStore:
        """Return one of a part of the same memory."""
        return PageableStore(self._memory[start:stop], self._staging, self._file)

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

    def part(self, start: int, stop: int) -> DiskStore:
        """Return one of a part of the span."""
        return DiskStore(self._span.part(start, stop - start), self._reader, self._staging)


class PeerStore:
    """Memory of another device with a copy of what rests on the host: cards send to one another faster than hosts do."""

    kind: StoreKind = "peer"
    needs_thread = False

    def __init__(self, memory: torch.Tensor, rest: torch.Tensor, version: Callable[[], int]) -> None:
        """Keep a copy of `rest` in `memory` of the other device (both 1-D uint8), as it is at each new `version`."""
        self._memory = memory
        self._rest = rest
        self._version = version
        self._copied: int | None = None

    def fill(self, target: torch.Tensor) -> None:
        """Issue one copy between the devices; before the first, and after the tensor was written to, one from the host."""
        version = self._version()
        if version != self._copied:
            self._memory.copy_(self._rest)
            self._copied = version
        target.copy_(self._memory, non_blocking=True)
