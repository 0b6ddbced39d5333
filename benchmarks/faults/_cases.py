"""Modules that are offloaded in every way, each beside the resident module that it must equal."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.faults import BROKEN, tell
from vramkit import hooks, load_mapped
from vramkit.offload import Offload, apply_group_offloading
from vramkit.offload.checkpoint import distinct_weights, write_checkpoint

__all__ = [
    "LEVELS",
    "PLACES",
    "Case",
    "Failing",
    "descriptors",
    "environ_of_forks",
    "patched",
    "prepare",
    "settled_threads",
    "tried",
]

LEVELS = ("block_level", "leaf_level", "model_level")
PLACES = ("mapped", "mapped, direct", "mapped, pageable", "pageable", "spilled")


def tried(
    kind: str, count: int, seed: int, attempt: Callable[[random.Random, Path, Counter[str]], None]
) -> dict[str, int]:
    """Make `count` attempts, each with random numbers and a folder of its own, and return how many ended how.

    What an attempt raises is told, and counted as broken.
    """
    counts: Counter[str] = Counter()
    for at in range(count):
        draw = random.Random(f"{seed}/{at}")
        torch.manual_seed(draw.randrange(2**31))
        with tempfile.TemporaryDirectory() as folder:
            try:
                attempt(draw, Path(folder), counts)
            except Exception:  # noqa: BLE001 (told, and counted)
                counts[BROKEN] += 1
                tell(kind, at, traceback.format_exc()[-400:])
    return dict(counts)


def prepare() -> None:
    """Import what takes seconds, and let the collector of garbage pass over what is there until ``gc.unfreeze()``.

    The objects of torch take it longer than a case takes otherwise.
    """
    hooks.prepare()
    gc.collect()
    gc.freeze()


def environ_of_forks() -> dict[str, str]:
    """Return what a process is started in that has one thread, and so can fork one for each case."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO,STRICT"}


class Case:
    """One module and its resident twin. `folder` is the case's own."""

    def __init__(self, model: nn.Module, folder: Path, *, level: str, place: str, **options: Any) -> None:
        self.resident = model
        self.module = copy.deepcopy(model)
        self.folder = folder
        self.options: dict[str, Any] = {"offload_type": level, **options}
        if place.startswith("mapped"):
            write_checkpoint(folder / "weights.safetensors", distinct_weights(model))
            load_mapped(self.module, folder / "weights.safetensors")
        if place == "spilled":
            self.options["offload_to_disk_path"] = folder / "spill"
        if place.endswith("pageable"):
            self.options["store"] = "pageable"
        self.options["direct_io"] = place.endswith("direct")
        self.offload: Offload | None = None

    def apply(self) -> Offload:
        """Offload the module."""
        self.offload = apply_group_offloading(self.module, "cpu", **self.options)
        return self.offload

    def is_right(self, *args: Any) -> bool:
        """Tell whether a call gives the bytes of the resident module."""
        with torch.no_grad():
            return torch.equal(self.module(*args), self.resident(*args))

    def files(self) -> list[Path]:
        """Return what was spilled and is there still."""
        return [path for path in (self.folder / "spill").rglob("*") if path.is_file()]


@contextlib.contextmanager
def patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``holder.name`` be `value` for a while."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


class Failing:
    """Calls of several functions together, of which number `at` fails (from 1; 0: none)."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at = at
        self.error = error
        self.calls = 0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, which fails when it is its turn."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise self.error
            return function(*args, **kwargs)

        return call

    def patched(self, *places: tuple[Any, str]) -> contextlib.ExitStack:
        """Let the functions of these names fail, until what is returned is closed."""
        stack = contextlib.ExitStack()
        for holder, name in places:
            stack.enter_context(patched(holder, name, self.of(getattr(holder, name))))
        return stack


def descriptors() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (what Path.iterdir opens is counted too)


def settled_threads(wanted: int) -> int:
    """Return how many threads there are, when those that are ending have ended."""
    end = time.monotonic() + 5
    while threading.active_count() > wanted and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return threading.active_count()
