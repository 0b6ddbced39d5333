"""Threads that copy and read end at any moment: a named error and no hang, and applying anew mends it."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from pathlib import Path

import torch

from benchmarks.faults._cases import LEVELS, PLACES, Case, settled_threads, tried
from benchmarks.faults._graphs import WIDTH, drawn_graph, drawn_steps, same
from vramkit.errors import StoreError
from vramkit.offload.workers import Workers

__all__ = ["COUNT", "run"]

COUNT = 300


def run(count: int, seed: int) -> dict[str, int]:
    """End threads `count` times."""
    return tried("threads", count, seed, _try)


def _try(draw: random.Random, folder: Path, counts: Counter[str]) -> None:
    level, place = draw.choice(LEVELS), draw.choice(PLACES)
    threads, before = threading.active_count(), {id(workers) for workers in _workers()}
    case = Case(drawn_graph(draw), folder, level=level, place=place, slots=draw.randint(1, 3))
    offload, x = case.apply(), torch.randn(3, WIDTH)
    steps = drawn_steps(draw, case.resident, fails=False)  # type: ignore[arg-type]
    assert case.is_right(x, steps)
    ours = [workers for workers in _workers() if id(workers) not in before and not workers.is_closed]
    layers = [layer for layer in case.module.modules() if layer is not case.module]
    layer = draw.choice(layers)

    def end_threads(*_: object) -> None:
        for workers in ours:
            workers._jobs.put(None)

    handle = layer.register_forward_pre_hook(end_threads) if draw.random() < 0.5 else None
    if handle is None:
        end_threads()
    try:
        assert case.is_right(x, steps)
        ended = "right without them"
    except StoreError as error:
        if "apply it again" not in str(error):
            raise
        ended = "a StoreError that says so"
    if handle is not None:
        handle.remove()
    offload.remove()
    for module in (case.resident, case.module):
        module.forget_calls()  # type: ignore[operator]
    assert same(case.resident, case.module)
    offload = case.apply()
    assert case.is_right(x, steps)
    offload.remove()
    assert settled_threads(threads) <= threads
    counts[ended] += 1


def _workers() -> list[Workers]:
    return [thing for thing in gc.get_objects() if type(thing) is Workers]
