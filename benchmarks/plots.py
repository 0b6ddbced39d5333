"""Pictures of results: seconds against memory of all ways, time against budgets and cards, growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Results, Row, compared

__all__ = ["PLOTS", "draw", "pictures_of"]

_GIB = 2**30
_SIZE = (8.5, 4.2)  # inches
_TICKS = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 200, 1000, 2500, 5000)


def pictures_of(results: Results, path: Path) -> list[Path]:
    """Return where `draw` puts the pictures of these results, beside `path`."""
    rows = compared(results)
    return [path.with_name(f"{path.stem}-{name}.png") for name, (wanted, _) in PLOTS.items() if wanted(rows)]


def draw(results: Results, path: Path) -> list[Path]:
    """Draw them; returns the files."""
    if not pictures_of(results, path):
        return []
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, drawn = compared(results), []
    for name, (wanted, plot) in PLOTS.items():
        chosen = wanted(rows)
        if chosen:
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.subplots()
            axes.set_prop_cycle(color=[colormaps["tab20"](at) for at in range(20)])
            plot(axes, chosen)
            _dressed(axes)
            target = path.with_name(f"{path.stem}-{name}.png")
            figure.savefig(target, dpi=120, metadata={"Software": None})
            drawn.append(target)
    return drawn


def _dressed(axes: Any) -> None:
    """Put the names beside the picture, and plain numbers of GiB below it."""
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)


def _measured(case: str, *needed: str) -> Callable[[Sequence[Row]], list[Row]]:
    def wanted(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.get("case") == case and "way" in row and all(row.get(key) for key in needed)]

    return wanted


def _largest(rows: Sequence[Row]) -> list[Row]:
    """Rows of the subject that takes longest: where there are several numbers of frames, the most."""
    subject = max(rows, key=lambda row: float(row["s"]))["subject"]
    return [row for row in rows if row["subject"] == subject]


def _speed_and_memory(axes: Any, rows: Sequence[Row]) -> None:
    """A point for each way: further left and lower is better."""
    chosen = _largest(rows)
    for row in chosen:
        x, y = row["reserved_bytes"] / _GIB, row["s"]
        axes.plot(x, y, "o" if row["way"].startswith("vramkit") else "s", label=row["way"])
    axes.set(xlabel="reserved peak, GiB", ylabel="seconds of a forward", title=chosen[0]["subject"], xscale="log")


def _against(axes: Any, rows: Sequence[Row], x: Callable[[Row], float], label: str) -> None:
    """A line for each way."""
    for way in dict.fromkeys(row["way"] for row in rows):
        points = sorted((x(row), row["s"]) for row in rows if row["way"] == way)
        axes.plot(*zip(*points, strict=True), "o-", label=way, markersize=3)
    axes.set(xlabel=label, ylabel="seconds")


def _from_zero(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits of an axis of seconds: all rows lie below the upper one."""
    return 0, 1.08 * max((row["s"] for row in rows if row.get("s")), default=1)


def _cards(axes: Any, rows: Sequence[Row]) -> None:
    chosen = _largest(rows)
    _against(axes, chosen, lambda row: float(row["options"]["card_bytes"]) / _GIB, "memory of the card, GiB")
    axes.set(xscale="log", title=chosen[0]["subject"], ylim=_from_zero(chosen))


def _budgets(axes: Any, rows: Sequence[Row]) -> None:
    for subject in dict.fromkeys(row["subject"] for row in rows):
        for level in ("block", "leaf"):
            own = [row for row in rows if row["subject"] == subject and row["way"].startswith(f"vramkit {level}")]
            points = sorted((row["resident_bytes"] / _GIB, row["s"]) for row in own)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=f"{subject}, {level}")
    axes.set(xlabel="weights that stay, GiB", ylabel="seconds", ylim=_from_zero(rows))


def _growth(axes: Any, rows: Sequence[Row]) -> None:
    own = [row for row in rows if "leaves" in row.get("options", {})]
    if own:
        _against(axes, own, lambda row: float(row["options"]["leaves"]), "linear layers")
        axes.set(xscale="log", yscale="log")


Plot = Callable[[Any, Sequence[Row]], None]
PLOTS: dict[str, tuple[Callable[[Sequence[Row]], list[Row]], Plot]] = {
    "speed": (_measured("forward", "s", "reserved_bytes"), _speed_and_memory),
    "cards": (_measured("cards", "s"), _cards),
    "budgets": (_measured("budgets", "s"), _budgets),
    "growth": (_measured("growth", "s"), _growth),
}
