"""Bytes of a file read in pieces, for slots."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from functools import partial

import torch

from vramkit.errors import StoreError
from vramkit.offload.disk.mapped_file import MappedFile
from vramkit.offload.workers import Job, Workers

__all__ = ["FileReader", "read_workers"]

_READ_THREADS = 4
_PIECE_BYTES = 8 * 2**20  # one read request: large enough for full speed, small enough to share among threads
_SECTOR_BYTES = 4096  # alignment that O_DIRECT asks of offset, length and memory


class FileReader:
    """Reads spans of one file into memory with several threads, through the page cache or around it (O_DIRECT)."""

    def __init__(self, file: MappedFile, *, direct: bool = False, workers: Workers | None = None) -> None:
        """Read with `workers`, which several files share and others end, or with threads of its own."""
        self._file = file  # kept open by this reference
        self._workers = read_workers() if workers is None else workers
        self._owns_workers = workers is None
        self._direct: int | None = None
        if direct and hasattr(os, "preadv"):
            with contextlib.suppress(OSError, AttributeError):  # not every file system or platform has it
                descriptor = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
                close = weakref.finalize(self, os.close, descriptor)
                if file.is_at(descriptor):
                    self._direct, self._close_direct = descriptor, close
                else:  # its name is another one's by now
                    close()

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
        jobs: list[Job[None]] = []
        try:
            jobs.extend(
                self._workers.submit(partial(self._read_piece, offset + at, view[at : at + _PIECE_BYTES]))
                for at in range(0, len(view), _PIECE_BYTES)
            )
        finally:
            for job in jobs:  # all, also where one has failed: nobody may write to `target` any more after this
                job.wait()
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Close what this reader opened, and end threads of its own. Later calls do nothing."""
        if self._owns_workers:
            self._workers.close()
        if self._direct is not None:
            self._close_direct()  # once, whoever asks: the number may be another file's by then
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
            count = self._file.read_into(offset + done, view[done:])
            if count == 0:
                raise OSError(f"the file ends at byte {offset + done}; it was cut short after it was opened")
            done += count

    def _read_direct(self, descriptor: int, offset: int, view: memoryview) -> None:
        first = offset - offset % _SECTOR_BYTES
        length = -(-(offset + len(view) - first) // _SECTOR_BYTES) * _SECTOR_BYTES
        with contextlib.closing(mmap.mmap(-1, length)) as bounce:  # anonymous memory is aligned to pages
            came = max(0, os.preadv(descriptor, [bounce], first) - (offset - first))
            done = min(came, len(view))
            with memoryview(bounce) as aligned:
                view[:done] = aligned[offset - first : offset - first + done]
        self._read_plain(offset + done, view[done:])  # the rest, where the read ended early


def read_workers() -> Workers:
    """Return threads for readers: enough to keep a disk busy."""
    return Workers("vramkit-read", _READ_THREADS)
