"""Processes that are ended by force (SIGKILL) at any moment: nothing that they leave is served, or in the way, later.

What such a process has spilled goes when another one spills to the same folder.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._cases import Case, environ_of_forks, patched, prepare
from benchmarks.faults._graphs import WIDTH, drawn_graph, drawn_steps
from vramkit.offload.disk import lock_file, spills

__all__ = ["COUNT", "run"]

COUNT = 200
_MOST_SECONDS = 0.5  # that a process lives
_MOST_WAIT_SECONDS = 5.0


def run(count: int, seed: int) -> dict[str, int]:
    """End `count` processes, each forked from one that has no threads."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        program = f"from benchmarks.faults import kills; kills.serve({folder!r})"
        command = [sys.executable, "-W", "ignore", "-c", program]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with (
            subprocess.Popen(command, env=environ_of_forks(), text=True, **pipes) as server,
            patched(spills, "_SETTLED_SECONDS", 0),
        ):
            for at in range(count):
                try:
                    _try(random.Random(f"{seed}/{at}"), server, Path(folder), counts)
                except Exception:  # noqa: BLE001, PERF203 (told, and counted)
                    counts[BROKEN] += 1
                    tell("kills", at, traceback.format_exc()[-400:])
    return dict(counts)


def serve(folder: str) -> None:
    """For each line that comes, fork a process that offloads to `folder` for ever; say its number, and when it is gone."""
    torch.set_num_threads(1)
    prepare()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _live(random.Random(line), Path(folder))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


def _is_free(folder: Path) -> bool:
    for path in folder.glob("*"):
        with path.open("rb") as file:
            if not lock_file(file.fileno()):
                return False
    return True


def _live(draw: random.Random, folder: Path) -> None:
    while True:
        case = Case(drawn_graph(draw), folder, level=draw.choice(["block_level", "leaf_level"]), place="spilled")
        offload = case.apply()
        for _ in range(3):
            with torch.no_grad():
                case.module(torch.randn(3, WIDTH), drawn_steps(draw, case.resident, fails=False))  # type: ignore[arg-type]
        offload.remove()


def _try(draw: random.Random, server: Any, folder: Path, counts: Counter[str]) -> None:
    server.stdin.write(f"{draw.randrange(10**9)}\n")
    server.stdin.flush()
    child = int(server.stdout.readline())
    time.sleep(draw.uniform(0, _MOST_SECONDS))
    os.kill(child, signal.SIGKILL)
    assert server.stdout.readline() == "gone\n"
    left = list((folder / "spill").glob("*"))
    counts["left a folder" if left else "left nothing"] += 1
    end = time.monotonic() + _MOST_WAIT_SECONDS
    while not all(map(_is_free, left)) and time.monotonic() < end:
        time.sleep(0.01)  # a kernel may close the files of who was killed a little later than it says so
    torch.manual_seed(draw.randrange(2**31))
    case = Case(drawn_graph(draw), folder, level="block_level", place="spilled")
    offload = case.apply()
    steps = drawn_steps(draw, case.resident, fails=False)  # type: ignore[arg-type]
    assert case.is_right(torch.randn(3, WIDTH), steps), "other bytes"
    if set((folder / "spill").glob("*")) - set(left):
        assert not any(path.exists() for path in left), f"{left} is still there"
        counts["folders removed by the next process"] += len(left)
    else:
        counts["nothing to spill in the next process"] += 1
    offload.remove()
    assert set((folder / "spill").glob("*")) <= set(left)
