"""What tables of pages are put together from: rows of a file of results, and their figures in print."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.rows import Results, Row, compared, floor_s

__all__ = [
    "FIRST_STEPS", "figure", "gib", "on_the_best_link", "outcome", "row_of", "rows_of", "seconds", "seconds_to_first",
    "table_of",
]  # fmt: skip

FIRST_STEPS = ("load_s", "setup_s", "first_s")  # from files to the first result

_RESULTS = Path(__file__).parent / "results"
_GIB = 2**30


def table_of(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay lines out as a table in Markdown."""
    first, *rest = ["|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in (heads, *lines)]
    return "\n".join([first, "|" + "---|" * len(heads), *rest])


@functools.cache
def rows_of(name: str) -> tuple[Row, ...]:
    """Return the rows of a file of results, with what follows from others."""
    return tuple(compared(Results.read(_RESULTS / f"{name}.json")))


def row_of(name: str, **wanted: object) -> Row:
    """Return the one row of a file with these values, or an empty one."""
    found = [row for row in rows_of(name) if all(row.get(key) == value for key, value in wanted.items())]
    return found[0] if found else {}


def figure(row: Row, name: str, form: str) -> str:
    """Print a figure of a row; nothing where it has none."""
    if row.get(name) is None:
        return ""
    text = format(row[name], form)
    return text.lstrip("-") if float(text) == 0 else text


def gib(row: Row, name: str) -> str:
    """A size of a row in GiB."""
    return f"{row[name] / _GIB:.2f}" if row.get(name) else ""


def seconds(row: Row, form: str = ".3f", ratio: str = ".2f", name: str = "s") -> str:
    """Seconds, and how often their floor they are."""
    times = f" ({row['ratio']:{ratio}})" if row.get("ratio") else ""
    return figure(row, name, form) + times


def seconds_to_first(row: Row, form: str) -> str:
    """Print the seconds from files to the first result; nothing where one of the steps was not timed."""
    steps = [float(row.get(name) or 0) for name in FIRST_STEPS]
    return format(sum(steps), form) if all(steps) else ""


def outcome(row: Row) -> str:
    """Tell the seconds, or why there are none."""
    error = row.get("error")
    return error[:80].replace("|", "/") if error else seconds(row)


def on_the_best_link(rows: Sequence[Row]) -> list[Row]:
    """Return rows of one run with the ratio to the floor of the quickest link that any of their processes measured.

    Beside rows on other cards of the host a process may find its link slower than its passes have it, and a floor that is
    undercut is none.
    """
    best = {"link_gbps": max((row.get("link_gbps") or 0 for row in rows), default=0)}
    told = []
    for row in rows:
        reference = {"s": row.get("reference_s")}
        told.append(row | {"ratio": row["s"] / floor_s(row | best, reference)} if reference["s"] else row)
    return told
