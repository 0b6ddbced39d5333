"""Reads of files that fail (EIO), end early, or bring fewer bytes than were asked for.

Fewer bytes are asked for again. What fails is a `StoreError` that names the file, and the next call is right.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults._cases import LEVELS, Case, patched, tried
from benchmarks.faults._graphs import WIDTH, drawn_graph, drawn_steps, same
from vramkit.errors import StoreError

__all__ = ["COUNT", "run"]

COUNT = 2_000
_PASSES = 5  # for each module


def run(count: int, seed: int) -> dict[str, int]:
    """Make `count` passes."""
    return tried("reads", -(-count // _PASSES), seed, _try)


def _try(draw: random.Random, folder: Path, counts: Counter[str]) -> None:
    level, place = draw.choice(LEVELS), draw.choice(["mapped", "mapped, direct", "spilled"])
    case = Case(drawn_graph(draw), folder, level=level, place=place, slots=draw.randint(1, 3))
    case.apply()
    for _ in range(_PASSES):
        _passes(draw, case, counts)
    assert case.offload is not None
    case.offload.remove()
    assert same(case.resident, case.module), "other weights after remove()"


def _passes(draw: random.Random, case: Case, counts: Counter[str]) -> None:
    """One pass in which reads go wrong, and one after it."""
    steps = drawn_steps(draw, case.resident, fails=False)  # type: ignore[arg-type]
    share, kind = draw.choice([0.05, 0.3, 1.0]), draw.choice(["EIO", "end", "fewer"])
    read = os.preadv
    wrong = []

    def reading(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if draw.random() >= share:
            return read(descriptor, buffers, offset)
        wrong.append(kind)
        if kind == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if kind == "end":
            return 0
        came = -(-read(descriptor, buffers, offset) // 2)
        with memoryview(buffers[0]) as whole:
            whole[came:] = bytes(len(whole) - came)
        return came

    x = torch.randn(3, WIDTH)
    with patched(os, "preadv", reading):
        try:
            assert case.is_right(x, steps), f"other bytes, {kind}"
            counts[f"right although reads brought: {kind}" if wrong else "no read went wrong"] += 1
        except StoreError as error:
            if kind == "fewer" or str(case.folder) not in str(error):
                raise
            counts[f"an error that names the file: {kind}"] += 1
    for module in (case.resident, case.module):
        module.forget_calls()  # type: ignore[operator]
    try:
        with torch.no_grad():
            case.module(x, steps)
    except StoreError:
        counts["a load that had begun before, failed"] += 1
    for module in (case.resident, case.module):
        module.forget_calls()  # type: ignore[operator]
    assert case.is_right(x, steps), f"other bytes after {kind}"
