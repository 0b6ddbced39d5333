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

__all__ = ["Pins"]

_READ_ONLY = 8  # cudaHostRegisterReadOnly
_ATTRIBUTE_READ_ONLY_REGISTER = 113  # CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED

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
        """Tell whether all bytes of `memory` lie in one locked range."""
        start, stop = _range(memory)
        return any(low <= start and stop <= high for low, high in self._ranges)

    def keep(self, memories: Iterable[torch.Tensor], files: Iterable[MappedFile]) -> None:
        """Lock the pages of `memories` and whole `files`, as far as the budget and the driver allow; unlock all others.

        What could not be locked adds to `refused_bytes`; whoever copies from it has to stage.
        """
        wanted: list[tuple[Range, object, int]] = [(span, owners, 0) for span, owners in _merged(memories)]
        if self._read_only_is_supported():
            wanted += [(_range(file.shared()), [file], _READ_ONLY) for file in files]
        else:
            self.refused_bytes += sum(file.size_bytes for file in files)
        spans = {span for span, _, _ in wanted}
        for span in [span for span in self._ranges if span not in spans]:
            self._unlock(span)
        for span, owner, flags in wanted:
            if span not in self._ranges and not self._lock(span, owner, flags):
                self.refused_bytes += span[1] - span[0]

    def close(self) -> None:
        """Unlock everything. Copies from it must be done."""
        _unlock_all(self._ranges, self._device)

    def _lock(self, span: Range, owner: object, flags: int) -> bool:
        start, stop = span
        if self._device.type != "cuda" or self.pinned_bytes + stop - start > self._budget_bytes:
            return False
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(start, stop - start, flags)) != 0:  # type: ignore[no-untyped-call]
                _forget_cuda_error(self._device)
                return False
        self._ranges[span] = owner
        return True

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
    return memory.data_ptr(), memory.data_ptr() + memory.numel() * memory.element_size()


def _merged(memories: Iterable[torch.Tensor]) -> list[tuple[Range, list[torch.Tensor]]]:
    """Round each range out to whole pages and join those that touch, because a page can be locked only once."""
    merged: list[tuple[Range, list[torch.Tensor]]] = []
    for memory in sorted(memories, key=torch.Tensor.data_ptr):
        start, stop = _range(memory)
        start, stop = start - start % mmap.PAGESIZE, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE
        if merged and start <= merged[-1][0][1]:
            (low, high), owners = merged[-1]
            merged[-1] = (low, max(high, stop)), [*owners, memory]
        else:
            merged.append(((start, stop), [memory]))
    return merged
