"""What a command says while it works: lines and bars on stderr, so that stdout has the result alone."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vramkit.memory import format_bytes

if TYPE_CHECKING:
    from vramkit.planning import Plan
    from vramkit.timeline import MemoryTimeline, Trace

__all__ = ["Phases", "against_budget", "say", "with_bar"]

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"


def say(what: str, *lines: str) -> None:
    """Write lines to stderr, above a bar that is there, with `what` they are about before the first."""
    for at, line in enumerate(lines):
        tqdm.write(f"{'' if at else what:<9}{line}", file=sys.stderr)


def with_bar(frames: Any, phase: str) -> Any:
    """The same frames, with a bar that fills as they are taken."""
    return tqdm(frames, desc=phase)


def against_budget(plan: Plan, trace: Trace) -> list[str]:
    """What a run took against what it was given: tensors, and apart from them, what the process took on the CPU tier."""
    told = f"planned {format_bytes(plan.peak_bytes)} of {format_bytes(plan.vram_bytes)} for tensors"
    if plan.device != "cpu":
        return [f"{told}, took {format_bytes(trace.peak_bytes)} ({trace.kind})"]
    process = (
        f"the process took {format_bytes(trace.peak_bytes)} ({trace.kind}) with Python, libraries and pages of files"
    )
    return [
        f"{told}: weights on their way, weights that stay, and activations",
        f"{process}, which no budget bounds",
    ]


class Phases:
    """Follows a call through its phases: a bar for each, and a mark on the timeline.

    The bar of the steps is the pipeline's own; encode and decode have one step.
    """

    def __init__(self, timeline: MemoryTimeline) -> None:
        self._timeline = timeline
        self._bar: Any = None

    def begin(self, phase: str) -> None:
        """End the phase before, and begin this one."""
        self.end()
        self._timeline.mark(phase)
        if phase in ("encode", "decode"):
            self._bar = tqdm(total=1, desc=phase, bar_format=_BAR)

    def end(self) -> None:
        """Fill the bar of the phase that runs."""
        if self._bar is not None:
            self._bar.update(1)
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Leave the bar as it is: the phase did not come to its end."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def summary(self) -> list[str]:
        """The peak of the memory, and the seconds of each phase."""
        timeline = self._timeline
        ends = [*timeline.marks, None]
        seconds = [
            f"{mark.name} {(timeline.seconds if after is None else after.time_s) - mark.time_s:.1f}"
            for mark, after in pairwise(ends)
            if mark is not None
        ]
        trace = timeline.trace()
        return [
            f"peak {format_bytes(trace.peak_bytes)} of {trace.kind}",
            f"{trace.seconds:.1f} s ({', '.join(seconds)})",
        ]
