"""Applying and removing, again and again: seconds of each, the first apart, and that the weights are the same after."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.measure import digest, host_memory, seconds_of
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject

_CYCLES = 5
_WAYS = (
    "vramkit block", "vramkit leaf", "vramkit disk", "diffusers block", "diffusers leaf stream", "accelerate cpu_offload",
    "mmgp pinned", "flextensor blocks", "diffusers-mm group", "cache-dit layerwise async",
)  # fmt: skip


def settings(scale: str) -> Iterator[Setting]:
    """Wan 14B; only our own is removed and applied again, as most others leave the module changed."""
    ways = _WAYS[:6] if scale == "smoke" else _WAYS
    for way in ways:
        subject = Subject.of("wan-14b", scale, frames=5)
        yield Setting(case="applying", subject=str(subject), way=way, options={"subject": subject.to_json()})


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Apply and remove one way; with ours several times."""
    subject = Subject.from_json(setting.options["subject"])
    subject.prepare(bench)
    yield setting.row(**cycled(subject, setting.way, bench))


def cycled(subject: Subject, way: str, bench: Bench) -> Row:
    """Return s and slowest_s of applying (the first one apart), remove_s, and whether the weights are what they were."""
    model = subject.load(bench)
    peers.importable(way)
    before = digest(dict(model.state_dict())) if bench.is_smoke else None
    applied_s, removed_s = [], []
    for _ in range(_CYCLES if way.startswith("vramkit") else 1):
        row: Row = {}
        with torch.no_grad():
            with seconds_of(row, "apply"):
                applied = peers.apply(way, model, bench.device)
            if applied.remove is None:
                raise RuntimeError(f"{way} cannot be taken off again")
            with seconds_of(row, "remove"):
                applied.remove()
        applied_s.append(row["apply"])
        removed_s.append(row["remove"])
    after = digest(dict(model.state_dict())) if bench.is_smoke else None
    return {
        "first_s": applied_s[0],
        "s": statistics.median(applied_s[1:] or applied_s),
        "slowest_s": max(applied_s),
        "repeats": len(applied_s),
        "remove_s": statistics.median(removed_s),
        "is_unchanged": None if before is None else before == after,
        **host_memory(),
    }
