"""Forwards in a row, and lives of modules that end by `remove` or by going: descriptors, threads and memory stay flat."""

from __future__ import annotations

import ctypes
import gc
import random
import tempfile
import threading
from collections import Counter
from pathlib import Path

import psutil
import torch

from benchmarks.faults import BROKEN, tell
from benchmarks.faults._cases import LEVELS, PLACES, Case, descriptors, settled_threads
from benchmarks.faults._graphs import WIDTH, drawn_graph, drawn_steps

__all__ = ["COUNT", "run"]

COUNT = 1_000  # forwards; a twentieth as many lives
_MOST_GROWTH_BYTES = 32 * 2**20


def run(count: int, seed: int) -> dict[str, int]:
    """Make `count` forwards with one module, and a twentieth as many lives."""
    counts: Counter[str] = Counter()
    draw = random.Random(seed)
    threads = threading.active_count()  # of others
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(drawn_graph(draw), Path(folder), level="block_level", place="mapped")
        case.apply()
        _forwards(case, draw, 20, counts)
        before = _census(Path(folder), threading.active_count())
        _forwards(case, draw, count, counts)
        _compare("forwards", before, _census(Path(folder), before["threads"]), counts)
        assert case.offload is not None
        case.offload.remove()
    with tempfile.TemporaryDirectory() as folder:
        _life(Path(folder), draw)
        before = _census(Path(folder), threads)
        for _ in range(max(1, count // 20)):
            _life(Path(folder), draw)
            counts["lives"] += 1
        _compare("lives", before, _census(Path(folder), threads), counts)
    return dict(counts)


def _forwards(case: Case, draw: random.Random, count: int, counts: Counter[str]) -> None:
    for _ in range(count):
        steps = drawn_steps(draw, case.resident, fails=False)  # type: ignore[arg-type]
        counts["right forwards" if case.is_right(torch.randn(3, WIDTH), steps) else BROKEN] += 1


def _life(folder: Path, draw: random.Random) -> None:
    place = draw.choice(PLACES)
    case = Case(drawn_graph(draw), folder, level=draw.choice(LEVELS), place=place)
    offload = case.apply()
    assert case.is_right(torch.randn(3, WIDTH), drawn_steps(draw, case.resident, fails=False))  # type: ignore[arg-type]
    if draw.random() < 0.5:
        offload.remove()


def _census(folder: Path, wanted: int) -> dict[str, int]:
    threads = settled_threads(wanted)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    files = sum(1 for path in folder.rglob("*") if path.is_file() and path.name != "weights.safetensors")
    memory = psutil.Process().memory_info().rss
    return {"threads": threads, "descriptors": descriptors(), "files": files, "memory": memory}


def _compare(what: str, before: dict[str, int], after: dict[str, int], counts: Counter[str]) -> None:
    for kind, least in before.items():
        grown = after[kind] - least
        is_flat = grown <= (_MOST_GROWTH_BYTES if kind == "memory" else 0)
        counts[f"{kind} flat over {what}" if is_flat else BROKEN] += 1
        if not is_flat:
            tell("soak", what, f"{kind} went from {least} to {after[kind]}; {threading.enumerate()}")
