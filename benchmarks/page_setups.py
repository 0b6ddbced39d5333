"""Tables of what comes before a forward: loading, applying and taking off, adapters."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.page_cells import (
    FIRST_STEPS,
    figure,
    gib,
    on_the_best_link,
    outcome,
    rows_of,
    seconds,
    seconds_to_first,
    table_of,
)
from benchmarks.rows import Row

__all__ = ["adapters", "applying", "loading"]


def adapters() -> str:
    """Adapters of Wan 14B: loaded, switched, and what a forward takes with one."""
    lines = []
    for row in _rows("lora", "suite-h200"):
        library = row["options"]["subject"]["library"]
        lines.append(
            [
                row["way"] if row["way"].startswith(library) else f"{row['way']}, {library}",
                figure(row, "load_adapter_s", ".1f"),
                figure(row, "second_adapter_s", ".1f"),
                row["error"].partition(",")[0] if "error" in row else f"{row['s'] * 1000:.0f}",
                figure(row, "plain_forward_s", ".3f"),
                figure(row, "forward_s", ".3f"),
                gib(row, "allocated_bytes"),
            ]
        )
    heads = (
        "", "first adapter, s", "second, s", "a switch, ms", "forward without, s", "forward with one, s", "peak, GiB",
    )  # fmt: skip
    return table_of(heads, lines)


def applying() -> str:
    """Every library put on Wan 14B of diffusers and taken off again; ours five times."""
    lines = [
        [
            row["way"],
            figure(row, "first_s", ".2f"),
            figure(row, "s", ".2f") if row["repeats"] > 1 else "",
            figure(row, "remove_s", ".2f"),
            gib(row, "pinned_bytes"),
        ]
        for row in sorted(_rows("applying"), key=lambda row: (not row["way"].startswith("vramkit"), row["s"]))
    ]
    return table_of(("", "first, s", "again, s", "taking off, s", "page-locked by torch after that, GiB"), lines)


def loading() -> str:
    """From files to the first result by who loaded the transformer, each in a process of its own."""
    lines = [
        [
            row["subject"].partition(" by ")[2],
            *(figure(row, name, ".1f") for name in FIRST_STEPS),
            seconds_to_first(row, ".1f"),
            gib(row, "grown_bytes"),
            ", ".join(row.get("peer", {}).get("stores", {})),
            seconds(row) if "s" in row else outcome(row),
        ]
        for row in on_the_best_link(list(_rows("loading")))
    ]
    heads = (
        "loaded by", "loading, s", "applying, s", "first forward, s", "together, s", "memory it took, GiB", "rests",
        "forward, s (of its floor)",
    )  # fmt: skip
    return table_of(heads, lines)


def _rows(case: str, name: str = "suite") -> Iterator[Row]:
    return (row for row in rows_of(name) if row.get("case") == case)
