"""``pytest benchmarks --benchmark-json host.json``: cases that run on a CPU in minutes, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no part of the installed package


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Measure in one process: two that share the cores measure each other."""
    if hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0
        config.option.dist = "no"
    torch.set_num_threads(1)
