"""What a piece of host memory is, as the kernel and the allocator tell: the one place that asks.

=======  =====================================================  ========================================================
kind     the bytes are                                          what follows
=======  =====================================================  ========================================================
own      an allocation with pages of its own                    its pages may be locked where they lie
part     in pages that hold other things, or nobody can tell    to be locked they are gathered into `own_pages`
file     a view of a mapped file that was not written through   they stream from that file, while they are still its bytes
shared   in a segment that other processes may write to         they are never moved; locked if the segment is theirs alone
device   not in host memory
=======  =====================================================  ========================================================

Locking works in pages, a page can be locked only once, and a driver refuses to copy from memory of which only some pages are
locked. So a page that holds a byte of somebody else is never locked: it would break every copy of that other tensor.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

__all__ = [
    "HostMemory",
    "Mapping",
    "MemoryKind",
    "MemoryMap",
    "Range",
    "give_free_memory_back",
    "own_pages",
    "range_of",
    "written_pages",
]

MemoryKind = Literal["own", "part", "file", "shared", "device"]
Range = tuple[int, int]  # addresses: first byte, byte after the last

_OWN_PAGES = "_vramkit_own_pages"  # a note that a storage carries
_PAGE = mmap.PAGESIZE

# glibc gives a piece of this size a mapping of its own, if nobody asked for something else (M_MMAP_THRESHOLD_MAX). Smaller
# ones may have one too, and are not asked: gathered they travel as one, which is faster.
_LEAST_MAPPED_BYTES = 32 * 2**20
_HEADER_BYTES = (
    16  # before the bytes that malloc returns: how far the mapping begins before the header, size with flags
)
_FLAGS, _IS_MAPPED = 7, 2  # in the size

# Bits of an entry of /proc/self/pagemap.
_PRESENT, _SWAPPED, _OF_FILE_OR_SHARED = (np.uint64(1 << bit) for bit in (63, 62, 61))
_ENTRY_BYTES = 8
_PAGES_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """A range of addresses that the kernel keeps as one. `offset` in the file, in bytes; no `path` for anonymous memory."""

    start: int
    stop: int
    is_writable: bool
    is_shared: bool
    offset: int
    file_id: tuple[str, int]  # device and inode, as the kernel names them here (file systems differ from stat in that)
    path: str

    @property
    def is_of_file(self) -> bool:
        """Whether it shows a file that has, or had, a name."""
        return self.file_id[1] != 0 and self.path.startswith("/")

    def continues(self, other: Mapping) -> bool:
        """Whether this one follows `other` in memory and, if it has one, in the file: one mapping that was split."""
        if self.start != other.stop or (self.path, self.file_id) != (other.path, other.file_id):
            return False
        if (self.is_writable, self.is_shared) != (other.is_writable, other.is_shared):
            return False
        return self.file_id[1] == 0 or self.offset == other.offset + other.stop - other.start


@dataclasses.dataclass(frozen=True, slots=True)
class HostMemory:
    """What the storage of a tensor is. `pages` hold nothing else and may be locked; `mapping` is where it lies, if known."""

    kind: MemoryKind
    pages: Range | None = None
    mapping: Mapping | None = None

    @property
    def is_seen_by_others(self) -> bool:
        """Whether other processes may write to it: a copy would miss that."""
        return self.kind == "shared" or (self.mapping is not None and self.mapping.is_shared)


class MemoryMap:
    """The mappings of this process at one moment. Where there is no ``/proc`` it is empty, and little is known."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Take the lines of ``/proc/self/maps``, which are in the order of addresses."""
        self._lines = lines
        self._starts = [int(line[: line.index("-")], 16) for line in lines]
        self._found: dict[int, Mapping] = {}  # by line; there may be thousands, of which few are asked for

    @classmethod
    def of_process(cls) -> MemoryMap:
        """Ask the kernel; takes below a millisecond."""
        try:
            text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return cls(())
        return cls([line for line in text.split("\n") if line])

    def mapping_of(self, span: Range) -> Mapping | None:
        """Return the mapping that holds all of `span`, or None."""
        at = bisect.bisect_right(self._starts, span[0]) - 1
        if at < 0:
            return None
        if at not in self._found:
            self._found[at] = self._whole(at)
        found = self._found[at]
        return found if span[0] < found.stop and span[1] <= found.stop else None

    def _whole(self, at: int) -> Mapping:
        """Join what the kernel keeps apart for reasons of its own (advice, protections that came and went)."""
        whole = _parsed(self._lines[at])
        for index in range(at - 1, -1, -1):
            if not whole.continues(before := _parsed(self._lines[index])):
                break
            whole = dataclasses.replace(whole, start=before.start, offset=before.offset)
        for index in range(at + 1, len(self._lines)):
            if not (after := _parsed(self._lines[index])).continues(whole):
                break
            whole = dataclasses.replace(whole, stop=after.stop)
        return whole

    def classify(self, leaf: torch.Tensor) -> HostMemory:
        """Tell what the storage of `leaf` is."""
        storage = leaf.untyped_storage()
        if storage.device.type != "cpu":
            return HostMemory("device")
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if hasattr(storage, _OWN_PAGES):
            return HostMemory("own", (-(-start // _PAGE) * _PAGE, stop - stop % _PAGE))
        mapping = self.mapping_of((start, stop)) if start < stop else None
        if mapping is None:
            return HostMemory("shared" if start < stop and storage.is_shared() else "part")
        if mapping.is_of_file and not (mapping.is_shared and mapping.is_writable):
            return HostMemory("file", mapping=mapping)
        if mapping.is_shared:
            is_alone = start - mapping.start < _PAGE and mapping.stop - stop < _PAGE
            return HostMemory("shared", (mapping.start, mapping.stop) if is_alone else None, mapping)
        pages = _mapped_by_malloc((start, stop), mapping)
        return HostMemory("part" if pages is None else "own", pages, mapping)


def give_free_memory_back() -> None:
    """Let the allocator give the system what it keeps of freed memory, where it can be asked to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def own_pages(size_bytes: int) -> torch.Tensor:
    """Return host memory (1-D uint8) whose pages hold nothing else, so that locking them touches nobody."""
    with torch.inference_mode(False):
        whole = torch.empty(size_bytes + 2 * _PAGE, dtype=torch.uint8, device="cpu")
    setattr(whole.untyped_storage(), _OWN_PAGES, True)
    skip = -whole.data_ptr() % _PAGE
    return whole[skip : skip + size_bytes]


def range_of(memory: torch.Tensor) -> Range:
    """Return the addresses of `memory`, which is dense."""
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes


def written_pages(span: Range) -> list[Range] | None:
    """Return the parts of `span`, a view of a file, that lie in private copies of its pages; None where nobody can tell.

    Such a page was written to after it was mapped, if not in `span` then beside it.
    """
    start, stop = span
    first, last = start // _PAGE, -(-stop // _PAGE)
    numbers = []
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as entries:
            for at in range(first, last, _PAGES_AT_ONCE):
                count = min(_PAGES_AT_ONCE, last - at)
                read = os.pread(entries.fileno(), count * _ENTRY_BYTES, at * _ENTRY_BYTES)
                if len(read) != count * _ENTRY_BYTES:
                    return None
                pages = np.frombuffer(read, dtype=np.uint64)
                is_private = ((pages & (_PRESENT | _SWAPPED)) != 0) & ((pages & _OF_FILE_OR_SHARED) == 0)
                numbers.append(np.flatnonzero(is_private) + at)
    except OSError:
        return None
    found = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
    runs = np.split(found, np.flatnonzero(np.diff(found) != 1) + 1) if found.size else []
    return [(max(start, int(run[0]) * _PAGE), min(stop, (int(run[-1]) + 1) * _PAGE)) for run in runs]


def _parsed(line: str) -> Mapping:
    addresses, permissions, offset, device, inode, *path = line.split(None, 5)
    start, stop = (int(address, 16) for address in addresses.split("-"))
    file_id = (device, int(inode))
    return Mapping(
        start, stop, permissions[1] == "w", permissions[3] == "s", int(offset, 16), file_id, path[0] if path else ""
    )


def _mapped_by_malloc(span: Range, mapping: Mapping) -> Range | None:
    """Return the pages that glibc mapped for the allocation that begins at `span`, or None: not for certain.

    Its header lies before the first byte and says so itself. That a stranger's bytes there say the same, with a beginning
    and an end that are whole pages of this mapping around `span`, cannot happen by chance.
    """
    start, stop = span
    if stop - start < _LEAST_MAPPED_BYTES or start % _HEADER_BYTES or start % _PAGE < _HEADER_BYTES:
        return None
    if ctypes.sizeof(ctypes.c_size_t) != _ENTRY_BYTES or mapping.is_of_file or mapping.path in ("[heap]", "[stack]"):
        return None
    header = start - _HEADER_BYTES
    before, size = (ctypes.c_size_t * 2).from_address(header)
    low, high = header - before, header + (size & ~_FLAGS)
    fits = mapping.start <= low and stop <= high <= mapping.stop and low % _PAGE == 0 and high % _PAGE == 0
    return (low, high) if size & _FLAGS == _IS_MAPPED and fits else None
