"""A model of one and a half times the machine's memory opens, streams from its file and answers."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from vramkit.offload import apply_group_offloading, load_mapped
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.memory_map import MemoryMap, range_of

WIDTH = 8192
BLOCK_BYTES = WIDTH * WIDTH * 4
RAM_SHARE = 1.5
NEEDED_BYTES = 2 * 2**30


class Net(nn.Module):
    """Runs those of its blocks that it is told to; each adds what its weight says."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(blocks))

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for index in order:
            x = x + self.blocks[index](x)
        return x


def write_sparse(path: Path, blocks: int) -> Path:
    """Write weights of zeros, which take no room on the disk, with a one in row `i` and column 0 of block `i`."""
    header = {
        f"blocks.{i}.weight": {
            "dtype": "F32",
            "shape": [WIDTH, WIDTH],
            "data_offsets": [i * BLOCK_BYTES, (i + 1) * BLOCK_BYTES],
        }
        for i in range(blocks)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for i in range(blocks):
            file.seek(start + i * BLOCK_BYTES + i * WIDTH * 4)
            file.write(struct.pack("<f", 1.0))
        file.truncate(start + blocks * BLOCK_BYTES)
    return path


@pytest.fixture
def blocks(tmp_path: Path) -> int:
    """How many blocks there are in a model of that size; its file is ``big.safetensors``."""
    if psutil.virtual_memory().available < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free memory")
    count = min(WIDTH, int(psutil.virtual_memory().total * RAM_SHARE) // BLOCK_BYTES + 1)
    path = write_sparse(tmp_path / "big.safetensors", count)
    if path.stat().st_blocks * 512 > count * 2**20:
        path.unlink()
        pytest.skip("the disk has no sparse files")
    return count


def offloaded(path: Path, blocks: int, *, direct_io: bool) -> nn.Module:
    with torch.device("meta"):
        module = Net(blocks).eval()
    apply_group_offloading(load_mapped(module, path), "cpu", slots=1, direct_io=direct_io)
    return module


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(0.02, id="a_few_blocks"),
        pytest.param(1.0, id="all_blocks", marks=[pytest.mark.slow, pytest.mark.thorough]),
    ],
)
def test_it_streams_and_answers(part: float, blocks: int, tmp_path: Path) -> None:
    # All of it goes around the page cache: it would throw out what others have there, and take three times as long.
    module = offloaded(tmp_path / "big.safetensors", blocks, direct_io=part == 1)
    order = list(range(1, blocks, round(1 / part)))
    x = torch.zeros(1, WIDTH)
    x[0, 0] = 1
    with torch.no_grad():
        y = module(x, order)
    expected = x.clone()
    expected[0, order] = 1
    assert torch.equal(y, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_nothing_is_set_aside_for_copies_of_pages(tmp_path: Path) -> None:
    """Or the kernel refuses a private mapping of a file that is larger than the memory."""
    tensor = read_checkpoint(write_sparse(tmp_path / "x.safetensors", 1))["blocks.0.weight"].tensor()
    mapping = MemoryMap.of_process().mapping_of(range_of(tensor))
    assert mapping is not None
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(f"{mapping.start:x}-"))
    flags = next(line for line in lines if line.startswith("VmFlags:")).split()
    assert "nr" in flags
