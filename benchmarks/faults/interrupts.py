"""Ctrl-C at random instructions of forwards, of applying, editing and removing, which ``tests/interrupts.py`` does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.faults import BROKEN, tell

__all__ = ["COUNT", "run"]

COUNT = 3_000
_SECONDS = 30
_ROOT = Path(__file__).parents[2]


def run(count: int, seed: int) -> dict[str, int]:
    """Go on until `count` calls were interrupted."""
    counts: Counter[str] = Counter()
    paths = os.pathsep.join([str(_ROOT / "tests"), str(_ROOT), os.environ.get("PYTHONPATH", "")])
    while counts.total() - counts[BROKEN] < count:
        seconds = min(_SECONDS, max(5, count // 20))
        command = [sys.executable, str(_ROOT / "tests" / "interrupts.py"), str(seconds), str(seed)]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            name, _, found = line.partition(": {")
            for kind, number in ast.literal_eval("{" + found).items() if found else ():
                if kind.endswith("interrupted"):
                    counts[kind] += number
            if line.startswith("FAILED"):
                tell("interrupts", seed, name)
        if done.returncode:
            counts[BROKEN] += 1
            tell("interrupts", seed, f"ended with {done.returncode}")
            sys.stderr.write(done.stderr)  # whole: of a hang it has the stacks of all threads
        seed += 1
    return dict(counts)
