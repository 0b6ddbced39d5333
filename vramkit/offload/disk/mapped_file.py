"""A file whose bytes serve as tensors: mapped for those at rest, and looked at before it is touched.

It is mapped twice, each on demand:

- copy-on-write for tensors that a module holds at rest. Reading shares the page cache with everybody; writing to such a
  tensor changes a private page and never the file.
- shared and read-only for transfers, which a driver can page-lock without copying the file into RAM.

A mapping shows what the file is now. Where one was cut, touching it ends the process (SIGBUS), and one that was written to
gives new bytes beside old ones. So a file is looked at before it is touched, and after: `MappedFile.check`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vramkit.errors import StoreError
from vramkit.offload.disk.spans import FileSpan, note_span

__all__ = ["MappedFile"]

_MAPPING = "_vramkit_mapping"  # a note that the storage of the shared mapping carries


class MappedFile:
    """One open file whose bytes serve as tensors. It stays readable when its name is replaced or removed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
            weakref.finalize(self, self._file.close)
            self._read_at = _reads_at(self._file)
            self._stamp = _stamp(self._file.fileno())
        except OSError as error:
            raise StoreError(f"{self.path} could not be opened: {error.strerror or error}") from error
        self.size_bytes = self._stamp[2]
        self._private: mmap.mmap | None = None
        self._shared: torch.Tensor | None = None

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._file.fileno()

    def read_into(self, offset: int, view: memoryview) -> int:
        """Read from byte `offset` on into `view`, from any thread. Returns how many bytes came at once; 0 at the end."""
        return self._read_at(offset, view)

    def check(self) -> None:
        """Look whether the file is what it was when it was opened; takes a microsecond. Its name may be another one's.

        Raises:
            StoreError: it was cut, or written to.
        """
        try:
            now = _stamp(self._file.fileno())
        except (OSError, ValueError) as error:  # closed by somebody who closes all descriptors
            raise StoreError(f"{self.path} cannot be looked at any more: {error}; load the model again") from error
        if now == self._stamp:
            return
        if now[:2] != self._stamp[:2]:
            what = "is another file under the descriptor that was opened"
        elif now[2] != self._stamp[2]:
            what = f"has {now[2]:,} bytes and had {self.size_bytes:,} when it was opened"
        else:
            what = "was written to after it was opened"
        raise StoreError(
            f"{self.path} {what}, so weights that rest in it are lost. Load the model again; replace a file that is in use "
            "by renaming a new one over it"
        )

    @property
    def is_cut(self) -> bool:
        """Whether it has become shorter, so that to touch the end of a mapping would end the process."""
        with contextlib.suppress(OSError, ValueError):
            return os.fstat(self._file.fileno()).st_size < self.size_bytes
        return False

    def acknowledge(self) -> None:
        """Take the file as it is now for what it is to be: it was written to by us."""
        self._stamp = _stamp(self._file.fileno())

    def is_at(self, descriptor: int) -> bool:
        """Tell whether what is open as `descriptor` is this file, unchanged."""
        return _stamp(descriptor) == self._stamp

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor over the bytes at `offset`, writable without an effect on the file.

        The tensor remembers its `FileSpan`. Where `offset` is not a multiple of the item size (old writers do that) or
        the tensor is empty, the result is an ordinary copy without a span.
        """
        count = math.prod(shape)
        if count == 0 or self.size_bytes == 0:
            return torch.empty(0, dtype=dtype, device="cpu").view(shape)
        private = self._copy_on_write()
        if offset % dtype.itemsize:
            raw = bytearray(memoryview(private)[offset : offset + count * dtype.itemsize])
            return torch.frombuffer(raw, dtype=dtype).view(shape)
        with torch.inference_mode(False):  # inference tensors do not count how often they are written
            tensor = torch.frombuffer(private, dtype=dtype, count=count, offset=offset).view(shape)
        span = FileSpan(self, offset, count * dtype.itemsize)
        # The storage carries the note, because it outlives detach() and Parameter(): it goes where the bytes go.
        note_span(tensor.untyped_storage(), span)
        return tensor

    def read_ahead(self, offset: int, size_bytes: int) -> None:
        """Tell the system that these bytes are needed soon; it reads them while something else is done."""
        if size_bytes and hasattr(mmap, "MADV_WILLNEED"):
            start = offset - offset % mmap.PAGESIZE
            self._copy_on_write().madvise(mmap.MADV_WILLNEED, start, offset + size_bytes - start)

    def shared(self) -> torch.Tensor:
        """Return all bytes of the file as a uint8 tensor over the read-only mapping. Writing to it is a memory fault."""
        if self._shared is None:
            try:
                mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path} could not be mapped: {error}") from error
            address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
            memory = (ctypes.c_ubyte * self.size_bytes).from_address(address)
            self._shared = torch.frombuffer(memory, dtype=torch.uint8)
            setattr(self._shared.untyped_storage(), _MAPPING, mapping)  # keeps it mapped
        return self._shared

    def _copy_on_write(self) -> mmap.mmap:
        if self._private is None:
            try:
                self._private = _private_mapping(self._file.fileno())
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path} could not be mapped: {error}") from error
        return self._private


def _stamp(descriptor: int) -> tuple[int, int, int, int]:
    """Device, inode, size and time of the last write (ns)."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _private_mapping(descriptor: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    # Nothing is set aside for copies of pages: else the kernel refuses a file that is larger than the memory.
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _reads_at(file: BinaryIO) -> Callable[[int, memoryview], int]:
    """Return what reads from a byte of `file` on into memory, as much as comes at once, and tells how much; 0 at its end.

    Threads may call it at the same time. Windows has no reads at a position: there they take turns at the one of the file.
    """
    descriptor = file.fileno()
    if hasattr(os, "preadv"):
        return lambda offset, view: os.preadv(descriptor, [view], offset)
    raw: RawIOBase = file.raw  # type: ignore[attr-defined]  # what Path.open("rb") buffers
    turn = threading.Lock()

    def read(offset: int, view: memoryview) -> int:
        with turn:
            raw.seek(offset)
            return raw.readinto(view) or 0

    return read
