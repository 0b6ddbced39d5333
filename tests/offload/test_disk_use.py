"""`offload_to_disk_path` uses the disk, however the module got its weights, and gives the memory back."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, tokens
from sweeps import sweep
from torch import nn

from vramkit.offload import apply_group_offloading


def constructed(folder: Path) -> nn.Module:
    return BlockNet().eval()


def copied(folder: Path) -> nn.Module:
    return copy.deepcopy(BlockNet()).eval()


def load_state_dicted(folder: Path) -> nn.Module:
    module = BlockNet().eval()
    module.load_state_dict(BlockNet().state_dict())
    return module


def assigned(folder: Path) -> nn.Module:
    module = BlockNet().eval()
    module.load_state_dict({k: v.clone() for k, v in BlockNet().state_dict().items()}, assign=True)
    return module


def cast(folder: Path) -> nn.Module:
    return load_state_dicted(folder).double()


def set_in_place(folder: Path) -> nn.Module:
    module = BlockNet().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.2, 0.2)
    return module


MAKERS: dict[str, Callable[[Path], nn.Module]] = {
    make.__name__: make for make in (constructed, copied, load_state_dicted, assigned, cast, set_in_place)
}


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("options", [{}, {"store": "disk"}, {"store": "disk", "direct_io": True}], ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_all_that_travels_is_read_from_the_folder(
    make: str, options: dict[str, Any], level: str, tmp_path: Path
) -> None:
    module = MAKERS[make](tmp_path)
    x = tokens(8).to(module.embed.weight.dtype)
    folder = tmp_path / "weights"
    with torch.no_grad():
        expected = module(x)
        offload = apply_group_offloading(
            module, "cpu", offload_to_disk_path=folder, slots=1, offload_type=level, **options
        )
        stats = offload.stats()
        assert stats.stores.keys() == {"disk"}
        assert sum(path.stat().st_size for path in folder.rglob("*.bin")) >= stats.stores["disk"]
        assert all(torch.equal(module(x), expected) for _ in range(2))
        with offload.edit():  # what was written there is still what the weights are
            pass
        assert offload.stats().stores.keys() == {"disk"}
        with offload.edit():
            module.blocks[1].up.weight.data.mul_(2)
        assert torch.equal(module(x), changed := module(x))
        assert not torch.equal(changed, expected)
        offload.remove()
        assert torch.equal(module(x), changed)
    assert not list(folder.iterdir())


SCRIPT = """
import gc, sys, psutil, torch
from torch import nn
from vramkit.offload import apply_group_offloading

blocks, width, how, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
def net():
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(blocks))).eval()
def private_bytes():
    gc.collect()
    return psutil.Process().memory_full_info().uss
small = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).eval()  # so that imports and threads do not count
apply_group_offloading(small, "cpu", offload_to_disk_path=folder)
with torch.no_grad():
    small(torch.zeros(1, 64))
module = net()
if how == "load_state_dict":
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
x = torch.randn(2, width)
with torch.no_grad():
    expected = module(x)
    before = private_bytes()
    offload = apply_group_offloading(module, "cpu", offload_to_disk_path=folder, slots=1)
    applied = private_bytes()
    assert torch.equal(module(x), expected) and torch.equal(module(x), expected)
    print(sum(p.nbytes for p in module.parameters()), before - applied, before - private_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="unique pages are counted on Linux")
@sweep("size how", product([(24, 1024), (96, 512)], ["constructed", "load_state_dict"]), together=1)
def test_memory_falls_by_the_weights(size: tuple[int, int], how: str, tmp_path: Path) -> None:
    blocks, width = size
    command = [sys.executable, "-c", SCRIPT, str(blocks), str(width), how, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    weights, after_applying, after_running = map(int, done.stdout.split())
    window = weights // blocks
    assert after_applying >= 0.97 * weights - 2 * window
    # Running takes a little for itself, whatever the size of the weights: threads that read, first calls of torch.
    taken = 4 * 2**20
    assert after_running >= 0.97 * weights - 2 * window - taken
    gc.collect()
