"""Page-lock host memory where it lies, so that a device reads it at the full speed of the link.

``torch``'s own pinned allocator copies, rounds sizes up to a power of two and takes 0.7 s per GiB; registering memory that
exists takes 0.06 s per GiB and no memory. Read-only mappings of files can be registered too where the driver says so.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterable

import torch

from vramkit.offload.disk import MappedFile

__all__ = ["Pins", "has_own_pages", "own_pages"]

_READ_ONLY = 8  # cudaHostRegisterReadOnly
_ATTRIBUTE_READ_ONLY_REGISTER = 113  # CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED

_OWN_PAGES = "_vramkit_own_pages"  # a note that a storage carries
_SEPARATE_BYTES = 32 * 2**20  # allocators give a piece of this size pages of its own (glibc: M_MMAP_THRESHOLD_MAX)

Range = tuple[int, int]  # first byte, byte after the last


class Pins:
    """The page-locked ranges of one offloaded module. Ranges never overlap; `close` unlocks them all."""

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self._ranges: dict[Range, object] = {}  # with what must stay alive while it is locked
        self.refused_bytes = 0
        # A module may go without remove(); memory that stays registered could never be page-locked again.
        weakref.finalize(self, _unlock_all, self._ranges, device).atexit = False

    @property
    def pinned_bytes(self) -> int:
        """Bytes locked now, in whole pages."""
        return sum(stop - start for start, stop in self._ranges)

    def covers(self, memory: torch.Tensor) -> bool:
        """Tell whether all bytes of `memory` lie in one locked range, of this module or whoever locked it before."""
        start, stop = _range(memory)
        return any(low <= start and stop <= high for low, high in self._ranges) or self._is_locked_by_others(memory)

    def keep(self, memories: Iterable[torch.Tensor], files: Iterable[MappedFile]) -> None:
        """Lock the storages of `memories` and whole `files`, as far as the budget and the driver allow; unlock all others.

        What could not be locked is counted in `refused_bytes`; whoever copies from it has to stage. Memory that shares pages
        with other memory (`has_own_pages`) is passed over.
        """
        storages = {memory.untyped_storage().data_ptr(): memory for memory in memories if has_own_pages(memory)}
        ranges = [(_pages_of(memory), memory) for memory in storages.values()]
        wanted: list[tuple[Range, object, int]] = [
            (span, memory, 0)
            for span, memory in ranges
            if span in self._ranges or not self._is_locked_by_others(memory)
        ]
        wanted += [(_range(file.shared()), file, _READ_ONLY) for file in files]
        spans = {span for span, _, _ in wanted}
        for span in [span for span in self._ranges if span not in spans]:
            self._unlock(span)
        new = [(span, owner, flags) for span, owner, flags in wanted if span not in self._ranges]
        refused = [span for span, owner, flags in new if not self._lock(span, owner, flags)]
        self.refused_bytes = sum(stop - start for start, stop in refused)

    def close(self) -> None:
        """Unlock everything. Copies from it must be done."""
        _unlock_all(self._ranges, self._device)

    def _lock(self, span: Range, owner: object, flags: int) -> bool:
        start, stop = span
        if self._device.type != "cuda" or (flags == _READ_ONLY and not self._read_only_is_supported()):
            return False
        if self.pinned_bytes + stop - start > self._budget_bytes:
            return False
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(start, stop - start, flags)) != 0:  # type: ignore[no-untyped-call]
                _forget_cuda_error(self._device)
                return False
        self._ranges[span] = owner
        return True

    def _is_locked_by_others(self, memory: torch.Tensor) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_available() and memory.is_pinned()

    def _unlock(self, span: Range) -> None:
        del self._ranges[span]
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


def own_pages(size_bytes: int) -> torch.Tensor:
    """Return host memory (1-D uint8) whose pages hold nothing else, so that locking them touches nobody."""
    with torch.inference_mode(False):
        whole = torch.empty(size_bytes + 2 * mmap.PAGESIZE, dtype=torch.uint8)
    setattr(whole.untyped_storage(), _OWN_PAGES, True)
    skip = -whole.data_ptr() % mmap.PAGESIZE
    return whole[skip : skip + size_bytes]


def has_own_pages(memory: torch.Tensor) -> bool:
    """Tell whether the pages of `memory` hold nothing else.

    A page can be locked only once, and a copy from memory of which only some pages are locked is an error of the driver: so
    locking a page that a stranger's tensor begins in would break every copy of that tensor.
    """
    storage = memory.untyped_storage()
    return storage.nbytes() >= _SEPARATE_BYTES or hasattr(storage, _OWN_PAGES)


def _unlock_all(ranges: dict[Range, object], device: torch.device) -> None:
    if ranges:
        torch.cuda.synchronize(device)  # copies in flight read from it
    while ranges:
        span, _owner = ranges.popitem()
        torch.cuda.cudart().cudaHostUnregister(span[0])  # type: ignore[no-untyped-call]


def _forget_cuda_error(device: torch.device) -> None:
    # The failed call left an error that the next launch would report as its own; one empty launch collects it.
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return


def _range(memory: torch.Tensor) -> Range:
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes


def _pages_of(memory: torch.Tensor) -> Range:
    """Return the pages of the storage of `memory`: those inside where it was made by `own_pages`, else all it touches."""
    storage = memory.untyped_storage()
    start, stop, page = storage.data_ptr(), storage.data_ptr() + storage.nbytes(), mmap.PAGESIZE
    if hasattr(storage, _OWN_PAGES):
        return -(-start // page) * page, stop - stop % page
    return start - start % page, -(-stop // page) * page
