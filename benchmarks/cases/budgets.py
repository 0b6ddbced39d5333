"""Time against the bytes that stay on the device, at block and leaf level.

One live module goes from budget to budget by `Offload.adapt`. ``s`` is a pass in a row, as a sampler runs them;
``waited_for_s`` one with the device waited for after each, which also waits for what was loaded ahead for the next
pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.bench import Bench
from benchmarks.measure import digest, host_memory, peaks, release_memory, reset_peaks, synchronize
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject
from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading

_SHARES = (0, 0.04, 0.08, 0.15, 0.22, 0.3, 0.41, 0.52, 0.6, 0.64, 0.68, 0.71, 0.75, 0.79, 0.83, 0.9, 0.97, 1)
_REPEATS = 5


def settings(scale: str) -> Iterator[Setting]:
    """Both levels at 5 and 33 frames."""
    is_smoke = scale == "smoke"
    for frames in (5,) if is_smoke else (5, 33):
        subject = Subject.of("wan-14b", scale, frames=frames)
        for level in ("block", "leaf"):
            yield Setting(
                case="budgets",
                subject=str(subject),
                way=f"vramkit {level}",
                options={"subject": subject.to_json(), "shares": [0, 0.5, 1] if is_smoke else list(_SHARES)},
                reference={"case": "forward"},
            )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure all budgets at one level: a row for each."""
    subject = Subject.from_json(setting.options["subject"])
    model, given = subject.load(bench), subject.inputs(bench)
    level = setting.way.removeprefix("vramkit ")
    offload = apply_group_offloading(model, bench.device, offload_type=f"{level}_level")
    weights = module_bytes(model)
    for share in setting.options["shares"]:
        offload.adapt(resident=int(share * weights))
        release_memory()
        reset_peaks()
        in_a_row, waited, result = _seconds(model, given, bench)
        stats = offload.stats()
        row: Row = {
            "s": round(in_a_row, 6),
            "waited_for_s": round(waited, 6),
            "resident_bytes": stats.resident_bytes,
            "moved_bytes": stats.streamed_bytes,
            "slots": stats.slots,
            "link_gbps": bench.link_gbps,
            "digest": digest(result),
            **peaks(),
            **host_memory(),
        }
        yield setting.row(**row) | {
            "way": f"{setting.way} {share:.0%} resident",
            "of": setting.way,
        }
    offload.remove()


def _seconds(model: nn.Module, given: dict[str, Any], bench: Bench) -> tuple[float, float, torch.Tensor]:
    repeats = 1 if bench.is_smoke else _REPEATS
    with torch.no_grad():
        for _ in range(2):
            model(**given)
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            result = model(**given)[0]
        if bench.device.type == "cuda":  # as a sampler does, and not for what was loaded ahead
            torch.cuda.current_stream().synchronize()
        in_a_row = (time.perf_counter() - start) / repeats
        waited = []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            result = model(**given)[0]
            synchronize()
            waited.append(time.perf_counter() - start)
    return in_a_row, statistics.median(waited), result
