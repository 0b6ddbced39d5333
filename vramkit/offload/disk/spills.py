"""Files of ours that tensors are written to, to rest there: one process's alone, and gone with it."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vramkit import tensors
from vramkit.errors import StoreError
from vramkit.offload.disk.mapped_file import MappedFile

__all__ = ["SpillFile", "SpillFolder", "lock_file", "remove_rubbish", "views_like"]

_ALIGNMENT_BYTES = 64  # of tensors in a file
_SETTLED_SECONDS = 60.0  # a folder without a lock may be one that gets it soon


class SpillFile(MappedFile):
    """A file of ours that tensors are written to one after the other, each being a view of it from then on.

    One file for all: a file for each would take a descriptor or three of it, and systems give a process a thousand. The
    process holds a lock on it, which the kernel takes back however that ends: what nobody holds is rubbish.
    """

    def __init__(self, path: Path, leaves: Iterable[torch.Tensor]) -> None:
        """Make a file with room for `leaves`.

        Raises:
            StoreError: the folder cannot be written.
        """
        room = sum(_padded(leaf.nbytes) for leaf in leaves)
        try:
            with path.open("xb") as file:
                os.truncate(file.fileno(), room)
        except OSError as error:
            raise StoreError(f"writing {path} failed: {error.strerror or error}") from error
        super().__init__(path)
        lock_file(self.fileno())
        self._end = 0
        self._is_whole = True  # as far as it was to be written

    def check(self) -> None:
        """Look whether it is what was written to it. Where writing has failed, what was written before is good."""
        if self._is_whole:
            super().check()

    def add(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Write the bytes of `leaves`, of any device, and return the same tensors as views of the file.

        Raises:
            StoreError: the disk is full, or cannot be written. Nothing is a view of what was not written then.
        """
        start, self._is_whole = self._end, False
        try:
            with self.path.open("r+b") as file:
                file.seek(self._end)
                for leaf in leaves:
                    file.write(tensors.byte_view(_dense(leaf).cpu()).numpy().data)
                    file.seek(_padded(leaf.nbytes) - leaf.nbytes, os.SEEK_CUR)
                self._end = file.tell()
                file.flush()
                os.fsync(file.fileno())
            self.acknowledge()
            self._is_whole = True
        except OSError as error:
            raise StoreError(f"writing {self.path} failed: {error.strerror or error}") from error
        return views_like(leaves, self, start)


def views_like(leaves: Sequence[torch.Tensor], file: MappedFile, start: int = 0) -> list[torch.Tensor]:
    """Return `leaves` as views of the file to which `SpillFile.add` has written them, from byte `start` on."""
    sizes = (_padded(leaf.nbytes) for leaf in leaves)
    offsets = itertools.accumulate(sizes, initial=start)
    return [
        file.tensor(offset, torch.uint8, (leaf.nbytes,))
        .view(leaf.dtype)
        .as_strided(leaf.shape, tensors.dense_like(leaf))
        for offset, leaf in zip(offsets, leaves, strict=False)  # the last offset is the end
    ]


def _dense(leaf: torch.Tensor) -> torch.Tensor:
    """Return `leaf` as one span of bytes; transposed weights stay transposed."""
    return leaf if tensors.is_dense(leaf) else leaf.contiguous().resolve_conj().resolve_neg()


class SpillFolder:
    """A folder of one module's spill files, made with the first of them, which goes with this object at the latest.

    It is never read by another module or a later run, so nothing stale is ever served.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._process = os.getpid()
        self._path: Path | None = None
        self._count = 0
        self.files: list[SpillFile] = []

    def new_file(self, leaves: Iterable[torch.Tensor]) -> SpillFile:
        """Make a file with room for `leaves`.

        Raises:
            StoreError: the folder cannot be made or written.
        """
        if self._path is None:
            path = self._parent / f"vramkit-{secrets.token_hex(8)}"
            weakref.finalize(self, _remove, path, self._process)
            remove_rubbish(self._parent.glob("vramkit-" + "[0-9a-f]" * 16))
            self._path = path  # known before it is made, so that `remove` finds it whatever comes between
            _make(path)
        file = SpillFile(self._path / f"{self._count:05d}.bin", leaves)
        self._count += 1
        self.files.append(file)
        return file

    def drop(self, file: SpillFile) -> None:
        """Remove a file that nobody needs any more."""
        self.files.remove(file)
        file.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with all that is in it; not in a process that was forked from the one that made it."""
        self.files.clear()
        if self._path is not None:
            _remove(self._path, self._process)
            self._path = None


def remove_rubbish(folders: Iterable[Path]) -> None:
    """Remove those of `folders` whose spill files belong to no process any more: it was ended by force."""
    for folder in folders:
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _SETTLED_SECONDS:
                continue  # it is being made
            with contextlib.ExitStack() as held:
                files = [held.enter_context(path.open("rb")) for path in folder.iterdir()]
                is_rubbish = all(lock_file(file.fileno()) for file in files)
            if is_rubbish:
                shutil.rmtree(folder, ignore_errors=True)


def lock_file(descriptor: int) -> bool | None:
    """Lock a file until it is closed, or the process ends in any way; False where somebody else has it.

    None where there is no such lock: on Windows, and on some file systems.
    """
    try:
        import fcntl  # noqa: PLC0415 (not on Windows)

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise StoreError(
            f"offload_to_disk_path={str(folder.parent)!r} cannot be written: {error.strerror or error}"
        ) from error


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
