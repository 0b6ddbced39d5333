"""Random module graphs with random histories, at every level and from every place: the bytes of the resident module.

Between passes weights are written to, layers replaced, slots let go of, options adapted, state dicts and copies taken; some
passes end by exceptions, or run in another thread.
"""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults._cases import LEVELS, PLACES, Case, tried
from benchmarks.faults._graphs import WIDTH, OnPurposeError, Step, change, drawn_graph, drawn_steps, same

__all__ = ["COUNT", "history", "run"]

COUNT = 2_000
_PASSES = 5


def run(count: int, seed: int) -> dict[str, int]:
    """Try `count` graphs."""
    return tried("graphs", count, seed, history)


def history(draw: random.Random, folder: Path, counts: Counter[str]) -> None:
    """Draw a graph and what is done to it, and do it to both twins; AssertionError where they differ."""
    level, place = draw.choice(LEVELS), draw.choice(PLACES)
    options = {"slots": draw.randint(1, 3), "resident": draw.choice([0, 0, 3000, 10**6])}
    case = Case(drawn_graph(draw), folder, level=level, place=place, **options)
    case.apply()
    for _ in range(_PASSES):
        _do_between(draw, case, counts)
        steps = drawn_steps(draw, case.resident, fails=draw.random() < 0.25)  # type: ignore[arg-type]
        x = torch.randn(3, WIDTH)
        expected, given = (_outcome(module, x, steps) for module in (case.resident, case.module))
        if isinstance(expected, torch.Tensor):
            assert isinstance(given, torch.Tensor), f"{given!r} instead of a result; {level}, {place}, {options}"
            assert torch.equal(expected, given), f"other bytes; {level}, {place}, {options}"
            counts["passes with the same bytes"] += 1
        else:
            assert type(given) is type(expected), f"{given!r} instead of an error; {level}, {place}, {options}"
            counts["passes that ended by the error of a layer"] += 1
    assert case.offload is not None
    case.offload.remove()
    assert same(case.resident, case.module), f"other weights after remove(); {level}, {place}, {options}"
    assert not case.files()
    counts["graphs whole after remove()"] += 1


def _outcome(module: Any, x: torch.Tensor, steps: list[Step]) -> torch.Tensor | OnPurposeError:
    try:
        with torch.no_grad():
            result: torch.Tensor = module(x, steps)
    except OnPurposeError as error:
        return error
    return result


def _do_between(draw: random.Random, case: Case, counts: Counter[str]) -> None:
    offload = case.offload
    assert offload is not None
    kind = draw.choice(["nothing", "nothing", "edit", "rest", "adapt", "state", "copy", "thread", "remove"])
    counts[f"between passes: {kind}"] += 1
    if kind == "edit":
        changed = change(draw)
        changed(case.resident)  # type: ignore[arg-type]
        with offload.edit():
            changed(case.module)  # type: ignore[arg-type]
    elif kind == "rest":
        offload.rest(resident=draw.random() < 0.5)
    elif kind == "adapt":
        offload.adapt(slots=draw.randint(1, 4), resident=draw.choice([0, 2000, 10**6]))
    elif kind == "state":
        assert same(case.resident, case.module), "other weights in a state dict"
    elif kind == "copy":
        assert same(case.resident, copy.deepcopy(case.module)), "other weights in a copy"
    elif kind == "thread":
        _in_thread(lambda: _pass_in_thread(case, drawn_steps(draw, case.resident, fails=False)))  # type: ignore[arg-type]
    elif kind == "remove":
        offload.remove()
        case.apply()


def _pass_in_thread(case: Case, steps: list[Step]) -> None:
    x = torch.randn(3, WIDTH)
    assert case.is_right(x, steps), "other bytes in a thread"


def _in_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def runs() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    thread = threading.Thread(target=runs)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
