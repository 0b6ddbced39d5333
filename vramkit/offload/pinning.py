"""Page-lock host memory where it lies, so that a device reads it at the full speed of the link.

``torch``'s own pinned allocator copies, rounds sizes up to a power of two and takes 0.7 s per GiB; registering memory that
exists takes 0.06 s per GiB and no memory. Read-only mappings of files can be registered too where the driver says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterable

import torch

from vramkit.memory import available_ram_bytes, parse_bytes
from vramkit.offload.disk import MappedFile
from vramkit.offload.memory_map import MemoryMap, Range, own_pages, range_of

__all__ = ["PinBudget", "Pins", "has_own_pages", "own_pages"]

_PAGE = mmap.PAGESIZE
_RAM_SHARE = 0.9  # of what is free, for page-locking files that are not in RAM yet
_READ_ONLY = 8  # cudaHostRegisterReadOnly
_ATTRIBUTE_READ_ONLY_REGISTER = 113  # CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
_ATTRIBUTE_RANGE_START, _ATTRIBUTE_RANGE_SIZE = 11, 12  # CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, _RANGE_SIZE


class PinBudget:
    """How much host memory may be page-locked together, by all modules that are given the same one.

    What does not fit is staged: it stays a mapped file, or ordinary memory.
    """

    def __init__(self, limit: int | str | None = None) -> None:
        """Take the limit: bytes, text, or None for nine tenths of the RAM that is free now, and not locked by us.

        Raises:
            ConfigError: `limit` is no size.
        """
        self.limit_bytes = int(_lockable_bytes() * _RAM_SHARE) if limit is None else parse_bytes(limit)
        self.used_bytes = 0
        self._lock = threading.Lock()

    @property
    def left_bytes(self) -> int:
        """What may still be locked."""
        return max(0, self.limit_bytes - self.used_bytes)

    def take(self, size_bytes: int) -> bool:
        """Have `size_bytes` of it, or none where they are not left."""
        with self._lock:
            if size_bytes > self.left_bytes:
                return False
            self.used_bytes += size_bytes
            return True

    def give(self, size_bytes: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self.used_bytes -= size_bytes


class Pins:
    """The page-locked ranges of one offloaded module. Ranges never overlap; `close` unlocks them all."""

    def __init__(self, device: torch.device, budget: PinBudget | int) -> None:
        self._device = device
        self._budget = budget if isinstance(budget, PinBudget) else PinBudget(budget)
        self._ranges: dict[Range, object] = {}  # with what must stay alive while it is locked
        self.refused_bytes = 0
        # A module may go without remove(); memory that stays registered could never be page-locked again.
        self._process = os.getpid()
        weakref.finalize(self, _unlock_all, self._ranges, device, self._budget, self._process).atexit = False
        _LIVING.add(self)

    @property
    def pinned_file_bytes(self) -> int:
        """Those of `pinned_bytes` that are pages of files."""
        return sum(stop - start for (start, stop), owner in [*self._ranges.items()] if isinstance(owner, MappedFile))

    @property
    def pinned_bytes(self) -> int:
        """Bytes locked now, in whole pages."""
        return sum(stop - start for start, stop in self._ranges)

    def covers(self, memory: torch.Tensor) -> bool:
        """Tell whether all bytes of `memory` lie in one locked range, of this module or whoever locked it before."""
        start, stop = range_of(memory)
        return any(low <= start and stop <= high for low, high in self._ranges) or self._is_locked_by_others(
            (start, stop)
        )

    def touches(self, memory: torch.Tensor) -> bool:
        """Tell whether some bytes of `memory` may be locked: then a plain copy of it to the device can fail."""
        start, stop = range_of(memory)
        return any(low < stop and start < high for low, high in self._ranges) or (
            start < stop and (self._is_locked(start) or self._is_locked(stop - 1))
        )

    def keep(
        self, memories: Iterable[torch.Tensor], files: Iterable[MappedFile], known: MemoryMap | None = None
    ) -> None:
        """Lock the pages of `memories` and whole `files`, as far as the budget and the driver allow; unlock all others.

        Of a file that does not fit the budget, the beginning is locked. What could not be locked is counted in
        `refused_bytes`; whoever copies from it has to stage. Memory that shares pages with other memory (says the map, made
        anew if none is `known`) is passed over.
        """
        known = MemoryMap.of_process() if known is None else known
        ranges = [(known.classify(memory).pages, memory) for memory in memories]
        wanted: list[tuple[Range, object, int]] = [
            (span, memory, 0)
            for span, memory in {span: memory for span, memory in ranges if span is not None}.items()
            if span in self._ranges or not self._is_locked_by_others(range_of(memory))
        ]
        wanted += [(self._range_of(file) or range_of(file.shared()), file, _READ_ONLY) for file in files]
        spans = {span for span, _, _ in wanted}
        for span in [span for span in self._ranges if span not in spans]:
            self._unlock(span)
        for span, owner, flags in wanted:
            if span not in self._ranges:
                self._lock(self._affordable(span, flags), owner, flags)
        whole = [range_of(owner.shared()) if isinstance(owner, MappedFile) else span for span, owner, _ in wanted]
        asked = sum(stop - start for start, stop in whole)
        self.refused_bytes = asked - self.pinned_bytes

    def keep_own(self, memory: torch.Tensor) -> bool:
        """Lock `memory`, which is from `own_pages`, beside what is locked; tell if that was possible."""
        pages = MemoryMap(()).classify(memory).pages
        return pages is not None and self._lock(pages, memory, 0) > 0

    def close(self) -> None:
        """Unlock everything. Copies from it must be done."""
        _unlock_all(self._ranges, self._device, self._budget, self._process)

    def _range_of(self, file: MappedFile) -> Range | None:
        return next((span for span, owner in self._ranges.items() if owner is file), None)

    def _affordable(self, span: Range, flags: int) -> Range:
        """Return `span`, or of a file what the budget has left for it, in whole pages."""
        start, stop = span
        if flags != _READ_ONLY or stop - start <= self._budget.left_bytes:
            return span
        return start, start + self._budget.left_bytes // _PAGE * _PAGE

    def _lock(self, span: Range, owner: object, flags: int) -> int:
        """Lock a range, and return its bytes: 0 where that is not possible."""
        size = span[1] - span[0]
        if not size or self._device.type != "cuda" or (flags == _READ_ONLY and not self._read_only_is_supported()):
            return 0
        if not self._budget.take(size):
            return 0
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(span[0], size, flags)) != 0:  # type: ignore[no-untyped-call]
                _forget_cuda_error(self._device)
                self._budget.give(size)
                return 0
        self._ranges[span] = owner
        return size

    def _is_locked_by_others(self, span: Range) -> bool:
        start, stop = span
        if start == stop or not self._is_locked(start) or not self._is_locked(stop - 1):
            return False
        registered = _registered_range(start)
        return registered is None or stop <= registered[1]

    def _is_locked(self, address: int) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_available() and _is_pinned(address)

    def _unlock(self, span: Range) -> None:
        del self._ranges[span]
        self._budget.give(span[1] - span[0])
        torch.cuda.cudart().cudaHostUnregister(span[0])  # type: ignore[no-untyped-call]

    def _read_only_is_supported(self) -> bool:
        if self._device.type != "cuda" or torch.version.cuda is None:
            return False
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return False
        supported = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(supported), _ATTRIBUTE_READ_ONLY_REGISTER, self._device.index or 0)
        return bool(supported.value)


_LIVING: weakref.WeakSet[Pins] = weakref.WeakSet()  # all of this process


def _lockable_bytes() -> int:
    """Return what is free, without the pages of files that are locked: the system counts them as if it could drop them."""
    return max(0, available_ram_bytes() - sum(pins.pinned_file_bytes for pins in list(_LIVING)))


def has_own_pages(memory: torch.Tensor) -> bool:
    """Tell whether the pages of the storage of `memory` hold nothing else, for certain."""
    return MemoryMap.of_process().classify(memory).pages is not None


def _is_pinned(address: int) -> bool:
    # torch asks the driver about the first byte of a storage alone, so this makes one of the byte that is meant.
    return torch.frombuffer((ctypes.c_ubyte * 1).from_address(address), dtype=torch.uint8).is_pinned()


def _registered_range(address: int) -> Range | None:
    """Return what was locked together with the byte at `address`, or None where the driver does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    found = []
    for attribute in (_ATTRIBUTE_RANGE_START, _ATTRIBUTE_RANGE_SIZE):
        value = ctypes.c_size_t(0)
        if driver.cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(address)) != 0:
            return None
        found.append(value.value)
    start, size = found
    return (start, start + size) if start <= address < start + size else None


def _unlock_all(ranges: dict[Range, object], device: torch.device, budget: PinBudget, process: int) -> None:
    if os.getpid() != process:  # forked: the device, and what is locked for it, are the other process's
        ranges.clear()
    if ranges:
        torch.cuda.synchronize(device)  # copies in flight read from it
    while ranges:
        span, _owner = ranges.popitem()
        budget.give(span[1] - span[0])
        torch.cuda.cudart().cudaHostUnregister(span[0])  # type: ignore[no-untyped-call]


def _forget_cuda_error(device: torch.device) -> None:
    # The failed call left an error that the next launch would report as its own; one empty launch collects it.
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return
