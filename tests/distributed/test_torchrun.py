"""``torchrun -m vramkit run``: one clip, written once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vramkit.cli import main


@pytest.mark.slow
def test_two_ranks_write_the_clip_of_one(wan_folder: Path, tmp_path: Path) -> None:
    def arguments(out: str) -> list[str]:
        sizes = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--vae-tiling"]
        model = ["--model", str(wan_folder), "--prompt", "a cat", "--device", "cpu"]
        return ["run", *model, *sizes, "--out", str(tmp_path / out)]

    assert main(arguments("one.mp4")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vramkit"]
    done = subprocess.run([*launcher, *arguments("two.mp4")], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two.mp4")]  # said once
    assert done.stderr.count("done     ") == done.stderr.count("clip     ") == 1
    assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "two.mp4"]
