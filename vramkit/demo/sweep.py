"""One clip under several budgets, as a picture: peak and seconds against budget, with the floors drawn in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vramkit.extras import extra
from vramkit.timeline import MIB

__all__ = ["Point", "plot_sweep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What one budget came to."""

    budget_bytes: int
    peak_bytes: int
    seconds: float  # of the clip, without loading
    link_s: float  # that its streamed bytes take on the link alone


def plot_sweep(
    points: Sequence[Point],
    path: str | os.PathLike[str],
    *,
    floor_bytes: int,
    resident_bytes: int,
    resident_s: float,
    title: str = "",
) -> None:
    """Draw peak and seconds of `points` against their budgets.

    Args:
        points: at least one, in any order.
        path: the picture to write; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).
        floor_bytes: the least budget that a plan fits into; below it the picture is grey.
        resident_bytes: peak with everything on the device.
        resident_s: seconds with everything on the device; no budget can do better than the longer of these and its
            point's ``link_s``.
        title: printed above the picture.
    """
    with extra("plots", needed_for="a plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - draws without a display
        from matplotlib.figure import Figure  # noqa: PLC0415

    points = sorted(points, key=lambda point: point.budget_bytes)
    budgets = [point.budget_bytes / MIB for point in points]
    end = 1.1 * budgets[-1]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2)
    memory.plot(budgets, [point.peak_bytes / MIB for point in points], "o-", color="C1", label="peak")
    memory.plot([0, end], [0, end], "--", color="black", linewidth=1.2, label="budget")
    memory.axhline(resident_bytes / MIB, color="C0", label="peak, all resident")
    memory.set(ylabel="MiB")
    time.plot(budgets, [point.seconds for point in points], "o-", color="C1", label="seconds")
    floors = [max(resident_s, point.link_s) for point in points]
    time.plot(budgets, floors, "--", color="black", linewidth=1.2, label="floor: all resident, or the link alone")
    time.set(ylabel="seconds of the clip")
    grey = f"below {floor_bytes / MIB:.0f} MiB: no plan fits"
    for axes in (memory, time):
        axes.axvspan(0, floor_bytes / MIB, color="0.9", label=grey if axes is memory else None)
        axes.set(xlabel="budget, MiB", xlim=(0, end), ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(os.fspath(path), dpi=140)
