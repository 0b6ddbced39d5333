"""A device made of paper: RAM that counts as device memory, and a driver that judges locks and copies as the real one does.

The real driver works in pages, locks none of them twice, and answers "invalid argument" to a copy from memory of which only
a part is locked, or which lies in two locked ranges.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vramkit import tensors
from vramkit.offload import pinning
from vramkit.offload.pinning import Pins

DEVICE = torch.device("cuda", 0)
PAGE = mmap.PAGESIZE


class Driver:
    """Counts what is registered; refuses ranges that overlap, and whatever `refuse` says."""

    def __init__(self) -> None:
        self.locked: dict[int, tuple[int, int]] = {}
        self.refuse = False
        self.forgotten_errors = 0
        self.copied_bytes = 0

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        pages = start // PAGE, -(-(start + size) // PAGE)
        overlaps = any(low // PAGE < pages[1] and pages[0] < -(-high // PAGE) for low, high in self.ranges())
        if self.refuse or overlaps:
            return 2
        assert start % PAGE == 0
        self.locked[start] = (size, flags)
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        del self.locked[start]
        return 0

    def ranges(self) -> list[tuple[int, int]]:
        return [(start, start + size) for start, (size, _) in self.locked.items()]

    def range_at(self, address: int) -> tuple[int, int] | None:
        return next(((low, high) for low, high in self.ranges() if low <= address < high), None)

    def copy(self, source: torch.Tensor) -> None:
        """Judge a copy from `source` to the device; of memory with holes a host copy is what travels."""
        if not tensors.is_dense(source) or not source.nbytes:
            return
        start, stop = source.data_ptr(), source.data_ptr() + source.nbytes
        found = [(low, high) for low, high in self.ranges() if low < stop and start < high]
        if found and not (len(found) == 1 and found[0][0] <= start and stop <= found[0][1]):
            raise RuntimeError("CUDA error: invalid argument")
        self.copied_bytes += source.nbytes


class Backend:
    """The backend of the paper device."""

    device = DEVICE

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._memories: list[torch.Tensor] = []  # kept, so that no host memory gets their addresses

    def memory(self, size_bytes: int) -> torch.Tensor:
        self._memories.append(torch.zeros(size_bytes, dtype=torch.uint8, device="cpu"))
        return self._memories[-1]

    def fence(self) -> Any:
        return SimpleNamespace(wait=lambda: 0.0, synchronize=lambda: None)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Let the driver judge every copy to memory of this device."""
        owner = self

        class Copies(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten.copy_.default and owner.holds(args[0]) and not owner.holds(args[1]):
                    owner._driver.copy(args[1])
                return func(*args, **(kwargs or {}))

        with Copies():
            yield

    def holds(self, tensor: torch.Tensor) -> bool:
        ours = {memory.untyped_storage().data_ptr() for memory in self._memories}
        return tensor.untyped_storage().data_ptr() in ours


def install(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Let `Pins` speak with a new paper driver."""
    driver = Driver()

    class NoDevice:
        def __init__(self, _device: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def forget(_device: torch.device) -> None:
        driver.forgotten_errors += 1

    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", NoDevice)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(pinning, "_forget_cuda_error", forget)
    monkeypatch.setattr(pinning, "_registered_range", driver.range_at)
    monkeypatch.setattr(Pins, "_is_locked", lambda _self, address: driver.range_at(address) is not None)
    monkeypatch.setattr(Pins, "_read_only_is_supported", lambda _self: True)
    return driver
