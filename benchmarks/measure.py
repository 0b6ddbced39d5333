"""A timer with peaks of memory and energy, and the machine that it ran on."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from benchmarks.energy import joules
from benchmarks.rows import Row
from vramkit import tensors
from vramkit.machine import page_lock_limit_bytes, versions
from vramkit.memory import available_ram_bytes

__all__ = [
    "Measurement", "digest", "environment", "host_memory", "measure", "peaks", "release_memory", "reset_peaks", "seconds_of",
    "synchronize", "trouble",
]  # fmt: skip

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of one call (median and slowest of the repeats), peaks of the allocator in bytes, joules of one call."""

    s: float
    slowest_s: float
    repeats: int
    peaks: Row
    joules: float | None

    def row(self) -> Row:
        """Return the figures as a row has them."""
        spent = None if self.joules is None else round(self.joules, 2)
        figures = {"s": round(self.s, 6), "slowest_s": round(self.slowest_s, 6), "repeats": self.repeats}
        return figures | self.peaks | {"joules": spent} | host_memory()


def measure(
    call: Callable[[], T], device: torch.device, *, repeats: int = 3, warm_up_s: float = 1.5
) -> tuple[Measurement, T]:
    """Time `call`; also return its last result.

    Calls before `warm_up_s` seconds have passed (at least one) are not counted: a device that has just been idle runs faster
    than one that works, which would flatter whatever is measured first.
    """
    start = time.perf_counter()
    while True:
        result = call()
        synchronize()
        if time.perf_counter() - start > warm_up_s:
            break
        del result
    seconds: list[float] = []
    del result
    release_memory()
    reset_peaks()
    spent = joules(device)
    for _ in range(repeats):
        result = None  # type: ignore[assignment]  # frees the last one, so that peaks are those of one call
        synchronize()
        start = time.perf_counter()
        result = call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    spent_after = joules(device)
    each = None if spent is None or spent_after is None else (spent_after - spent) / repeats
    return Measurement(statistics.median(seconds), max(seconds), repeats, peaks(), each), result


def release_memory() -> None:
    """Give what nobody uses back to the device."""
    gc.collect()
    synchronize()
    torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the CUDA device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peaks() -> None:
    """Begin to look for peaks anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks(prefix: str = "") -> Row:
    """Return the allocator's peaks since they were reset; None without a device."""
    there = torch.cuda.is_available()
    return {
        f"{prefix}allocated_bytes": torch.cuda.max_memory_allocated() if there else None,
        f"{prefix}reserved_bytes": torch.cuda.max_memory_reserved() if there else None,
    }


def trouble() -> Row:
    """Return how often the allocator had to give back what it keeps, and how often even that was not enough."""
    found = torch.cuda.memory_stats() if torch.cuda.is_available() else {}
    return {"allocator_retries": found.get("num_alloc_retries"), "allocator_failures": found.get("num_ooms")}


@contextmanager
def seconds_of(row: Row, name: str) -> Iterator[None]:
    """Note in `row` how long the block took, with the device waited for."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    row[name] = round(time.perf_counter() - start, 6)


def host_memory() -> Row:
    """Return the memory of this process and what torch's allocator has page-locked, in bytes; None where nobody tells."""
    row: Row = {"rss_bytes": psutil.Process().memory_info().rss, "anonymous_bytes": None, "pinned_bytes": None}
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        row["anonymous_bytes"] = int(lines["RssAnon"].split()[0]) * 1024
    if torch.cuda.is_available() and hasattr(torch.cuda, "host_memory_stats"):
        row["pinned_bytes"] = torch.cuda.host_memory_stats().get("allocated_bytes.current")
    return row | {"available_bytes": available_ram_bytes()}


def digest(value: Any) -> str:
    """Return a hash of every tensor in a result, whatever it is packed in."""
    found = hashlib.sha256()
    for tensor in _tensors(value):
        found.update(tensors.byte_view(tensor.detach().cpu().contiguous()).numpy().data)
    return found.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def environment(*, allocator: str = "", scale: str = "full", peers: Row | None = None) -> Row:
    """Describe hardware, versions, allocator settings and date."""
    there = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if there else None
    packages = versions() | {"system": platform.system()}  # rows of another build of the kernel are comparable
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "device": properties.name if properties else platform.processor() or platform.machine(),
        "device_bytes": properties.total_memory if properties else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": packages | (peers or {}),
        "cpu_count": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "page_lock_limit_bytes": page_lock_limit_bytes(),
        "allocator": allocator or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "scale": scale,
    }
