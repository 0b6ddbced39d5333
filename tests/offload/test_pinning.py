"""Acceptance 14 with a driver made of paper: what is locked, what is refused, and that nothing stays locked."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vramkit.offload import pinning
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.disk import span_of
from vramkit.offload.pinning import Pins

DEVICE = torch.device("cuda", 0)
PAGE = mmap.PAGESIZE


class Driver:
    """Counts what is registered; refuses ranges that overlap, and whatever `refuse` says."""

    def __init__(self) -> None:
        self.locked: dict[int, tuple[int, int]] = {}
        self.refuse = False
        self.forgotten_errors = 0

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        overlaps = any(start < low + length and low < start + size for low, (length, _) in self.locked.items())
        if self.refuse or overlaps:
            return 2
        assert start % PAGE == 0
        self.locked[start] = (size, flags)
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        del self.locked[start]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
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
    monkeypatch.setattr(Pins, "_read_only_is_supported", lambda _self: True)
    yield driver
    gc.collect()


def memory(pages: int) -> torch.Tensor:
    """Return bytes that begin at a page and share no page with others."""
    whole = torch.zeros((pages + 2) * PAGE, dtype=torch.uint8)
    skip = -whole.data_ptr() % PAGE
    return whole[skip : skip + pages * PAGE]


def test_memory_is_locked_once_in_whole_pages_and_unlocked(driver: Driver) -> None:
    block = memory(8)
    pins = Pins(DEVICE, 10**9)
    parts = [block[10:PAGE], block[PAGE : 2 * PAGE + 1], block[5 * PAGE : 6 * PAGE]]
    pins.keep(parts, [])
    assert driver.locked == {block.data_ptr(): (3 * PAGE, 0), block.data_ptr() + 5 * PAGE: (PAGE, 0)}
    assert pins.pinned_bytes == 4 * PAGE
    assert all(pins.covers(part) for part in parts)
    assert not pins.covers(block[4 * PAGE : 5 * PAGE])
    assert not pins.covers(block[: 6 * PAGE])
    pins.close()
    assert driver.locked == {}
    assert pins.pinned_bytes == 0


def test_files_are_locked_whole_and_read_only(driver: Driver, tmp_path: Path) -> None:
    save_file({"x": torch.ones(5000)}, tmp_path / "x.safetensors")
    tensor = read_checkpoint(tmp_path / "x.safetensors")["x"].tensor()
    span = span_of(tensor)
    assert span is not None
    pins = Pins(DEVICE, 10**9)
    pins.keep([], [span.file])
    assert [flags for _, flags in driver.locked.values()] == [8]
    assert pins.covers(span.shared())
    pins.close()
    assert driver.locked == {}


def test_refused_memory_is_counted_and_its_error_collected(driver: Driver) -> None:
    driver.refuse = True
    pins = Pins(DEVICE, 10**9)
    pins.keep([block := memory(3)], [])
    assert pins.refused_bytes == 3 * PAGE
    assert driver.forgotten_errors == 1
    assert not pins.covers(block)


def test_budget_is_kept(driver: Driver) -> None:
    pins = Pins(DEVICE, 5 * PAGE)
    first, second = memory(4), memory(4)
    pins.keep([first, second], [])
    assert pins.pinned_bytes == 4 * PAGE
    assert pins.refused_bytes == 4 * PAGE


def test_keeping_others_unlocks_what_is_not_wanted_any_more(driver: Driver) -> None:
    pins = Pins(DEVICE, 10**9)
    first, second = memory(2), memory(2)
    pins.keep([first], [])
    pins.keep([first, second], [])
    assert pins.covers(first)
    assert pins.covers(second)
    pins.keep([second], [])
    assert driver.locked.keys() == {second.data_ptr()}
    pins.close()


def test_pins_that_go_without_close_unlock_their_memory(driver: Driver) -> None:
    """Else the addresses could never be locked again."""
    pins = Pins(DEVICE, 10**9)
    block = memory(2)
    pins.keep([block], [])
    del pins
    gc.collect()
    assert driver.locked == {}
    again = Pins(DEVICE, 10**9)
    again.keep([block], [])
    assert again.covers(block)
    again.close()
