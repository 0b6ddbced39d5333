"""What every benchmark shares: a timer with memory peaks, the machine it ran on, and tables made from rows."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch

import vramkit

GIB = 2**30

Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds (median of the repeats) and allocator peaks in bytes of one call."""

    seconds: float
    slowest_s: float
    allocated_bytes: int
    reserved_bytes: int

    def row(self) -> Row:
        """Return the figures as they are reported: seconds and GiB."""
        return {
            "s": round(self.seconds, 4),
            "slowest_s": round(self.slowest_s, 4),
            "allocated_gib": round(self.allocated_bytes / GIB, 3),
            "reserved_gib": round(self.reserved_bytes / GIB, 3),
        }


def release_memory() -> None:
    """Give what nobody uses back to the device."""
    gc.collect()
    synchronize()
    torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the CUDA device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(call: Callable[[], T], *, repeats: int = 3, warm_up_s: float = 1.5) -> tuple[Measurement, T]:
    """Time `call` on the current CUDA device, or on the CPU without peaks; also return its last result.

    Calls before `warm_up_s` seconds have passed (at least one) are not counted: a device that has just been idle runs faster
    than one that works, which would flatter whatever is measured first.
    """
    start = time.perf_counter()
    while True:
        call()
        synchronize()
        if time.perf_counter() - start > warm_up_s:
            break
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    result = None
    for _ in range(repeats):
        result = None  # frees the last one, so that peaks are those of one call
        synchronize()
        start = time.perf_counter()
        result = call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measurement(statistics.median(seconds), max(seconds), *peaks), cast("T", result)


def environment() -> Row:
    """Describe hardware, versions and date."""
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    packages = {name: installed.get(name) for name in ("torch", "diffusers", "transformers", "bitsandbytes")}
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "device": properties.name if properties else platform.processor() or platform.machine(),
        "device_gib": round(properties.total_memory / GIB, 1) if properties else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": packages | {"vramkit": vramkit.__version__},
        "cpu_count": psutil.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Lay rows out as a Markdown table; what a row lacks stays empty."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_json(path: Path, name: str, rows: Sequence[Row], **notes: Any) -> None:
    """Write rows with the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"benchmark": name, "environment": environment(), **notes, "rows": list(rows)}, indent=1)
    )
