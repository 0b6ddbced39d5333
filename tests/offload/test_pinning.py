"""Acceptance 14 with a driver made of paper: what is locked, what is refused, and that nothing stays locked."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import fresh
from paper import DEVICE, PAGE, Backend, Driver
from safetensors.torch import save_file

from vramkit.errors import ConfigError
from vramkit.offload import pinning, stores
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.config import OffloadConfig
from vramkit.offload.disk import span_of
from vramkit.offload.pinning import PinBudget, Pins, has_own_pages, own_pages
from vramkit.offload.resting import RestingPlace


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
    small = torch.zeros(5 * PAGE, dtype=torch.uint8)
    large = fresh(lambda: torch.zeros(40 * 2**20, dtype=torch.uint8))
    part = torch.frombuffer(memoryview(bytearray(64 * 2**20))[100:], dtype=torch.uint8)
    assert not has_own_pages(small)
    assert not has_own_pages(part)  # however large it is
    assert has_own_pages(large[5:])
    pins = Pins(DEVICE, 10**9)
    pins.keep([small, part, large[5:100]], [])
    assert not pins.covers(small)
    assert not pins.covers(part)
    assert pins.covers(large)
    assert pins.refused_bytes == 0
    pins.close()


def test_memory_that_others_locked_counts_where_all_of_it_is_locked(driver: Driver) -> None:
    whole, partly, twice = memory(4), memory(4), memory(4)
    assert driver.cudaHostRegister(whole.data_ptr(), 4 * PAGE, 0) == 0
    assert driver.cudaHostRegister(partly.data_ptr(), 2 * PAGE, 0) == 0
    for half in (0, 2):
        assert driver.cudaHostRegister(twice.data_ptr() + half * PAGE, 2 * PAGE, 0) == 0
    pins = Pins(DEVICE, 10**9)
    pins.keep([whole, partly, twice], [])
    assert [pins.covers(x) for x in (whole, partly, twice)] == [True, False, False]
    assert all(pins.touches(x) for x in (whole, partly, twice))
    assert pins.covers(partly[: 2 * PAGE])
    assert not pins.touches(partly[2 * PAGE :])
    assert pins.refused_bytes > 0
    pins.close()
    assert len(driver.locked) == 4  # theirs


@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 3), (0, 2)])
def test_the_paper_driver_refuses_what_the_real_one_refuses(driver: Driver, first: int, last: int) -> None:
    """Pages 0 and 1 are one locked range, page 2 is another, the rest is not locked."""
    block = memory(6)
    driver.cudaHostRegister(block.data_ptr(), 2 * PAGE, 0)
    driver.cudaHostRegister(block.data_ptr() + 2 * PAGE, PAGE, 0)
    backend = Backend(driver)
    target = backend.memory(6 * PAGE)
    with backend.judged():
        target[:PAGE].copy_(block[PAGE : 2 * PAGE])
        target[:PAGE].copy_(block[4 * PAGE : 5 * PAGE])
        with pytest.raises(RuntimeError, match="invalid argument"):
            target[: (last - first) * PAGE + 9].copy_(block[first * PAGE : last * PAGE + 9])


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


@pytest.mark.parametrize(
    ("start", "size", "status", "found"),
    [
        (4096, 8192, 0, (4096, 12288)),
        (4096, 8192, 1, None),  # the driver does not tell
        (40960, 8192, 0, None),  # it tells where the device sees it
    ],
)
def test_what_was_locked_together_is_asked_of_the_driver(
    start: int, size: int, status: int, found: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __init__(self, _name: str) -> None: ...

        def cuPointerGetAttribute(self, value: Any, attribute: int, address: ctypes.c_uint64) -> int:
            assert address.value == 5000
            ctypes.cast(value, ctypes.POINTER(ctypes.c_size_t))[0] = {11: start, 12: size}[attribute]
            return status

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert pinning._registered_range(5000) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_driver_nothing_is_locked() -> None:
    block = memory(1)
    assert not pinning._is_pinned(block.data_ptr())
    assert not Pins(DEVICE, 0).touches(block)


# --- a budget that several share


def test_several_share_a_budget_and_never_exceed_it(driver: Driver) -> None:
    budget = PinBudget(20 * PAGE)
    first, second = Pins(DEVICE, budget), Pins(DEVICE, budget)
    blocks = [memory(8) for _ in range(4)]
    first.keep(blocks[:2], [])
    second.keep(blocks[2:], [])
    assert 0 < first.pinned_bytes + second.pinned_bytes == budget.used_bytes <= budget.limit_bytes
    assert sum(size for size, _ in driver.locked.values()) == budget.used_bytes
    assert second.refused_bytes > 0
    first.close()
    second.keep(blocks[2:], [])
    assert second.refused_bytes == 0
    del second
    gc.collect()
    assert budget.used_bytes == 0
    assert PinBudget("2 MiB").left_bytes == 2 * 2**20
    assert PinBudget().limit_bytes > 0
    with pytest.raises(ConfigError, match="some"):
        PinBudget("some")


def test_what_the_driver_refuses_is_not_charged(driver: Driver) -> None:
    budget = PinBudget(100 * PAGE)
    driver.refuse = True
    pins = Pins(DEVICE, budget)
    pins.keep([memory(8)], [])
    assert (budget.used_bytes, pins.pinned_bytes) == (0, 0)
    assert pins.refused_bytes >= 8 * PAGE


def test_of_a_file_beyond_the_budget_the_beginning_is_locked(driver: Driver, tmp_path: Path) -> None:
    save_file({f"{at}": torch.randn(PAGE // 4) for at in range(10)}, tmp_path / "f.safetensors")
    entries = read_checkpoint(tmp_path / "f.safetensors")
    spans = sorted((entry.tensor() for entry in entries.values()), key=torch.Tensor.data_ptr)
    files = {id(span_of(t).file): span_of(t).file for t in spans}  # type: ignore[union-attr]
    budget = PinBudget(4 * PAGE + 100)
    pins = Pins(DEVICE, budget)
    for _ in range(2):  # and nothing moves when it is asked for again
        pins.keep([], files.values())
        assert budget.used_bytes == pins.pinned_bytes == 4 * PAGE
        covered = [pins.covers(span_of(t).shared()) for t in spans]  # type: ignore[union-attr]
        assert covered == sorted(covered, reverse=True)
        assert 2 <= sum(covered) <= 4
        assert pins.refused_bytes == sum(file.shared().nbytes for file in files.values()) - 4 * PAGE
    pins.close()
    assert (budget.used_bytes, driver.locked) == (0, {})


def test_pages_of_files_are_not_free_where_they_are_locked(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system counts them as memory that it could have back: a second model would lock them once more."""
    monkeypatch.setattr(pinning, "available_ram_bytes", lambda: 1000 * PAGE)
    save_file({"w": torch.randn(100 * PAGE // 4)}, tmp_path / "f.safetensors")
    (entry,) = read_checkpoint(tmp_path / "f.safetensors").values()
    pins = Pins(DEVICE, PinBudget())
    pins.keep([memory(8)], [entry.file])
    of_file = -(-entry.file.size_bytes // PAGE) * PAGE
    assert pins.pinned_bytes > of_file - PAGE > 100 * PAGE - PAGE
    assert PinBudget().limit_bytes == int((1000 * PAGE - pins.pinned_file_bytes) * 0.9)
    assert of_file - PAGE < pins.pinned_file_bytes <= of_file
    pins.close()
    assert PinBudget().limit_bytes == 900 * PAGE


def test_staging_is_charged_and_given_back(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_STAGE_BYTES", 4 * PAGE)
    budget = PinBudget(60 * PAGE)
    place = RestingPlace(
        OffloadConfig(device=DEVICE, granularity="block_level", pin_budget=budget),
        Backend(driver),  # type: ignore[arg-type]
    )
    weights = [memory(16) for _ in range(5)]
    with pytest.warns(RuntimeWarning, match="could not page-lock"):
        place.lock([weights])
    assert place.pinned_bytes == budget.used_bytes <= budget.limit_bytes
    assert sum(size for size, _ in driver.locked.values()) == budget.used_bytes
    assert len(place._staging._buffers) == 2, "what does not fit passes through it, so it is locked first"
    kinds = [place.store(weight).kind for weight in weights]
    assert {"registered", "pageable"} == set(kinds)
    place.close()
    assert (budget.used_bytes, driver.locked) == (0, {})
