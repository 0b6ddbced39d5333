"""Pictures of results: seconds against memory of all ways, time against budgets and cards, growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Results, Row, compared

__all__ = ["PLOTS", "draw", "pictures_of"]

_GIB = 2**30
_SIZE = (8.5, 4.2)  # inches
_MEMORIES = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80)  # of cards and peaks, GiB
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def pictures_of(results: Results, path: Path) -> list[Path]:
    """Return where `draw` puts the pictures of these results, beside `path`."""
    rows = compared(results)
    return [path.with_name(f"{path.stem}-{name}.png") for name, (wanted, *_) in PLOTS.items() if wanted(rows)]


def draw(results: Results, path: Path) -> list[Path]:
    """Draw them; returns the files."""
    if not pictures_of(results, path):
        return []
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, drawn = compared(results), []
    for name, (wanted, *panels) in PLOTS.items():
        chosen = wanted(rows)
        if chosen:
            figure = Figure(figsize=_SIZE, layout="constrained")
            beside = figure.subplots(ncols=len(panels), squeeze=False)[0]
            for axes, plot in zip(beside, panels, strict=True):
                axes.set_prop_cycle(color=[colormaps["tab20"](at) for at in range(20)])
                plot(axes, chosen)
            names = beside[0].get_legend_handles_labels()
            beside[-1].legend(*names, fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))
            target = path.with_name(f"{path.stem}-{name}.png")
            figure.savefig(target, dpi=120, metadata={"Software": None})
            drawn.append(target)
    return drawn


def _ticked(axis: Any, values: Sequence[float]) -> None:
    """Put these numbers along an axis, as far as it reaches, and no others."""
    low, high = axis.get_view_interval()
    ticks = [value for value in values if low <= value <= high]
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


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
    _ticked(axes.xaxis, _MEMORIES)


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
    _ticked(axes.xaxis, _MEMORIES)


def _budgets(axes: Any, rows: Sequence[Row]) -> None:
    for subject in dict.fromkeys(row["subject"] for row in rows):
        for level in ("block", "leaf"):
            own = [row for row in rows if row["subject"] == subject and row["way"].startswith(f"vramkit {level}")]
            points = sorted((row["resident_bytes"] / _GIB, row["s"]) for row in own)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=f"{subject}, {level}")
    axes.set(xlabel="weights that stay, GiB", ylabel="seconds", ylim=_from_zero(rows))


def _leaves_of(row: Row) -> float:
    return float(row["options"]["leaves"])


def _growth(axes: Any, rows: Sequence[Row]) -> None:
    _against(axes, rows, _leaves_of, "linear layers")
    axes.set(xscale="log", yscale="log")
    _ticked(axes.xaxis, sorted({_leaves_of(row) for row in rows}))
    _ticked(axes.yaxis, _SECONDS)


def _frames_of(row: Row) -> float:
    return float(row["options"]["subject"]["clip"]["frames"])


def _weights_of(row: Row) -> int:
    """Bytes of weights on the device, of a way that has all of them there."""
    return int(row.get("peer", {}).get("weights_bytes", 0))


def _seconds_by_frames(axes: Any, rows: Sequence[Row]) -> None:
    """The longer of computing and the link: a curve, and a line that does not rise."""
    links = [
        row["moved_bytes"] / row["link_gbps"] / 1e9 for row in rows if row.get("moved_bytes") and row.get("link_gbps")
    ]
    if links:
        axes.axhline(min(links), color="grey", linestyle=":", linewidth=1, label="weights on the link")
    _against(axes, rows, _frames_of, "frames")
    axes.set(yscale="log")
    _ticked(axes.yaxis, _SECONDS)


def _peak_by_frames(axes: Any, rows: Sequence[Row]) -> None:
    """Activations and slots; of the resident run, activations alone."""
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way and row.get("allocated_bytes")]
        points = sorted((_frames_of(row), (row["allocated_bytes"] - _weights_of(row)) / _GIB) for row in own)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=way, markersize=3)
    axes.set(xlabel="frames", ylabel="peak, GiB (resident: less its weights)", ylim=(0, None))


def _grown(key: str) -> Callable[[Sequence[Row]], list[Row]]:
    """Rows of growth with this option, those of fewer layers left out."""
    measured = _measured("growth", "s")

    def wanted(rows: Sequence[Row]) -> list[Row]:
        found = [row for row in measured(rows) if key in row.get("options", {})]
        whole = [row for row in found if key != "subject" or not row["options"]["subject"].get("layers")]
        return sorted(whole, key=lambda row: str(row["way"]))

    return wanted


PLOTS: dict[str, tuple[Callable[..., Any], ...]] = {  # which rows, and what is drawn of them, from left to right
    "speed": (_measured("forward", "s", "reserved_bytes"), _speed_and_memory),
    "cards": (_measured("cards", "s"), _cards),
    "budgets": (_measured("budgets", "s"), _budgets),
    "growth": (_grown("leaves"), _growth),
    "frames": (_grown("subject"), _seconds_by_frames, _peak_by_frames),
}
