"""Tables of README and docs, made from files of results: each between ``<!-- results: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.page_cells import figure, gib, outcome, row_of, rows_of, seconds, seconds_to_first, table_of
from benchmarks.page_growth import growth
from benchmarks.page_runs import families, loaders, wan14b
from benchmarks.page_setups import adapters, applying, loading
from benchmarks.rows import KEY, Row, floor_s

__all__ = ["PAGES", "TABLES", "rendered"]

PAGES = tuple(Path(__file__).parents[1] / name for name in ("README.md", "docs/figures.md"))
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_AGAIN = {"suite": "again", "suite-h200": "again-h200"}  # files of results, and of those rows that were measured again
_YES = {True: "yes", False: "no", None: ""}


def rendered(text: str) -> str:
    """Return the text of a page with the tables between its marks made anew.

    Raises:
        KeyError: a mark names a table that there is not.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def _quantized(name: str, frames: int) -> str:
    """Kinds of weights: resident beside bf16, streamed beside resident; those that were measured."""
    names = {
        "bf16": "vramkit bf16",
        "fp8 storage": "vramkit fp8",
        "fp8 products": "vramkit fp8-mm",
        "nf4": "vramkit nf4",
        "int8 of bitsandbytes": "vramkit int8",
        "bf16, model of diffusers": "diffusers bf16",
        "fp8 casting of diffusers": "diffusers fp8",
        "nf4, model of diffusers": "diffusers nf4",
    }
    own = functools.partial(row_of, name, case="quantized")
    lines = []
    for label, kind in names.items():
        subject = f"wan-14b {kind} 832x480x{frames}"
        plain = own(subject=f"wan-14b {kind.split(' ')[0]} bf16 832x480x{frames}", way="resident")
        resident = own(subject=subject, way="resident")
        if not resident.get("s"):
            continue
        streamed = [own(subject=subject, way=way) for way in ("vramkit block", "vramkit leaf", "diffusers leaf stream")]
        beside = f" ({resident['s'] / plain['s']:.2f})" if plain.get("s") and plain is not resident else ""
        peaks = [gib(row, "allocated_bytes") for row in (resident, *streamed)]
        lines.append(
            [
                label,
                figure(resident, "s", ".3f") + beside,
                *map(seconds, (row if row.get("s") else {} for row in streamed)),
                ", ".join(filter(None, peaks)),
                figure(resident, "db", ".0f"),
            ]
        )
    heads = (
        "", "resident, s (of bf16)", "vramkit block, s (of its floor)", "vramkit leaf", "diffusers leaf + stream",
        "peaks, GiB", "dB",
    )  # fmt: skip
    return table_of(heads, lines)


def _guide() -> str:
    names = {"everything on the device": "resident", "diffusers": "diffusers guide", "vramkit": "vramkit guide"}
    lines = []
    for label, way in names.items():
        row = row_of("suite", case="guide", way=way)
        peaks = [gib(row, f"{phase}_allocated_bytes") for phase in ("encode", "steps", "decode")]
        reserved = [gib(row, f"{phase}_reserved_bytes") for phase in ("encode", "steps", "decode")]
        lines.append(
            [
                label,
                figure(row, "setup_s", ".1f"),
                figure(row, "encode_s", ".2f"),
                figure(row, "s", ".2f"),
                figure(row, "decode_s", ".2f"),
                ", ".join(filter(None, peaks)),
                ", ".join(filter(None, reserved)),
                gib(row, "ram_taken_bytes"),
            ]
        )
    heads = (
        "", "set-up, s", "encode, s", "step, s", "decode, s", "peak of encode, steps, decode, GiB", "reserved, GiB",
        "RAM taken, GiB",
    )  # fmt: skip
    return table_of(heads, lines)


def _peers() -> str:
    """Every way on the transformer of diffusers, from ``suite.json``: seconds, memory, set-up; errors as they are."""
    shapes = [f"wan-14b diffusers bf16 832x480x{frames}" for frames in (5, 81)]
    rows = [row for row in rows_of("suite") if row.get("case") == "forward" and row.get("subject") in shapes]
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        short, long = (row_of("suite", case="forward", subject=subject, way=way) for subject in shapes)
        told = long if long.get("s") else short
        lines.append(
            [
                way,
                *(text for row in (short, long) for text in (outcome(row), gib(row, "reserved_bytes"))),
                seconds_to_first(told, ".1f"),
                gib(told, "rss_bytes"),
                _YES[told.get("same_bytes")],
            ]
        )
    heads = (
        "", "5 frames, s (of its floor)", "reserved, GiB", "81 frames", "reserved, GiB", "load to first result, s",
        "RAM, GiB", "same bytes",
    )  # fmt: skip
    return table_of(heads, lines)


def _budgets(name: str = "suite", frames: int = 5) -> str:
    """A pass of Wan 14B by what stays on the device.

    The floor is the longer of the pass of the same sweep with the most of it there, and of the bytes on the link.
    """
    rows = [row for row in rows_of(name) if row.get("case") == "budgets" and row["subject"].endswith(f"x{frames}")]
    sweeps: dict[str, dict[str, Row]] = {}
    for row in rows:
        level, share = row["way"].removesuffix(" resident").rsplit(" ", 1)
        sweeps.setdefault(level, {})[share] = row
    lines = []
    for share in dict.fromkeys(share for sweep in sweeps.values() for share in sweep):
        lines.append([share])
        for sweep in sweeps.values():
            lines[-1] += _stayed(sweep.get(share), list(sweep.values())[-1])
    heads = [
        f"{level.removeprefix('vramkit ')}: {what}" for level in sweeps for what in ("peak, GiB", "moved, GiB", "s")
    ]
    return table_of(("weights that stay", *heads), lines)


def _stayed(row: Row | None, most: Row) -> list[str]:
    """Peak, bytes moved and seconds of a row of a sweep, beside the row of it with the most that stays."""
    if row is None:
        return ["", "", ""]
    beside = row["s"] / floor_s(row, most)
    return [gib(row, "allocated_bytes"), gib(row, "moved_bytes"), f"{row['s']:.3f} ({beside:.2f})"]


def _fits() -> str:
    """Clips and pictures in a budget that the allocator is held to, from ``suite.json``, beside what plans predicted."""
    own = [("", row) for row in rows_of("suite")] + [(", H200", row) for row in rows_of("suite-h200")]
    lines = []
    for card, row in own:
        if row.get("case") not in ("clip", "foreign") or row.get("way") != "vramkit fit":
            continue
        lines.append(
            [
                row["subject"] + card,
                row["machine"].removeprefix("card "),
                seconds(row, ".3f", ".3f"),
                f"{gib(row, 'predicted_denoise_bytes')}, {gib(row, 'allocated_bytes')}",
                row.get("decoded") or "",
                figure(row, "decode_s", ".1f"),
                f"{gib(row, 'predicted_decode_bytes')}, {gib(row, 'decode_allocated_bytes')}",
                _YES[row.get("same_bytes")],
            ]
        )
    heads = (
        "", "budget", "step, s (of its floor)", "peak of steps predicted, measured, GiB", "decode", "s",
        "peak of decode predicted, measured, GiB", "latents of the resident run",
    )  # fmt: skip
    return table_of(heads, lines)


def _decodes(name: str = "suite") -> str:
    """Ways to decode a clip: seconds as a share of the whole decode, and the peak."""
    lines = [
        [
            row["subject"],
            row["way"],
            seconds(row, ".2f", ".3f"),
            gib(row, "allocated_bytes"),
            figure(row, "relative", ".1g"),
        ]
        for row in rows_of(name)
        if row.get("case") == "decode"
    ]
    heads = ("", "", "s (of the whole decode)", "peak, GiB", "distance to the whole decode")
    return table_of(heads, lines)


def _ways(case: str, subject: str) -> str:
    """Ways to run one model, from ``suite-h200.json``."""
    lines = [
        [
            row["way"],
            outcome(row),
            gib(row, "allocated_bytes"),
            figure(row, "setup_s", ".1f"),
            gib(row, "rss_bytes"),
            _YES[row.get("same_bytes")],
        ]
        for row in rows_of("suite-h200")
        if row.get("case") == case and row.get("subject") == subject
    ]
    return table_of(("", "s (of its floor)", "peak, GiB", "set-up, s", "RAM, GiB", "same bytes"), lines)


def _cards() -> str:
    """Who finishes on which emulated card, from ``suite.json``: seconds, or that there is no room; nothing if not tried."""
    rows = [row for row in rows_of("suite") if row.get("case") == "cards"]
    machines = sorted({row["machine"] for row in rows}, key=lambda name: -float(name.split(" ")[1]))
    lines = []
    for subject, way in dict.fromkeys((row["subject"], row["way"]) for row in rows):
        own = [row_of("suite", case="cards", subject=subject, way=way, machine=machine) for machine in machines]
        lines.append([f"{way}, model of {subject.split(' ')[1]}", *map(_finished, own)])
    return table_of(("", *(machine.removeprefix("card ") for machine in machines)), lines)


def _finished(row: Row) -> str:
    """Tell the seconds on a card, or that it has no room, or no result in time, or that something else went wrong."""
    error = row.get("error", "")
    if any(name in error for name in ("OutOfMemory", "out of memory", "PlanInfeasible")):
        return "no room"
    if error.startswith("not done"):
        return "not done"
    return "failed" if error else figure(row, "s", ".2f")


def _links() -> str:
    """A pass over emulated links, from ``suite.json``, and what the emulation gave where the link alone was asked."""
    lines = []
    for row in rows_of("suite"):
        if row.get("case") != "links" or row["subject"] == "check":
            continue
        check = row_of("suite", case="links", subject="check", machine=row["machine"])
        name = row["machine"].removeprefix("link ")
        asked, given = (figure(check, key, ".1f") for key in ("asked_gbps", "gbps"))
        lines.append([name, f"{asked}, {given}", row["way"], seconds(row), _YES[row.get("same_bytes")]])
    return table_of(("link", "GB/s asked, given", "", "s (of its floor)", "same bytes"), lines)


def _ram() -> str:
    """A pass with so much RAM left, weights in files on a disk, from ``suite.json``."""
    rows = [row for row in rows_of("suite") if row.get("case") == "ram"]
    lines = []
    for row in sorted(rows, key=lambda row: -row["options"]["left_bytes"]):
        peer = row.get("peer", {})
        lines.append(
            [
                row["machine"].removeprefix("RAM "),
                row["way"],
                outcome(row),
                gib(peer, "locked_bytes"),
                gib(peer.get("stores", {}), "pageable"),
                seconds_to_first(row, ".0f"),
                gib(row, "allocated_bytes"),
                _YES[row.get("same_bytes")],
            ]
        )
    heads = (
        "RAM left", "", "s (of its floor)", "page-locked, GiB", "read in each pass, GiB", "load to first result, s",
        "peak, GiB", "same bytes",
    )  # fmt: skip
    return table_of(heads, lines)


def _again() -> str:
    """Rows that were measured a second time, on another machine of the kind: seconds, and what is claimed of them."""
    lines = []
    for name, again in _AGAIN.items():
        for row in rows_of(again):
            first = row_of(name, **{key: row[key] for key in KEY})
            lines.append(
                [
                    " ".join(filter(None, (row[key] for key in KEY))),
                    f"{first['s']:.3f}, {row['s']:.3f}",
                    f"{row['s'] / first['s'] - 1:+.1%}",
                    ", ".join(f"{each['ratio']:.3f}" for each in (first, row) if each.get("ratio")),
                    _YES[first["digest"] == row["digest"] if "digest" in row else None],
                ]
            )
    return table_of(("", "s, first and again", "differs by", "of its floor", "same bytes"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "wan14b": wan14b,
    "quantized": functools.partial(_quantized, "suite-h200", 81),
    "quantized-5": functools.partial(_quantized, "suite-h200", 5),
    "families": families,
    "guide": _guide,
    "growth": growth,
    "adapters": adapters,
    "applying": applying,
    "loading": loading,
    "loaders": loaders,
    "peers": _peers,
    "budgets": _budgets,
    "budgets-33": functools.partial(_budgets, "suite-h200", 33),
    "ways": functools.partial(_ways, "forward", "wan-14b diffusers bf16 832x480x5"),
    "encodes": functools.partial(_ways, "encode", "umt5-xxl transformers bf16 512 tokens"),
    "cards": _cards,
    "links": _links,
    "ram": _ram,
    "fits": _fits,
    "again": _again,
    "decodes": _decodes,
    "decodes-h200": functools.partial(_decodes, "suite-h200"),
}
