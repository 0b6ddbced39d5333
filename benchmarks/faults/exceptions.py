"""An exception at every hook and in every layer of a pass, one after the other: the passes after it give the right bytes."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._cases import LEVELS, PLACES, Case, Failing
from benchmarks.faults._graphs import WIDTH, OnPurposeError, drawn_graph, drawn_steps, same
from vramkit.offload.engine import Engine
from vramkit.offload.streamer import Streamer

__all__ = ["COUNT", "run"]

COUNT = 3_000
_HOOKS = [
    *((Engine, name) for name in ("begin", "begin_if_outside", "moved", "enter", "leave", "end")),
    *((Streamer, name) for name in ("begin_pass", "acquire", "release", "end_pass", "_take", "_load", "_prefetch")),
]


def run(count: int, seed: int) -> dict[str, int]:
    """Let `count` calls fail, of as many passes as it takes."""
    counts: Counter[str] = Counter()
    at = 0
    while counts.total() < count:
        at += 1
        draw = random.Random(f"{seed}/{at}")
        torch.manual_seed(draw.randrange(2**31))
        level, place = draw.choice(LEVELS), draw.choice(PLACES)
        with tempfile.TemporaryDirectory() as folder:
            case = Case(drawn_graph(draw), Path(folder), level=level, place=place, slots=draw.randint(1, 3))
            steps = drawn_steps(draw, case.resident, fails=False)  # type: ignore[arg-type]
            case.apply()
            for kind in ("hook", "layer"):
                turn = 0
                while counts.total() < count:
                    turn += 1
                    try:
                        failed = _fail(case, steps, kind, turn)
                    except Exception:  # noqa: BLE001 (told, and counted)
                        counts[BROKEN] += 1
                        tell("exceptions", f"{at}, {kind} {turn}, {level}, {place}", traceback.format_exc()[-400:])
                        break
                    if not failed:
                        break
                    counts[f"right after an exception in a {kind}"] += 1
            assert case.offload is not None
            case.offload.remove()
            counts[BROKEN] += not same(case.resident, case.module)
    return dict(counts)


def _fail(case: Case, steps: Any, kind: str, turn: int) -> bool:
    """Let call number `turn` of a pass fail, and check two passes after it; False where there are fewer."""
    x = torch.randn(3, WIDTH)
    failing = Failing(turn, OnPurposeError())
    layers = [(layer, "forward") for layer in case.module.modules() if layer is not case.module]
    with failing.patched(*(_HOOKS if kind == "hook" else layers)):
        try:
            with torch.no_grad():
                case.module(x, steps)
        except OnPurposeError:
            pass
    for module in (case.resident, case.module):
        module.forget_calls()  # type: ignore[operator]
    for layer, name in layers if kind == "layer" else ():
        layer.__dict__.pop(name, None)
    for _ in range(2):
        assert case.is_right(torch.randn(3, WIDTH), steps), f"other bytes after call {turn} of the {kind}s failed"
    return failing.calls >= turn
