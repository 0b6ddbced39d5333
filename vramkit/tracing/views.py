"""A trace as a page for any browser, and as a picture."""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import Any, BinaryIO

from vramkit.extras import extra
from vramkit.tracing.recording import Kind, Recording

__all__ = ["page", "picture"]

_MIB = 2**20
_COLOURS: dict[Kind, str] = {"pass": "#9aa5b1", "compute": "#2f7ed8", "copy": "#3a9b5c", "stall": "#d64545"}


def page(recording: Recording) -> str:
    """Return a page that needs nothing else: lanes over the memory curve, to zoom and move in."""
    lanes = {lane: at for at, lane in enumerate(recording.lanes())}
    events = [
        [
            lanes[event.component, event.kind],
            event.name or event.component,
            event.start_s,
            event.end_s,
            f", {event.size_bytes / _MIB:.3g} MiB to slot {event.slot}" if event.kind == "copy" else "",
        ]
        for event in recording.events
    ]
    data: dict[str, Any] = {
        "seconds": max([recording.memory.seconds, *(event.end_s for event in recording.events)]),
        "lanes": [{"name": f"{component}: {kind}", "colour": _COLOURS[kind]} for component, kind in lanes],
        "events": events,
        "memory": recording.memory.samples,
        "marks": recording.memory.marks,
        "kind": recording.memory.kind,
        "peak": recording.memory.peak_bytes,
    }
    script = json.dumps(data).replace("</", "<\\/")  # a name may not end the script
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return Template(template).substitute(summary=html.escape(recording.summary()), data=script)


def picture(recording: Recording, file: BinaryIO) -> None:
    """Draw lanes over the memory curve, as PNG."""
    with extra("plots", needed_for="a plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - draws without a display
        from matplotlib.figure import Figure  # noqa: PLC0415

    lanes = recording.lanes()
    figure = Figure(figsize=(12, 2.6 + 0.32 * len(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[max(1.0, 0.32 * len(lanes)), 1.8])
    for at, (component, kind) in enumerate(lanes):
        spans = [
            (e.start_s, e.end_s - e.start_s) for e in recording.events if (e.component, e.kind) == (component, kind)
        ]
        top.broken_barh(spans, (at - 0.4, 0.8), facecolors=_COLOURS[kind])
    top.set_yticks(range(len(lanes)), [f"{component}: {kind}" for component, kind in lanes])
    top.set_ylim(max(1, len(lanes)) - 0.5, -0.5)  # of nothing, too
    top.set_title(recording.summary(), fontsize=9)
    seconds = [sample.time_s for sample in recording.memory.samples]
    mebibytes = [sample.used_bytes / _MIB for sample in recording.memory.samples]
    bottom.plot(seconds, mebibytes, color="#7b4bb3", linewidth=1.2)
    bottom.fill_between(seconds, mebibytes, color="#7b4bb3", alpha=0.12)
    for mark in recording.memory.marks:
        bottom.axvline(mark.time_s, color="#444444", linewidth=0.8, linestyle=":")
        bottom.annotate(mark.name, (mark.time_s, 1.0), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    bottom.set(xlabel="seconds", ylabel=f"{recording.memory.kind}, MiB", ylim=(0, None))
    figure.savefig(file, format="png", dpi=140)
