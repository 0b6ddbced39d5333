"""What happened when: the memory that a run holds, sampled over time, with its phases marked."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from vramkit.device_memory import memory_of
from vramkit.errors import CheckpointError
from vramkit.extras import extra

if TYPE_CHECKING:
    from types import TracebackType

MIB = 2**20


class Sample(NamedTuple):
    """Memory held at one moment."""

    time_s: float  # since the timeline began
    used_bytes: int


class Mark(NamedTuple):
    """The moment at which a phase began."""

    time_s: float
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A finished recording: plain data that goes to JSON and back."""

    kind: str  # "process memory" | "device memory"
    samples: list[Sample]
    marks: list[Mark]
    peak_bytes: int
    seconds: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        Path(path).write_text(json.dumps(fields), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace that ``save`` wrote; CheckpointError when the file holds something else."""
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                kind=fields["kind"],
                samples=[Sample(*sample) for sample in fields["samples"]],
                marks=[Mark(*mark) for mark in fields["marks"]],
                peak_bytes=fields["peak_bytes"],
                seconds=fields["seconds"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a memory trace: {error!r}") from error


class MemoryTimeline:
    """Record the memory that a block of code holds.

    On a CUDA device: bytes reserved by torch's caching allocator, which is what the card can no longer give to others.
    On the CPU: growth of this process's resident set since the block was entered, so that imports do not count.

    ::

        with MemoryTimeline("cpu") as timeline:
            timeline.mark("encode")
            ...
        timeline.trace().save("run.json")

    A thread takes a sample every ``interval_s`` seconds. The peak does not depend on its luck: it comes from counters
    that the allocator and the kernel keep, where they keep them.
    """

    def __init__(self, device: str | torch.device = "cpu", *, interval_s: float = 0.005) -> None:
        self.device = torch.device(device)
        self.interval_s = interval_s
        self.samples: list[Sample] = []
        self.marks: list[Mark] = []
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="vramkit-memory-timeline", daemon=True)
        self._start_s = 0.0
        self._end_s: float | None = None
        self._baseline_bytes = 0
        self._kernel_peak_at_start: int | None = None
        self._counted_peak_bytes = 0

    def __enter__(self) -> MemoryTimeline:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._baseline_bytes = self._process.memory_info().rss
            self._kernel_peak_at_start = _kernel_peak_bytes()
        self._start_s = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.samples.append(self._measure())
        self._end_s = time.perf_counter()
        self._counted_peak_bytes = self._counted_peak()

    def mark(self, name: str) -> None:
        """Note that the phase ``name`` begins now."""
        self.marks.append(Mark(time.perf_counter() - self._start_s, name))

    @property
    def begun_s(self) -> float:
        """When the block was entered, as ``time.perf_counter`` counts."""
        return self._start_s

    @property
    def seconds(self) -> float:
        """Seconds from entering the block to leaving it, or to now."""
        return (time.perf_counter() if self._end_s is None else self._end_s) - self._start_s

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were held at once, exact once the block is left."""
        return max([self._counted_peak_bytes, *(sample.used_bytes for sample in self.samples)])

    def trace(self) -> Trace:
        """Return the recording as plain data."""
        kind = "device memory" if self.device.type == "cuda" else "process memory"
        return Trace(
            kind=kind,
            samples=list(self.samples),
            marks=list(self.marks),
            peak_bytes=self.peak_bytes,
            seconds=self.seconds,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording as JSON."""
        self.trace().save(path)

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.samples.append(self._measure())
            self._stop.wait(self.interval_s)

    def _measure(self) -> Sample:
        if self.device.type == "cuda":
            used_bytes = torch.cuda.memory_reserved(self.device) + memory_of(self.device).beside_bytes
        else:
            used_bytes = self._process.memory_info().rss - self._baseline_bytes
        return Sample(time.perf_counter() - self._start_s, used_bytes)

    def _counted_peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        before, after = self._kernel_peak_at_start, _kernel_peak_bytes()
        if before is None or after is None or after == before:
            return 0  # the process was larger before this block: only the samples speak for it
        return after - self._baseline_bytes


def _kernel_peak_bytes() -> int | None:
    """Return the largest resident set that the kernel has seen for this process, None where it does not say (Linux)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None


def plot(
    traces: Mapping[str, Trace],
    path: str | os.PathLike[str],
    *,
    budget_bytes: int | None = None,
    title: str | None = None,
) -> None:
    """Draw traces over each other: seconds against MiB, phases marked, the budget as a line.

    Args:
        traces: label -> trace, at least one, drawn in this order.
        path: the picture to write; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).
        budget_bytes: drawn as a dashed line.
        title: printed above the picture.
    """
    with extra("plots", needed_for="a plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - draws without a display
        from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    top_mib = max([trace.peak_bytes for trace in traces.values()] + [budget_bytes or 0]) / MIB
    end_s = max(trace.seconds for trace in traces.values())
    row = 0
    for index, (label, trace) in enumerate(traces.items()):
        colour = f"C{index}"
        seconds = [sample.time_s for sample in trace.samples]
        mebibytes = [sample.used_bytes / MIB for sample in trace.samples]
        name = f"{label}: peak {trace.peak_bytes / MIB:.0f} MiB, {trace.seconds:.1f} s"
        axes.plot(seconds, mebibytes, color=colour, linewidth=1.4, label=name)
        axes.fill_between(seconds, mebibytes, color=colour, alpha=0.12)
        row = _draw_marks(axes, trace.marks, colour=colour, row=row, close_s=0.09 * end_s) + 1
    if budget_bytes is not None:
        label = f"budget: {budget_bytes / MIB:.0f} MiB"
        axes.axhline(budget_bytes / MIB, color="black", linewidth=1.2, linestyle="--", label=label)
    # Above the curves, one line of height for each row of phase names.
    axes.set(xlabel="seconds", ylabel="MiB", xlim=(0, end_s * 1.02), ylim=(0, top_mib * 1.05 / (1 - _ROW * row)))
    axes.set_title(title or "")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(os.fspath(path), dpi=140)


_ROW = 0.045  # height of a line of phase names, as a part of the axes


def _draw_marks(axes: Any, marks: list[Mark], *, colour: str, row: int, close_s: float) -> int:
    """Draw phases from row ``row`` downwards, each name a row below the one that it would cover; return the last row."""
    free_row_s = [float("-inf")]  # where the last name of each row began
    for mark in marks:
        depth = next((depth for depth, begun_s in enumerate(free_row_s) if mark.time_s - begun_s >= close_s), None)
        if depth is None:
            depth = len(free_row_s)
            free_row_s.append(mark.time_s)
        free_row_s[depth] = mark.time_s
        axes.axvline(mark.time_s, color=colour, linewidth=0.8, linestyle=":")
        place = (mark.time_s, 1.0 - _ROW * (row + depth))
        offset = {"xytext": (3, -3), "textcoords": "offset points"}
        # On white and above the lines, so that those of other phases pass behind the name.
        style = {
            "fontsize": 8,
            "color": colour,
            "zorder": 5,
            "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
        }
        axes.annotate(mark.name, place, xycoords=("data", "axes fraction"), va="top", **offset, **style)
    return row + len(free_row_s) - 1
