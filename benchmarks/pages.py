"""Tables of README and docs, made from files of results: each between ``<!-- results: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.rows import Results, Row, compared, floor_s

__all__ = ["PAGES", "TABLES", "rendered"]

PAGES = tuple(Path(__file__).parents[1] / name for name in ("README.md", "docs/figures.md"))
_RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_GIB = 2**30
_YES = {True: "yes", False: "no", None: ""}


def rendered(text: str) -> str:
    """Return the text of a page with the tables between its marks made anew.

    Raises:
        KeyError: a mark names a table that there is not.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    first, *rest = ["|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in (heads, *lines)]
    return "\n".join([first, "|" + "---|" * len(heads), *rest])


@functools.cache
def _rows(name: str) -> tuple[Row, ...]:
    return tuple(compared(Results.read(_RESULTS / f"{name}.json")))


def _found(name: str, **wanted: object) -> Row:
    """Return the one row of a file with these values, or an empty one."""
    found = [row for row in _rows(name) if all(row.get(key) == value for key, value in wanted.items())]
    return found[0] if found else {}


def _figure(row: Row, name: str, form: str) -> str:
    if row.get(name) is None:
        return ""
    text = format(row[name], form)
    return text.lstrip("-") if float(text) == 0 else text


def _gib(row: Row, name: str) -> str:
    """A size of a row in GiB."""
    return f"{row[name] / _GIB:.2f}" if row.get(name) else ""


def _seconds(row: Row, form: str = ".3f", ratio: str = ".2f", name: str = "s") -> str:
    """Seconds, and how often their floor they are."""
    times = f" ({row['ratio']:{ratio}})" if row.get("ratio") else ""
    return _figure(row, name, form) + times


def _wan14b() -> str:
    names = {
        "diffusers, resident": "resident diffusers",
        "diffusers, block + stream": "diffusers block + stream",
        "diffusers, leaf + stream": "diffusers leaf + stream",
        "vramkit, block, diffusers' module": "block, diffusers' module",
        "vramkit, leaf, diffusers' module": "leaf, diffusers' module",
        "vramkit, leaf, vramkit's module": "leaf, our module",
        "the same, blocks compiled, block level": "block, our module compiled",
        "the same, fp8 storage, block level": "block, our module in fp8",
    }
    lines = []
    for label, case in names.items():
        at = {frames: _found("wan14b", case=case, shape=f"480p f{frames}") for frames in (5, 33, 81)}
        ready = _figure(at[81], "ready_s", ".1f")
        lines.append(
            [label, *map(_seconds, at.values()), _figure(at[81], "reserved_gib", "#.3g"), f"{ready} s" if ready else ""]
        )
    heads = (
        "", "5 frames, s (of its floor)", "33 frames", "81 frames", "reserved at 81 frames, GiB", "ready after",
    )  # fmt: skip
    return _table(heads, lines)


def _quant14b() -> str:
    names = {
        "diffusers, nf4, leaf + stream": "diffusers-nf4",
        "vramkit, nf4, leaf": "ours-nf4",
        "diffusers, fp8 casting, resident": "diffusers-fp8",
        "vramkit, fp8 storage, leaf": "ours-fp8",
        "vramkit, fp8 products, leaf": "ours-fp8-mm",
    }
    lines = []
    for label, case in names.items():
        resident = {frames: _found("quant14b", case=f"{case} resident", frames=frames) for frames in (5, 81)}
        streamed = {frames: _found("quant14b", case=f"{case} leaf level", frames=frames) for frames in (5, 81)}
        reserved = [_figure(row, "reserved_gib", "#.3g") for row in (resident[81], streamed[81])]
        lines.append(
            [
                label,
                _seconds(resident[5]),
                _seconds(streamed[5]),
                _seconds(resident[81]),
                _seconds(streamed[81]),
                ", ".join(filter(None, reserved)),
                _figure(resident[81], "forward_db", ".0f"),
            ]
        )
    heads = (
        "", "resident, 5 frames", "streamed, s (of its floor)", "resident, 81 frames", "streamed, s (of its floor)",
        "reserved, resident and streamed", "dB",
    )  # fmt: skip
    return _table(heads, lines)


def _families() -> str:
    names = {
        "HunyuanVideo, 1280x720, 129 frames": "hunyuan",
        "CogVideoX-5B, 720x480, 49 frames": "cogvideox-5b",
        "CogVideoX-2B, 720x480, 49 frames": "cogvideox-2b",
        "LTX-Video, 768x512, 161 frames": "ltx",
    }
    lines = []
    for label, family in names.items():
        resident = _found("families", family=family, case="transformer resident")
        row = _found("families", family=family, case="streamed, tiled decode")
        weights = _figure(resident, "weights_gib", ".1f")
        lines.append(
            [
                f"{label} ({weights} GiB of weights)" if weights else label,
                _seconds(row, ".4g", ".3f", "step_s"),
                _figure(row, "step_gib", ".2f"),
                _figure(row, "decode_s", ".1f"),
                _figure(row, "decode_gib", ".2f"),
                f"{_figure(row, 'cap_gib', '.0f')} GiB",
            ]
        )
    heads = (
        "", "step, s (of its floor)", "peak of steps, GiB", "decode, s", "peak of decode, GiB", "ran under a cap of",
    )  # fmt: skip
    return _table(heads, lines)


def _guide() -> str:
    names = {"everything on the device": "resident", "diffusers": "diffusers guide", "vramkit": "vramkit guide"}
    lines = []
    for label, way in names.items():
        row = _found("suite", case="guide", way=way)
        peaks = [_gib(row, f"{phase}_allocated_bytes") for phase in ("encode", "steps", "decode")]
        reserved = [_gib(row, f"{phase}_reserved_bytes") for phase in ("encode", "steps", "decode")]
        lines.append(
            [
                label,
                _figure(row, "setup_s", ".1f"),
                _figure(row, "encode_s", ".2f"),
                _figure(row, "s", ".2f"),
                _figure(row, "decode_s", ".2f"),
                ", ".join(filter(None, peaks)),
                ", ".join(filter(None, reserved)),
                _gib(row, "ram_taken_bytes"),
            ]
        )
    heads = (
        "", "set-up, s", "encode, s", "step, s", "decode, s", "peak of encode, steps, decode, GiB", "reserved, GiB",
        "RAM taken, GiB",
    )  # fmt: skip
    return _table(heads, lines)


def _loaders() -> str:
    names = {
        "diffusers' `from_pretrained`": "from_pretrained",
        "`safetensors.torch.load_file`, assigned": "load_file_assigned",
        "`torch.load(mmap=True)`, assigned": "torch_load_mapped",
        "`load_mapped`": "mapped",
        "constructed in memory": "constructed",
    }
    lines = []
    for label, loader in names.items():
        row = _found("loaders", loader=loader)
        lines.append(
            [
                label,
                _figure(row, "ready_s", ".1f"),
                _figure(row, "grown_gib", ".1f"),
                ", ".join(row.get("stores", {})),
                _figure(row, "steady_s", ".3f"),
            ]
        )
    return _table(("loaded by", "ready after, s", "memory it took, GiB", "rests", "forward, s"), lines)


def _peers() -> str:
    """Every way on the transformer of diffusers, from ``suite.json``: seconds, memory, set-up; errors as they are."""
    shapes = [f"wan-14b diffusers bf16 832x480x{frames}" for frames in (5, 81)]
    rows = [row for row in _rows("suite") if row.get("case") == "forward" and row.get("subject") in shapes]
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        short, long = (_found("suite", case="forward", subject=subject, way=way) for subject in shapes)
        told = long if long.get("s") else short
        setup = sum(told.get(name) or 0 for name in ("load_s", "setup_s", "first_s"))
        lines.append(
            [
                way,
                *(text for row in (short, long) for text in (_outcome(row), _gib(row, "reserved_bytes"))),
                f"{setup:.1f}" if setup else "",
                _gib(told, "rss_bytes"),
                _YES[told.get("same_bytes")],
            ]
        )
    heads = (
        "", "5 frames, s (of its floor)", "reserved, GiB", "81 frames", "reserved, GiB", "load to first result, s",
        "RAM, GiB", "same bytes",
    )  # fmt: skip
    return _table(heads, lines)


def _outcome(row: Row) -> str:
    """Tell the seconds, or why there are none."""
    error = row.get("error")
    return error[:80].replace("|", "/") if error else _seconds(row)


def _budgets() -> str:
    """A pass of Wan 14B by what stays on the device, from ``suite.json``.

    The floor is the longer of the pass of the same sweep with all of it there, and of the bytes on the link.
    """
    rows = [row for row in _rows("suite") if row.get("case") == "budgets" and row["subject"].endswith("x5")]
    sweeps: dict[str, dict[str, Row]] = {}
    for row in rows:
        level, share = row["way"].removesuffix(" resident").rsplit(" ", 1)
        sweeps.setdefault(level, {})[share] = row
    lines = []
    for share in next(iter(sweeps.values()), {}):
        lines.append([share])
        for sweep in sweeps.values():
            row = sweep[share]
            lines[-1] += [
                _gib(row, "allocated_bytes"),
                _gib(row, "moved_bytes"),
                f"{row['s']:.3f} ({row['s'] / floor_s(row, sweep['100%']):.2f})",
            ]
    heads = [
        f"{level.removeprefix('vramkit ')}: {what}" for level in sweeps for what in ("peak, GiB", "moved, GiB", "s")
    ]
    return _table(("weights that stay", *heads), lines)


def _fits() -> str:
    """Clips and pictures in a budget that the allocator is held to, from ``suite.json``, beside what plans predicted."""
    lines = []
    for row in _rows("suite"):
        if row.get("case") not in ("clip", "foreign") or row.get("way") != "vramkit fit":
            continue
        lines.append(
            [
                row["subject"],
                row["machine"].removeprefix("card "),
                _seconds(row, ".3f", ".3f"),
                f"{_gib(row, 'predicted_denoise_bytes')}, {_gib(row, 'allocated_bytes')}",
                row.get("decoded") or "",
                _figure(row, "decode_s", ".1f"),
                f"{_gib(row, 'predicted_decode_bytes')}, {_gib(row, 'decode_allocated_bytes')}",
                _YES[row.get("same_bytes")],
            ]
        )
    heads = (
        "", "budget", "step, s (of its floor)", "peak of steps predicted, measured, GiB", "decode", "s",
        "peak of decode predicted, measured, GiB", "latents of the resident run",
    )  # fmt: skip
    return _table(heads, lines)


def _decodes() -> str:
    """Ways to decode a clip, from ``suite.json``: seconds as a share of the whole decode, and the peak."""
    lines = [
        [
            row["subject"],
            row["way"],
            _seconds(row, ".2f", ".3f"),
            _gib(row, "allocated_bytes"),
            _figure(row, "relative", ".1g"),
        ]
        for row in _rows("suite")
        if row.get("case") == "decode"
    ]
    heads = ("", "", "s (of the whole decode)", "peak, GiB", "distance to the whole decode")
    return _table(heads, lines)


def _cards() -> str:
    """Who finishes on which emulated card, from ``suite.json``: seconds, or that there is no room; nothing if not tried."""
    rows = [row for row in _rows("suite") if row.get("case") == "cards"]
    machines = sorted({row["machine"] for row in rows}, key=lambda name: -float(name.split(" ")[1]))
    lines = []
    for subject, way in dict.fromkeys((row["subject"], row["way"]) for row in rows):
        own = [_found("suite", case="cards", subject=subject, way=way, machine=machine) for machine in machines]
        lines.append([f"{way}, model of {subject.split(' ')[1]}", *map(_finished, own)])
    return _table(("", *(machine.removeprefix("card ") for machine in machines)), lines)


def _finished(row: Row) -> str:
    """Tell the seconds on a card, or that it has no room, or that something else went wrong."""
    error = row.get("error", "")
    if any(name in error for name in ("OutOfMemory", "out of memory", "PlanInfeasible")):
        return "no room"
    return "failed" if error else _figure(row, "s", ".2f")


def _links() -> str:
    """A pass over emulated links, from ``suite.json``, and what the emulation gave where the link alone was asked."""
    lines = []
    for row in _rows("suite"):
        if row.get("case") != "links" or row["subject"] == "check":
            continue
        check = _found("suite", case="links", subject="check", machine=row["machine"])
        name = row["machine"].removeprefix("link ")
        asked, given = (_figure(check, key, ".1f") for key in ("asked_gbps", "gbps"))
        lines.append([name, f"{asked}, {given}", row["way"], _seconds(row), _YES[row.get("same_bytes")]])
    return _table(("link", "GB/s asked, given", "", "s (of its floor)", "same bytes"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "wan14b": _wan14b,
    "quant14b": _quant14b,
    "families": _families,
    "guide": _guide,
    "loaders": _loaders,
    "peers": _peers,
    "budgets": _budgets,
    "cards": _cards,
    "links": _links,
    "fits": _fits,
    "decodes": _decodes,
}
