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
from vramkit.offload.pinning import Pins, has_own_pages, own_pages

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
    return own_pages(pages * PAGE)


def test_a_storage_is_locked_once_in_pages_of_its_own_and_unlocked(driver: Driver) -> None:
    block = memory(8)
    pins = Pins(DEVICE, 10**9)
    parts = [block[10:PAGE], block[PAGE : 2 * PAGE + 1], block[5 * PAGE :]]
    pins.keep(parts, [])
    (start,) = driver.locked
    size, _ = driver.locked[start]
    storage = block.untyped_storage()
    assert start == block.data_ptr()
    assert storage.data_ptr() <= start
    # As many pages as the storage has whole (two more than asked for, where the allocator gave it the start of a page),
    # and none that anybody else can be in.
    assert size == (storage.data_ptr() + storage.nbytes() - start) // PAGE * PAGE
    assert size >= 8 * PAGE
    assert pins.pinned_bytes == size
    assert all(pins.covers(part) for part in (*parts, block))
    pins.close()
    assert driver.locked == {}
    assert pins.pinned_bytes == 0


def test_memory_that_shares_pages_is_left_alone(driver: Driver) -> None:
    """A stranger's tensor in a locked page could not be copied to the device any more."""
    small, large = torch.zeros(5 * PAGE, dtype=torch.uint8), torch.zeros(32 * 2**20, dtype=torch.uint8)
    assert not has_own_pages(small)
    assert has_own_pages(large[5:])
    pins = Pins(DEVICE, 10**9)
    pins.keep([small, large[5:100]], [])
    assert not pins.covers(small)
    assert pins.covers(large)
    assert pins.refused_bytes == 0
    pins.close()


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
    assert 3 * PAGE <= pins.refused_bytes <= 4 * PAGE
    assert driver.forgotten_errors == 1
    assert not pins.covers(block)


def test_budget_is_kept(driver: Driver) -> None:
    pins = Pins(DEVICE, 60 * PAGE)
    first, second = memory(40), memory(40)
    for _ in range(2):
        pins.keep([first, second], [])
        assert 40 * PAGE <= pins.pinned_bytes <= 60 * PAGE
        assert 40 * PAGE <= pins.refused_bytes <= 41 * PAGE  # of the last call alone
    assert pins.covers(first) != pins.covers(second)


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
