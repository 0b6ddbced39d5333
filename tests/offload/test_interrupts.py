"""Ctrl-C at random moments: no hang, no wrong byte, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_signals_at_random_moments_break_nothing() -> None:
    """In a process of its own, so that a hang is a failure that shows where everybody stands."""
    path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, _TESTS / "interrupts.py", "10"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("remove interrupted") >= 3
    assert done.stdout.count("forward interrupted") == 5
