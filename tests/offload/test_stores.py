"""Bytes from where they rest into a slot, through staging where they cannot be read in place."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vramkit.errors import StoreError
from vramkit.offload import stores
from vramkit.offload.backend import CpuBackend
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.disk import FileReader, MappedFile, span_of
from vramkit.offload.stores import DiskStore, PageableStore, PinnedStore, Staging


class Fence:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("waited")


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend that stages as for a device, in pieces of 1000 bytes; its log counts the waits."""
    monkeypatch.setattr(stores, "_STAGE_BYTES", 1000)
    log: list[str] = []
    return SimpleNamespace(device=torch.device("cuda"), fence=lambda: Fence(log), log=log)


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 5500])
def test_pageable_memory_arrives_whole_through_two_buffers(size: int, staged: Any) -> None:
    memory = torch.randint(0, 255, (size,), dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    staging = Staging(staged)
    PageableStore(memory, staging).fill(target)
    assert torch.equal(target, memory)
    pieces = -(-size // 1000)
    assert len(staged.log) == max(0, pieces - 2)  # a buffer is filled again only when its last piece has left
    assert staging.size_bytes == 2000


def test_a_second_fill_waits_for_the_buffers_of_the_first(staged: Any) -> None:
    memory = torch.randint(0, 255, (1500,), dtype=torch.uint8)
    store = PageableStore(memory, Staging(staged))
    for expected_waits in (0, 2):
        target = torch.zeros(1500, dtype=torch.uint8)
        store.fill(target)
        assert torch.equal(target, memory)
        assert len(staged.log) == expected_waits


def test_a_part_of_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(10_000))
    file = MappedFile(path)
    store = PageableStore(file.tensor(0, torch.uint8, (10_000,)), Staging(CpuBackend()), file).part(8192, 10_000)
    target = torch.ones(1808, dtype=torch.uint8)
    store.fill(target)
    assert not target.any()
    os.truncate(path, 100)
    with pytest.raises(StoreError, match="has 100 bytes"):  # and not a fault that ends the process
        store.fill(target)


def test_files_arrive_whole_through_staging_and_straight(staged: Any, tmp_path: Path) -> None:
    weight = torch.randn(700)
    save_file({"first": torch.zeros(3), "weight": weight}, tmp_path / "w.safetensors")
    span = span_of(read_checkpoint(tmp_path / "w.safetensors")["weight"].tensor())
    assert span is not None
    reader = FileReader(span.file)
    for backend in (staged, CpuBackend()):
        target = torch.zeros(2800, dtype=torch.uint8)
        DiskStore(span, reader, Staging(backend)).fill(target)
        assert torch.equal(target.view(torch.float32), weight)
    reader.close()


def test_pinned_memory_is_one_copy() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    target = torch.zeros(100, dtype=torch.uint8)
    PinnedStore(memory, "registered").fill(target)
    assert torch.equal(target, memory)
