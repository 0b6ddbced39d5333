"""A finished trace: plain data, its sums, and the files that show it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from vramkit.errors import ConfigError
from vramkit.timeline import Trace

__all__ = ["ENDINGS", "KINDS", "Event", "Kind", "Recording"]

Kind = Literal["pass", "compute", "copy", "stall"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ENDINGS = (".json", ".html", ".png")
_LEAST_STALL_S = 20e-6  # between two events on a device lies some time in any case


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that went on. Times in seconds since the trace began."""

    kind: Kind
    """A ``pass`` of a component, ``compute`` or ``copy`` of a unit that streams, or a ``stall``: waiting for a copy."""
    component: str
    name: str
    """The unit, or the entry point of a pass."""
    start_s: float
    end_s: float
    size_bytes: int = 0
    """What was copied."""
    slot: int | None = None
    """The first slot that it was copied to; None outside the slots."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """Events in the order in which they began, over the memory curve."""

    events: list[Event]
    memory: Trace

    def of(self, kind: Kind) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if event.kind == kind]

    @property
    def stalled_s(self) -> float:
        """How long computation waited for copies."""
        waits = (event.end_s - event.start_s for event in self.of("stall"))
        return sum(wait for wait in waits if wait > _LEAST_STALL_S)

    @property
    def copied_bytes(self) -> int:
        """What travelled."""
        return sum(event.size_bytes for event in self.of("copy"))

    @property
    def rate_gbps(self) -> float:
        """Bytes per second while something was copied, in GB/s (10^9)."""
        busy_s = _covered_s(self.of("copy"))
        return self.copied_bytes / busy_s / 1e9 if busy_s else 0.0

    @property
    def link_share(self) -> float:
        """The part of the time of all passes in which something was copied, between 0 and 1."""
        passes = self.of("pass")
        both = [
            Event("copy", "", "", max(copy.start_s, run.start_s), min(copy.end_s, run.end_s))
            for run in _joined(passes)
            for copy in self.of("copy")
            if copy.start_s < run.end_s and run.start_s < copy.end_s
        ]
        whole_s = _covered_s(passes)
        return _covered_s(both) / whole_s if whole_s else 0.0

    def summary(self) -> str:
        """Return the sums as one line."""
        peak_gib = self.memory.peak_bytes / 2**30
        return (
            f"{len(self.of('pass'))} passes in {_covered_s(self.of('pass')):.3f} s, stalled {self.stalled_s * 1000:.1f} ms; "
            f"{self.copied_bytes / 1e9:.3g} GB copied at {self.rate_gbps:.3g} GB/s, link busy for {self.link_share:.0%}; "
            f"{self.memory.kind} up to {peak_gib:.3g} GiB"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all: ``.json`` for Chrome and Perfetto, ``.html`` to look at in any browser, ``.png``.

        Raises:
            ConfigError: another ending.
            StoreError: it cannot be written there.
        """
        from vramkit.offload.disk.writing import atomic_write  # noqa: PLC0415 (engines know the recorder)
        from vramkit.tracing import views  # noqa: PLC0415 (it knows this class)

        ending = Path(path).suffix
        if ending not in ENDINGS:
            raise ConfigError(
                f"a trace was to be written to {str(path)!r}; expected a name that ends in {', '.join(ENDINGS)}"
            )
        with atomic_write(path) as file:
            if ending == ".png":
                views.picture(self, file)
            else:
                text = json.dumps(self.chrome_trace()) if ending == ".json" else views.page(self)
                file.write(text.encode())

    def lanes(self) -> list[tuple[str, Kind]]:
        """Return (component, kind) of all that there are events of, component by component."""
        components = dict.fromkeys(event.component for event in self.events)
        present = {(event.component, event.kind) for event in self.events}
        return [(component, kind) for component in components for kind in KINDS if (component, kind) in present]

    def chrome_trace(self) -> dict[str, Any]:
        """Return the trace event format: complete events in microseconds, a lane each, and memory as a counter."""
        lanes = {lane: at for at, lane in enumerate(self.lanes(), 1)}
        named: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": at, "args": {"name": f"{component}: {kind}"}}
            for (component, kind), at in lanes.items()
        ]
        for event in self.events:
            args = {"bytes": event.size_bytes, "slot": event.slot} if event.kind == "copy" else {}
            times = {"ts": event.start_s * 1e6, "dur": (event.end_s - event.start_s) * 1e6}
            lane = lanes[event.component, event.kind]
            named.append(
                {"ph": "X", "name": event.name or event.component, "cat": event.kind, "pid": 1, "tid": lane}
                | times
                | {"args": args}
            )
        kind = self.memory.kind
        named += [
            {"ph": "C", "name": kind, "pid": 1, "ts": sample.time_s * 1e6, "args": {"bytes": sample.used_bytes}}
            for sample in self.memory.samples
        ]
        named += [
            {"ph": "i", "name": mark.name, "pid": 1, "tid": 0, "ts": mark.time_s * 1e6, "s": "g"}
            for mark in self.memory.marks
        ]
        return {"traceEvents": named, "displayTimeUnit": "ms", "otherData": {"summary": self.summary()}}


def _joined(events: Iterable[Event]) -> list[Event]:
    """Return events that cover the same time and do not overlap."""
    joined: list[Event] = []
    for event in sorted(events, key=lambda event: event.start_s):
        if joined and event.start_s <= joined[-1].end_s:
            joined[-1] = dataclasses.replace(joined[-1], end_s=max(joined[-1].end_s, event.end_s))
        else:
            joined.append(event)
    return joined


def _covered_s(events: Iterable[Event]) -> float:
    return sum(event.end_s - event.start_s for event in _joined(events))
