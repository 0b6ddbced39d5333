"""Files as a place where weights rest: opened once, mapped for tensors at rest, read in pieces for slots, written whole.

This is the one place that knows about disks. A file is mapped twice on demand:

- copy-on-write for tensors that a module holds at rest. Reading shares the page cache with everybody; writing to such a
  tensor changes a private page and never the file.
- shared and read-only for transfers, which a driver can page-lock without copying the file into RAM.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vramkit import tensors
from vramkit.errors import StoreError

__all__ = ["FileReader", "FileSpan", "MappedFile", "atomic_write", "forget_span", "span_of"]

_PIECE_BYTES = 8 * 2**20  # one read request: large enough for full speed, small enough to share among threads
_SPAN, _MAPPING = "_vramkit_span", "_vramkit_mapping"  # notes that a storage carries
_SECTOR_BYTES = 4096  # alignment that O_DIRECT asks of offset, length and memory


class MappedFile:
    """One open file whose bytes serve as tensors. It stays readable when its name is replaced or removed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
            weakref.finalize(self, self._file.close)
            self.size_bytes = os.fstat(self._file.fileno()).st_size
            self._private = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size_bytes else None
        except OSError as error:
            raise StoreError(f"{self.path} could not be opened and mapped: {error.strerror or error}") from error
        self._shared: torch.Tensor | None = None

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._file.fileno()

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor over the bytes at `offset`, writable without an effect on the file.

        The tensor remembers its `FileSpan`. Where `offset` is not a multiple of the item size (old writers do that) or
        the tensor is empty, the result is an ordinary copy without a span.
        """
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0 or self._private is None:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:
            raw = bytearray(memoryview(self._private)[offset : offset + count * dtype.itemsize])
            return torch.frombuffer(raw, dtype=dtype).view(shape)
        with torch.inference_mode(False):  # inference tensors do not count how often they are written
            tensor = torch.frombuffer(self._private, dtype=dtype, count=count, offset=offset).view(shape)
        span = FileSpan(self, offset, count * dtype.itemsize)
        # The storage carries the note, because it outlives detach() and Parameter(): it goes where the bytes go.
        setattr(tensor.untyped_storage(), _SPAN, span)
        return tensor

    def read_ahead(self, offset: int, size_bytes: int) -> None:
        """Tell the system that these bytes are needed soon; it reads them while something else is done."""
        if self._private is not None and size_bytes and hasattr(mmap, "MADV_WILLNEED"):
            start = offset - offset % mmap.PAGESIZE
            self._private.madvise(mmap.MADV_WILLNEED, start, offset + size_bytes - start)

    def may_be_written(self) -> bool:
        """Tell whether tensors of this file may differ from it: False where the kernel knows of no private page."""
        if self._private is None:
            return False
        start = np.frombuffer(self._private, dtype=np.uint8).ctypes.data
        try:
            lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines())
        except OSError:
            return True  # only Linux counts them
        next((line for line in lines if line.startswith(f"{start:x}-")), None)
        count = next((line.split()[1] for line in lines if line.startswith("Anonymous:")), "1")
        return count != "0"

    def shared(self) -> torch.Tensor:
        """Return all bytes of the file as a uint8 tensor over the read-only mapping. Writing to it is a memory fault."""
        if self._shared is None:
            mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
            memory = (ctypes.c_ubyte * self.size_bytes).from_address(address)
            self._shared = torch.frombuffer(memory, dtype=torch.uint8)
            setattr(self._shared.untyped_storage(), _MAPPING, mapping)  # keeps it mapped
        return self._shared


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileSpan:
    """The bytes of one tensor in a file."""

    file: MappedFile
    offset: int
    size_bytes: int

    def shared(self) -> torch.Tensor:
        """Return the bytes in the file, as uint8, whatever was written to the tensor since."""
        return self.file.shared()[self.offset : self.offset + self.size_bytes]

    def holds(self, leaf: torch.Tensor) -> bool:
        """Compare the bytes of `leaf` with the file: the only way to see writes through ``.data``."""
        return torch.equal(tensors.byte_view(leaf), self.shared())


def span_of(leaf: torch.Tensor) -> FileSpan | None:
    """Return where in a file the bytes of a whole, unchanged `leaf` rest (in whatever order of dimensions), or None."""
    span: FileSpan | None = getattr(leaf.untyped_storage(), _SPAN, None)
    if span is None or leaf.storage_offset() or not tensors.is_dense(leaf):
        return None
    written = not leaf.is_inference() and leaf._version > 0  # noqa: SLF001 (torch has no public reader)
    return None if written or leaf.nbytes != span.size_bytes else span


def forget_span(leaf: torch.Tensor) -> None:
    """From now on take `leaf` for ordinary memory: it was changed."""
    with contextlib.suppress(AttributeError):
        delattr(leaf.untyped_storage(), _SPAN)


class FileReader:
    """Reads spans of one file into memory with several threads, through the page cache or around it (O_DIRECT)."""

    def __init__(self, file: MappedFile, *, direct: bool = False, threads: int = 4) -> None:
        self._file = file  # kept open by this reference
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vramkit-read")
        self._direct: int | None = None
        if direct:
            with contextlib.suppress(OSError, AttributeError):  # not every file system or platform has it
                self._direct = os.open(file.path, os.O_RDONLY | os.O_DIRECT)

    @property
    def is_direct(self) -> bool:
        """Whether reads go around the page cache."""
        return self._direct is not None

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target` (1-D uint8 in host memory) with the bytes at `offset`.

        Raises:
            StoreError: the file ends before that, or cannot be read.
        """
        view = memoryview(target.numpy().data)
        starts = range(0, len(view), _PIECE_BYTES)
        jobs = [self._pool.submit(self._read_piece, offset + at, view[at : at + _PIECE_BYTES]) for at in starts]
        wait(jobs)  # all, also where one has failed: nobody may write to `target` any more after this
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads and close what this reader opened."""
        self._pool.shutdown()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _read_piece(self, offset: int, view: memoryview) -> None:
        try:
            if self._direct is None:
                self._read_plain(offset, view)
            else:
                self._read_direct(self._direct, offset, view)
        except OSError as error:
            raise StoreError(f"reading {len(view)} bytes at {offset} of {self._file.path} failed: {error}") from error

    def _read_plain(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"the file ends at byte {offset + done}; it was cut short after it was opened")
            done += count

    def _read_direct(self, descriptor: int, offset: int, view: memoryview) -> None:
        first = offset - offset % _SECTOR_BYTES
        length = -(-(offset + len(view) - first) // _SECTOR_BYTES) * _SECTOR_BYTES
        with contextlib.closing(mmap.mmap(-1, length)) as bounce:  # anonymous memory is aligned to pages
            if os.preadv(descriptor, [bounce], first) < offset - first + len(view):
                raise OSError("the file ends earlier; it was cut short after it was opened")
            with memoryview(bounce) as aligned:
                view[:] = aligned[offset - first : offset - first + len(view)]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it takes the name only when all was written and synced.

    Raises:
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise StoreError(f"writing {path} failed: {error.strerror or error}; nothing was kept of it") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
