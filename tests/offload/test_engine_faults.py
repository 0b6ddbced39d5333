"""Faults while the engine runs: a sample of each kind; ``python -m benchmarks.faults`` tries thousands."""

from __future__ import annotations

import importlib
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.faults import BROKEN, graphs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors and forks as Linux does")
FOLDERS = HealthCheck.function_scoped_fixture  # each example has a folder of its own in the one of the test

# kind, how many cases, what must be among the outcomes
SAMPLES = [
    ("exceptions", 30, {"right after an exception in a hook"}),
    ("memory", 6, {"an error while: apply", "done with less, or tried again"}),
    ("reads", 15, {"an error that names the file: EIO"}),
    ("spills", 8, {"a StoreError, and the module as it was"}),
    ("threads", 3, set()),
    ("files", 10, {"overwritten: a StoreError", "replaced: the same bytes"}),
    ("kills", 3, set()),
    ("registration", 10, {"staged what could not be locked"}),
    ("soak", 10, {"descriptors flat over forwards", "threads flat over lives"}),
]


@pytest.mark.parametrize(("kind", "count", "expected"), SAMPLES, ids=[kind for kind, _, _ in SAMPLES])
def test_nothing_is_broken_by(kind: str, count: int, expected: set[str]) -> None:
    counts = importlib.import_module(f"benchmarks.faults.{kind}").run(count, 0)
    assert counts.get(BROKEN, 0) == 0
    assert expected <= counts.keys()


@settings(deadline=None, max_examples=12, suppress_health_check=[FOLDERS, HealthCheck.too_slow])
@given(draw=st.randoms(use_true_random=False), seed=st.integers(0, 2**31 - 1))
def test_any_graph_with_any_history_gives_the_bytes_of_the_resident_one(
    draw: random.Random, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    graphs.history(draw, tmp_path_factory.mktemp("graph"), Counter())


@pytest.mark.parametrize("at", [50])
def test_histories_that_were_broken_once(at: int, tmp_path: Path) -> None:
    """50: a copy lost the tie of a weight that stays on the device in one place and travels to others."""
    draw = random.Random(f"0/{at}")
    torch.manual_seed(draw.randrange(2**31))
    graphs.history(draw, tmp_path, Counter())


def test_what_is_broken_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that finds nothing says little if it could not find anything."""
    from vramkit.offload.group import ModuleGroup
    from vramkit.offload.ring import Pieces

    fill: Any = ModuleGroup.fill

    def forgets(self: ModuleGroup, pieces: Pieces) -> Any:
        arrivals = fill(self, pieces)
        pieces.memory[: pieces.memory.numel() // 2].zero_()
        return arrivals

    monkeypatch.setattr(ModuleGroup, "fill", forgets)
    assert graphs.run(6, 0)[BROKEN] > 0
    assert "other" in capsys.readouterr().err
