"""What memory is: own allocation, part of something, view of a file, shared segment."""

from __future__ import annotations

import mmap
import sys
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import fresh
from safetensors.torch import load_file, save_file

from vramkit.offload.memory_map import MemoryMap, own_pages, range_of, written_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
PAGE = mmap.PAGESIZE
LARGE = 64 * 2**20  # above the largest threshold of glibc for mappings of their own
LINES = [
    "1000-3000 rw-p 00000000 fe:00 12    /data/a file.bin",
    "3000-4000 rw-p 00002000 fe:00 12    /data/a file.bin",  # split off by advice
    "4000-5000 rw-p 00008000 fe:00 12    /data/a file.bin",  # another place of the file
    "5000-6000 rw-p 00009000 fe:00 13    /data/other.bin",
    "6000-8000 rw-p 00000000 00:00 0",
    "8000-9000 r--p 00000000 00:00 0",
    "a000-b000 rw-s 00000000 00:01 99    /dev/zero (deleted)",
]


def kind(tensor: torch.Tensor) -> str:
    return MemoryMap.of_process().classify(tensor).kind


@pytest.mark.parametrize(
    ("span", "found"),
    [
        ((0x1800, 0x3800), (0x1000, 0x4000, 0)),
        ((0x3100, 0x3200), (0x1000, 0x4000, 0)),
        ((0x4000, 0x5000), (0x4000, 0x5000, 0x8000)),
        ((0x3800, 0x4800), None),
        ((0x7000, 0x8001), None),
        ((0x9000, 0x9001), None),
        ((0x0, 0x10), None),
        ((0xAFFF, 0xB000), (0xA000, 0xB000, 0)),
    ],
)
def test_mappings_are_found_whole(span: tuple[int, int], found: tuple[int, int, int] | None) -> None:
    mapping = MemoryMap(LINES).mapping_of(span)
    assert (mapping and (mapping.start, mapping.stop, mapping.offset)) == found


def test_mappings_say_what_they_are() -> None:
    known = MemoryMap(LINES)
    file, anonymous, shared = (known.mapping_of((at, at + 1)) for at in (0x1000, 0x6000, 0xA000))
    assert file is not None
    assert anonymous is not None
    assert shared is not None
    assert (file.path, file.file_id, file.is_shared, file.is_writable) == (
        "/data/a file.bin",
        ("fe:00", 12),
        False,
        True,
    )
    assert [mapping.is_of_file for mapping in (file, anonymous, shared)] == [True, False, True]
    assert [mapping.is_shared for mapping in (file, anonymous, shared)] == [False, False, True]


def test_large_allocations_have_pages_of_their_own() -> None:
    known = [
        fresh(lambda: torch.empty(LARGE, dtype=torch.uint8)),
        fresh(lambda: torch.from_numpy(np.ones(LARGE // 4, dtype=np.float32))),
        own_pages(9),
    ]
    for tensor in known:
        memory = MemoryMap.of_process().classify(tensor)
        assert memory.kind == "own"
        assert memory.pages is not None
        start, stop = memory.pages
        assert start % PAGE == stop % PAGE == 0
        assert start <= tensor.data_ptr()
        assert tensor.data_ptr() + tensor.nbytes <= stop
    assert kind(fresh(lambda: torch.empty(LARGE, dtype=torch.uint8))[1000:]) == "own"  # of the storage


def test_parts_of_allocations_are_not_taken_for_whole_ones() -> None:
    array, raw = np.ones(LARGE, dtype=np.uint8), bytearray(LARGE)
    assert kind(torch.empty(1000)) == "part"
    assert kind(torch.from_numpy(array[4096:])) == "part"
    assert kind(torch.frombuffer(memoryview(raw)[64:], dtype=torch.uint8)) == "part"
    assert kind(torch.frombuffer(bytearray(b"x" * 100), dtype=torch.uint8)) == "part"


@pytest.mark.parametrize("claimed", [2, 2 + 4096, 2**63 + 2, 2**64 - 6])
def test_bytes_that_look_like_a_header_are_seen_through(claimed: int) -> None:
    """In front of a slice lie a size with the bit of a mapping of its own, and a distance to its beginning."""
    array = np.zeros(LARGE, dtype=np.uint8)
    skip = -array.ctypes.data % PAGE + PAGE + 64
    array[skip - 16 : skip].view(np.uint64)[:] = 48, claimed
    assert kind(torch.from_numpy(array[skip:])) == "part"


def test_views_of_files_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(5000)}, path)
    torch.save({"b": torch.ones(5000)}, tmp_path / "x.pt")
    with path.open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found = [
        load_file(path)["b"],
        torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)["b"],
        torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c")),
        torch.frombuffer(private, dtype=torch.uint8),
    ]
    for tensor in found:
        memory = MemoryMap.of_process().classify(tensor)
        assert memory.kind == "file"
        assert memory.pages is None
        assert memory.mapping is not None
        assert Path(memory.mapping.path).parent == tmp_path


def test_shared_segments_are_nobodys_to_move(tmp_path: Path) -> None:
    ours = torch.zeros(5000).share_memory_()
    memory = MemoryMap.of_process().classify(ours)
    assert (memory.kind, memory.is_seen_by_others) == ("shared", True)
    assert memory.pages is not None  # the segment holds this tensor alone
    segment = shared_memory.SharedMemory(create=True, size=10 * PAGE)
    two = torch.frombuffer(segment.buf, dtype=torch.uint8, count=PAGE)
    memory = MemoryMap.of_process().classify(two)
    assert (memory.kind, memory.is_seen_by_others, memory.pages) == ("shared", True, None)
    del two
    segment.close()
    segment.unlink()
    (tmp_path / "f").write_bytes(bytes(PAGE))
    file = torch.from_numpy(np.memmap(tmp_path / "f", dtype=np.uint8, mode="r+"))
    assert kind(file) == "shared"
    assert MemoryMap(()).classify(ours).kind == "shared"  # also where there is no /proc


def test_without_a_map_memory_is_part_of_something() -> None:
    assert MemoryMap(()).classify(torch.empty(LARGE, dtype=torch.uint8)).kind == "part"
    assert MemoryMap(()).classify(own_pages(5)).kind == "own"
    assert MemoryMap(()).classify(torch.empty(3, device="meta")).kind == "device"


def test_pages_that_were_copied_are_found(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100 * PAGE, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    tensor = load_file(tmp_path / "x.safetensors")["x"]
    assert int(tensor.sum()) == 0  # read, not written
    assert written_pages(range_of(tensor)) == []
    aligned = -tensor.data_ptr() % PAGE
    tensor[aligned + 10 * PAGE] = 1
    tensor[aligned + 11 * PAGE + 5] = 0  # a write of what was there
    tensor[-1] = 1
    start, stop = range_of(tensor)
    first = start + aligned + 10 * PAGE
    assert written_pages((start, stop)) == [(first, first + 2 * PAGE), (stop - stop % PAGE, stop)]
    assert written_pages((start, first)) == []
