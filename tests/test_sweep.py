from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import pytest

from vramkit.demo.sweep import Point, plot_sweep
from vramkit.timeline import MIB


def test_draws_peak_and_seconds_with_their_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = matplotlib.figure.Figure.savefig

    def savefig(figure: matplotlib.figure.Figure, path: str, **given: object) -> None:
        figures.append(figure)
        save(figure, path, **given)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    points = [
        Point(budget_bytes=200 * MIB, peak_bytes=190 * MIB, seconds=3.0, link_s=1.0),
        Point(budget_bytes=100 * MIB, peak_bytes=90 * MIB, seconds=5.0, link_s=4.0),
    ]
    given = {"floor_bytes": 50 * MIB, "resident_bytes": 300 * MIB, "resident_s": 2.0}
    plot_sweep(points, tmp_path / "sweep.png", **given, title="a clip")  # type: ignore[arg-type]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    memory, time = figures[0].axes
    lines = {line.get_label(): line for axes in (memory, time) for line in axes.lines}
    assert list(lines["peak"].get_xdata()) == [100, 200]
    assert list(lines["peak"].get_ydata()) == [90, 190]
    assert list(lines["peak, all resident"].get_ydata()) == [300, 300]
    assert list(lines["seconds"].get_ydata()) == [5, 3]
    assert list(lines["floor: all resident, or the link alone"].get_ydata()) == [4, 2]
    assert any("below 50 MiB" in str(patch.get_label()) for patch in memory.patches)
