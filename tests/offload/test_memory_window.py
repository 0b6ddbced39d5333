"""A model of four times the window runs from disk inside the window: the main promise, on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 2**20
WIDTH, BLOCKS, TOKENS = 2048, 32, 64  # 16 MiB in each block, 512 MiB in all
SLOTS = 8  # a window of 128 MiB: large beside what threads and libraries take for themselves, some 7 MiB

SCRIPT = """
import sys, threading
import psutil, torch
from torch import nn
from vramkit.offload import apply_group_offloading, load_mapped

width, blocks, tokens, slots, mode, path, out, x_path = [*map(int, sys.argv[1:5]), *sys.argv[5:]]
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x

with torch.device("meta"):
    module = Net().eval()
    warm = nn.ModuleList([nn.Linear(16, 16, device="cpu") for _ in range(4)])
x = torch.load(x_path, weights_only=True)
torch.tanh(nn.Linear(width, width, bias=False)(x))  # what the matrix library takes for itself
# One small model first, so that imports and threads do not count.
small = Net.__new__(Net); nn.Module.__init__(small)
small.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8)); small.eval()
apply_group_offloading(small, "cpu", store="pageable")
with torch.no_grad():
    small(torch.zeros(1, 64))

process, peak, done = psutil.Process(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], process.memory_info().rss)
before = process.memory_info().rss
peak[0] = before
watcher = threading.Thread(target=watch); watcher.start()
load_mapped(module, path)
offload = None
if mode == "stream":
    offload = apply_group_offloading(module, "cpu", slots=slots)
with torch.inference_mode():
    outputs = [module(x) for _ in range(3)]
done.set(); watcher.join()
torch.save([y.clone() for y in outputs], out)
if offload is not None:
    assert offload.stats().streamed_bytes >= width * width * 4 * blocks, offload.stats()
print(peak[0] - before)
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    scale = WIDTH**-0.5 * 1.5
    save_file(
        {f"blocks.{i}.weight": torch.randn(WIDTH, WIDTH) * scale for i in range(BLOCKS)}, tmp_path / "m.safetensors"
    )
    torch.save(torch.randn(TOKENS, WIDTH), tmp_path / "x.pt")
    return {"model": str(tmp_path / "m.safetensors"), "x": str(tmp_path / "x.pt"), "out": str(tmp_path / "out-")}


def growth_bytes(files: dict[str, str], mode: str) -> int:
    sizes = [str(value) for value in (WIDTH, BLOCKS, TOKENS, SLOTS)]
    command = [sys.executable, "-c", SCRIPT, *sizes, mode, files["model"], files["out"] + mode, files["x"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_model_of_four_windows_runs_inside_one(files: dict[str, str]) -> None:
    window, activations = SLOTS * WIDTH * WIDTH * 4, 4 * TOKENS * WIDTH * 4
    streamed, resident = growth_bytes(files, "stream"), growth_bytes(files, "resident")
    outputs, expected = (torch.load(files["out"] + mode, weights_only=True) for mode in ("stream", "resident"))
    assert all(torch.equal(y, z) for y, z in zip(outputs, expected, strict=True))
    assert resident >= 4 * window  # or the measurement does not see mapped weights
    assert streamed <= 1.1 * (window + activations)
