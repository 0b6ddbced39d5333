"""Files as a place where weights rest: opened once, mapped for tensors at rest, read in pieces for slots, written whole.

This is the one place that knows about disks. A file is mapped twice, each on demand:

- copy-on-write for tensors that a module holds at rest. Reading shares the page cache with everybody; writing to such a
  tensor changes a private page and never the file.
- shared and read-only for transfers, which a driver can page-lock without copying the file into RAM.

Other loaders make the first mapping themselves. `ForeignViews` finds the file of such a tensor, which from there on is as
one of ours: its storage carries a `FileSpan`.

A mapping shows what the file is now. Where one was cut, touching it ends the process (SIGBUS), and one that was written to
gives new bytes beside old ones. So a file is looked at before it is touched, and after: `MappedFile.check`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
import mmap
import os
import re
import secrets
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vramkit import tensors
from vramkit.errors import ConfigError, StoreError
from vramkit.offload.memory_map import Mapping, MemoryMap, range_of, written_pages
from vramkit.offload.workers import Job, Workers

__all__ = [
    "FileReader",
    "FileSpan",
    "ForeignViews",
    "MappedFile",
    "SpillFile",
    "atomic_write",
    "check_files_of",
    "file_of",
    "forget_span",
    "lock_file",
    "read_workers",
    "remove_rubbish",
    "span_of",
    "staged_folder",
    "views_like",
]

_READ_THREADS = 4
_PIECE_BYTES = 8 * 2**20  # one read request: large enough for full speed, small enough to share among threads
_SPAN, _FILE, _MAPPING = "_vramkit_span", "_vramkit_file", "_vramkit_mapping"  # notes that a storage carries
_SETTLED_SECONDS = 60.0  # a folder without a lock may be one that gets it soon
_SPILL_ALIGNMENT_BYTES = 64  # of tensors in a file of ours
# The files that hold the weights of one name: the only one, or a shard, or the index of shards, that of a variant too.
_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<variant>\.[\w-]+)?\.json)?")
_SECTOR_BYTES = 4096  # alignment that O_DIRECT asks of offset, length and memory


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
        _note(tensor.untyped_storage(), span)
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
            self._stamp = _stamp(self.fileno())
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
    return -(-size_bytes // _SPILL_ALIGNMENT_BYTES) * _SPILL_ALIGNMENT_BYTES


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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileSpan:
    """The bytes of one tensor in a file."""

    file: MappedFile
    offset: int
    size_bytes: int

    def shared(self) -> torch.Tensor:
        """Return the bytes in the file, as uint8, whatever was written to the tensor since."""
        return self.file.shared()[self.offset : self.offset + self.size_bytes]

    def part(self, offset: int, size_bytes: int) -> FileSpan:
        """Return the span of `size_bytes` from byte `offset` of this one on."""
        if (offset, size_bytes) == (0, self.size_bytes):
            return self
        return FileSpan(self.file, self.offset + offset, size_bytes)

    def may_differ(self, leaf: torch.Tensor) -> bool:
        """Tell whether `leaf`, whose span this is, was written to since it was mapped, by whatever way.

        The kernel knows which pages were copied for that. Neighbours share pages, so the bytes in those are compared; where
        the kernel is not to be asked, all are.

        Raises:
            StoreError: the file is no longer what it was.
        """
        self.file.check()
        memory = tensors.byte_view(leaf)
        start, stop = range_of(memory)
        parts = written_pages((start, stop))
        if parts is None:
            parts = [(start, stop)]
        inside = (slice(low - start, high - start) for low, high in parts)
        return not all(torch.equal(memory[part], self.shared()[part]) for part in inside)


class ForeignViews:
    """Files that somebody else mapped, each opened once more: of tensors that ordinary loaders left as views of them."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int], MappedFile] = {}

    def note(self, leaves: Iterable[torch.Tensor], known: MemoryMap) -> None:
        """Let storages of `leaves` that are views of a file carry their `FileSpan`.

        A file that was deleted, replaced or cannot be opened is passed over: its views are ordinary memory.
        """
        found = ((leaf.untyped_storage(), known.classify(leaf)) for leaf in leaves)
        views = [
            (s, m.mapping) for s, m in found if m.kind == "file" and m.mapping is not None and not hasattr(s, _SPAN)
        ]
        self._open({mapping.file_id: mapping for _, mapping in views if mapping.file_id not in self._files})
        for storage, mapping in views:
            file = self._files.get(mapping.file_id)
            offset = mapping.offset + storage.data_ptr() - mapping.start
            if file is not None and offset + storage.nbytes() <= file.size_bytes:
                _note(storage, FileSpan(file, offset, storage.nbytes()))

    def _open(self, mappings: dict[tuple[str, int], Mapping]) -> None:
        opened = {}
        for file_id, mapping in mappings.items():
            with contextlib.suppress(OSError, StoreError):
                if Path(mapping.path).is_file():
                    opened[file_id] = MappedFile(mapping.path)
                    opened[file_id].shared()
        if opened:
            # Whether it is the same file, the kernel says, by the name that it gives to our mapping of it.
            now = MemoryMap.of_process()
            same = {file_id: now.mapping_of(range_of(file.shared())) for file_id, file in opened.items()}
            self._files |= {k: opened[k] for k, mine in same.items() if mine is not None and mine.file_id == k}


def span_of(leaf: torch.Tensor) -> FileSpan | None:
    """Return where in a file the bytes of `leaf` rest (in whatever order of dimensions), or None.

    Whether they are still those of the file, `FileSpan.may_differ` tells, and `forget_span` notes.
    """
    span: FileSpan | None = getattr(leaf.untyped_storage(), _SPAN, None)
    if span is None or leaf.nbytes == 0 or not tensors.is_dense(leaf):
        return None
    offset = int(leaf.storage_offset()) * leaf.element_size()
    return span.part(offset, leaf.nbytes) if offset + leaf.nbytes <= span.size_bytes else None


def forget_span(leaf: torch.Tensor) -> None:
    """From now on take `leaf` for ordinary memory: it was changed."""
    with contextlib.suppress(AttributeError):
        delattr(leaf.untyped_storage(), _SPAN)


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


def file_of(leaf: torch.Tensor) -> MappedFile | None:
    """Return the file whose pages the memory of `leaf` is, those apart that were written to since it was mapped; or None."""
    return getattr(leaf.untyped_storage(), _FILE, None) if leaf.layout == torch.strided else None


def check_files_of(leaves: Iterable[torch.Tensor]) -> None:
    """Look at the files of `leaves` before their memory is touched; see `MappedFile.check`."""
    for file in {id(file): file for file in map(file_of, leaves) if file is not None}.values():
        file.check()


def _note(storage: torch.UntypedStorage, span: FileSpan) -> None:
    setattr(storage, _SPAN, span)
    setattr(storage, _FILE, span.file)


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


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it takes the name only when all was written and synced.

    It has the permissions that the user's umask leaves.

    Raises:
        ConfigError: `folder` is no path.
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _unused_beside(path)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise StoreError(f"writing {path} failed: {error.strerror or error}; nothing was kept of it") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder for files, of whoever writes them, that move into `folder` when all are written.

    They get the permissions that the user's umask leaves. Weights of the same name that `folder` had go, shards and index
    too; its other files stay.

    Raises:
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind then, nor after any other
            error, and what `folder` held is as it was.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ConfigError(f"{type(folder).__name__} was given, expected the path of a folder")
    folder = Path(folder).expanduser().absolute()
    missing = [parent for parent in folder.parents if not parent.exists()]
    stage = folder / f".{secrets.token_hex(4)}.partial" if folder.is_dir() else _unused_beside(folder)
    try:
        stage.mkdir(parents=True)
        yield stage
        _move_in(stage, folder)
        missing = []
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"writing {folder} failed: {error.strerror or error}; nothing was kept of it") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in missing:  # the innermost first; those that somebody uses by now stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def _unused_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _move_in(stage: Path, folder: Path) -> None:
    readable = stage.stat().st_mode & 0o666  # of a folder that was made by the umask
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    for file in files:
        file.chmod(readable)
    if not folder.exists():
        stage.replace(folder)
        return
    for file in files:
        target = folder / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    written = {folder / file.relative_to(stage) for file in files}
    names = {(path.parent, name) for path in written if (name := _name_of_weights(path))}
    for parent in {parent for parent, _ in names}:
        for path in set(parent.iterdir()) - written:
            if (parent, _name_of_weights(path)) in names:
                path.unlink(missing_ok=True)


def _name_of_weights(path: Path) -> str | None:
    """Return the name that all files of the same weights have in common, with their variant; None for other files."""
    found = _WEIGHTS.fullmatch(path.name)
    return None if found is None else found["stem"] + (found["variant"] or "")
