"""Seconds that a plan takes: of published models by name, which need no GPU and no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.measure import host_memory, seconds_of
from benchmarks.rows import Row, Setting
from vramkit.planning import plan

_MODELS: dict[str, dict[str, Any]] = {
    "wan2.1-1.3b": {"height": 480, "width": 832, "num_frames": 81},
    "wan2.1-14b": {"height": 480, "width": 832, "num_frames": 81},
}
_SMALL = {"ltx-video-2b": {"height": 64, "width": 64, "num_frames": 9}}


def settings(scale: str) -> Iterator[Setting]:
    """Each model at one budget."""
    for name, call in (_SMALL if scale == "smoke" else _MODELS).items():
        asked = "{width}x{height}x{num_frames}".format(**call)
        yield Setting(
            case="planning", subject=f"{name} {asked}", way="vramkit plan 8 GiB", options={"name": name, "call": call}
        )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Plan once, as a command does; the imports are done by then."""
    row: Row = {}
    device = "cpu" if bench.is_smoke else "cuda"
    with seconds_of(row, "s"):
        found = plan(setting.options["name"], "8GiB", device=device, **setting.options["call"])
    yield setting.row(**row, predicted_bytes=found.peak_bytes, predicted_s=found.seconds, **host_memory())
