"""The steps of a denoising loop, timed by the callback that pipelines have for it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import digest, peaks, reset_peaks, synchronize, trouble
from benchmarks.rows import Row

__all__ = ["Steps"]


@dataclasses.dataclass
class Steps:
    """A step callback that notes the seconds of each step, what travelled in it, the peak of all, and what they gave."""

    travelled: Callable[[], int] = lambda: 0
    """Bytes that travelled so far."""
    since: float = dataclasses.field(default_factory=time.perf_counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes: list[int] = dataclasses.field(default_factory=list)
    """What had travelled at the end of each step."""
    peaks: Row = dataclasses.field(default_factory=dict)
    retries: list[int] = dataclasses.field(default_factory=list)
    """How often the allocator had given back what it keeps, at the end of each step."""
    digest: str = ""

    def begin(self) -> None:
        """Let the next step begin here."""
        synchronize()
        reset_peaks()
        self.since = time.perf_counter()

    def end(self, result: Any) -> None:
        """Let the step end here that `result` is of."""
        synchronize()
        self.seconds.append(time.perf_counter() - self.since)
        self.bytes.append(self.travelled())
        self.retries.append(trouble()["allocator_retries"] or 0)
        self.peaks = {name: max(value or 0, self.peaks.get(name) or 0) or None for name, value in peaks().items()}
        self.digest = digest(result)
        self.begin()

    def __call__(self, _pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """End a step of a pipeline, and change nothing."""
        self.end(tensors["latents"])
        return {}

    def figures(self, *, without: int | None = None) -> Row:
        """Return the median of the steps but the first, which warms up, and the one of number `without`."""
        others = [seconds for at, seconds in enumerate(self.seconds) if at not in (0, without)]
        return {
            "s": round(statistics.median(others), 6),
            "slowest_s": round(max(others), 6),
            "first_s": round(self.seconds[0], 6),
            "steps_s": [round(seconds, 3) for seconds in self.seconds],
            "steps_retries": self.retries,
            "repeats": len(others),
            **self.peaks,
        }
