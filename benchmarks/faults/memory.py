"""The device without room at every allocation: of applying, of passes, after a rest, while adapting.

What there is no room for is done without, or ends by `OutOfMemoryError`. The next call is right, and so are the weights
after `remove()`.
"""

from __future__ import annotations

import random
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._cases import LEVELS, PLACES, Case, Failing
from benchmarks.faults._graphs import WIDTH, drawn_graph, drawn_steps, same
from vramkit.offload import offload_of
from vramkit.offload.backend import CpuBackend

__all__ = ["COUNT", "run"]

COUNT = 2_000


def run(count: int, seed: int) -> dict[str, int]:
    """Let `count` allocations fail, of as many lives of modules as it takes."""
    counts: Counter[str] = Counter()
    at, turn = 0, 1
    while counts.total() < count:
        draw = random.Random(f"{seed}/{at}")
        torch.manual_seed(draw.randrange(2**31))
        level, place = draw.choice(LEVELS), draw.choice(PLACES)
        options = {"slots": draw.randint(1, 3), "resident": draw.choice([0, 3000])}
        failing = Failing(turn, torch.OutOfMemoryError("on purpose"))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that there was no room
            case = Case(drawn_graph(draw), Path(folder), level=level, place=place, **options)
            try:
                ended = _live(case, failing, drawn_steps(draw, case.resident, fails=False))  # type: ignore[arg-type]
            except Exception:  # noqa: BLE001 (told, and counted)
                ended = BROKEN
                tell("memory", f"{at}, {turn}, {level}, {place}, {options}", traceback.format_exc()[-400:])
        if failing.calls < turn:
            at, turn = at + 1, 1  # there are no more
        else:
            counts[ended] += 1
            turn += 1
    return dict(counts)


def _live(case: Case, failing: Failing, steps: Any) -> str:
    """Apply, run, rest, adapt, run and remove while one allocation fails; return how that ended."""
    x = torch.randn(3, WIDTH)
    step = ended = ""
    with failing.patched((CpuBackend, "memory")):
        for step in ("apply", "pass", "pass", "rest", "pass", "adapt", "pass"):
            try:
                _do(step, case, x, steps)
            except torch.OutOfMemoryError as error:  # noqa: PERF203 (each step may fail)
                if error is not failing.error:
                    raise
                ended = f"an error while: {step}"
                break
    if ended == "an error while: apply":
        assert offload_of(case.module) is None
    elif ended:
        for module in (case.resident, case.module):
            module.forget_calls()  # type: ignore[operator]
        for _ in range(2):
            assert case.is_right(x, steps), "other bytes after the error"
    if case.offload is not None:
        case.offload.remove()
    assert same(case.resident, case.module), "other weights after remove()"
    assert not case.files()
    return ended or "done with less, or tried again"


def _do(step: str, case: Case, x: torch.Tensor, steps: Any) -> None:
    if step == "apply":
        case.apply()
        return
    assert case.offload is not None
    if step == "rest":
        case.offload.rest()
    elif step == "adapt":
        case.offload.adapt(slots=2, resident=5000)
    else:
        assert case.is_right(x, steps), "other bytes"
