"""The table of growth: seconds and memory of Wan 14B against frames and layers."""

from __future__ import annotations

from benchmarks.page_cells import gib, on_the_best_link, outcome, rows_of, table_of
from benchmarks.rows import Row

__all__ = ["growth"]

_WAYS = ("resident", "vramkit block", "vramkit leaf")


def growth() -> str:
    """A forward by frames, and by layers, from ``suite.json``."""
    own = [row for row in rows_of("suite") if row.get("case") == "growth" and "subject" in row.get("options", {})]
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for row in on_the_best_link(own):
        subject = row["options"]["subject"]
        by_size.setdefault((subject["layers"] or 0, subject["clip"]["frames"]), {})[row["way"]] = row
    lines = []
    for (layers, frames), ways in sorted(by_size.items()):
        cells = [
            text
            for way in _WAYS
            for row in (ways.get(way, {}),)
            for text in (outcome(row), gib(row, "allocated_bytes"))
        ]
        lines.append([f"{frames} frames, {layers} layers" if layers else f"{frames} frames", *cells])
    heads = ("", "resident, s", "peak, GiB", "vramkit block, s (of its floor)", "peak", "vramkit leaf", "peak")
    return table_of(heads, lines)
