"""Tables and plots from files of results: ``python -m benchmarks.report [FILE.json ...]``.

Without files: all of ``benchmarks/results``, and the tables and pictures of README and docs that are made from them. Each
``NAME.json`` gets ``NAME.md`` beside it, and pictures where there is something to draw. ``--check`` changes nothing and
tells what is not as the files say.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import PAGES, rendered
from benchmarks.rows import Results, Row, compared

__all__ = ["cell", "report", "table", "tables"]

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
_GIB = 2**30
# Of rows that this suite wrote, in this order; what no row of a case has is no column of it.
_COLUMNS = (
    "subject",
    "way",
    "machine",
    "s",
    "slowest_s",
    "floor_s",
    "ratio",
    "same_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "setup_allocated_bytes",
    "held_bytes",
    "rss_bytes",
    "anonymous_bytes",
    "pinned_bytes",
    "grown_bytes",
    "moved_bytes",
    "gbps",
    "link_gbps",
    "link_share",
    "load_s",
    "setup_s",
    "first_s",
    "remove_s",
    "switch_s",
    "predicted_denoise_bytes",
    "decode_s",
    "decode_allocated_bytes",
    "predicted_decode_bytes",
    "waited_for_s",
    "resident_s",
    "encode_s",
    "forward_s",
    "plain_forward_s",
    "load_adapter_s",
    "groups",
    "per_group_us",
    "graphs",
    "recompiles",
    "asked_gbps",
    "plain_gbps",
    "off_by",
    "relative",
    "db",
    "weights_db",
    "worst_layer_db",
    "forward_db",
    "bytes_ratio",
    "joules",
    "is_capped",
    "is_finite",
    "is_unchanged",
    "error",
)
_TITLES = {
    "forward": "One forward of a transformer",
    "compiled": "Forwards with compiled blocks",
    "quantized": "Forwards with quantized weights",
    "encode": "Text encoders",
    "decode": "Decodes",
    "clip": "Whole clips: a step",
    "foreign": "Pipelines of diffusers: a step",
    "guide": "The first block of the video guide of diffusers",
    "loading": "From files to the first step",
    "applying": "Applying and removing",
    "lora": "Switching adapters",
    "budgets": "Time against what stays on the device",
    "cards": "Emulated cards",
    "links": "Emulated links",
    "ram": "Emulated small RAM",
    "growth": "Growth",
    "host": "What a group costs the host, copies left out",
    "planning": "Seconds of a plan",
    "quality": "What quantizing costs",
}


def cell(name: str, value: Any) -> str:
    """Print a figure: bytes as GiB, seconds and the rest with three digits behind the point."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, (int, float)) and not name.startswith("same"):
        return f"{value / _GIB:.3f}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 0.01 else f"{value:.3f}"
    if isinstance(value, dict):  # how many faults ended how
        return "; ".join(f"{each} {count:,}" for each, count in sorted(value.items())).replace("|", "/")
    return str(value).replace("|", "/")


def table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Lay rows out as a Markdown table; what a row lacks stays empty. Columns in bytes are told in GiB."""
    heads = [name.replace("_bytes", "_gib") if name != "same_bytes" else name for name in columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(column, row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _is_told(value: Any) -> bool:
    return "broken" in value if isinstance(value, dict) else not isinstance(value, list)


def tables(results: Results) -> str:
    """Return a table for each case; of files of a single benchmark one with all of their columns."""
    rows = compared(results)
    if not any("way" in row for row in rows):
        names = [name for row in rows for name, value in row.items() if _is_told(value) and name != "run"]
        return table(rows, list(dict.fromkeys(names)))
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        columns = [name for name in _COLUMNS if any(row.get(name) not in (None, "") for row in own)]
        parts.append(f"## {_TITLES.get(case, case)}\n\n{table(own, columns)}")
    return "\n\n".join(parts)


def report(results: Results, pictures: Sequence[Path] = ()) -> str:
    """Lay everything out for people: where it was measured, tables, pictures."""
    runs = []
    for number, run in enumerate(results.runs):
        facts = "".join(f"- {name}: {value}\n" for name, value in run.items())
        runs.append(facts if len(results.runs) == 1 else f"Run {number}:\n\n{facts}")
    shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    return f"# {results.title}\n\n" + "\n".join(runs) + f"\n{tables(results)}\n{shown}"


def remade(paths: Sequence[Path], pages: Sequence[Path]) -> dict[Path, str]:
    """Return what the files at these paths should be: reports beside the JSON, and the pages."""
    from benchmarks import plots

    texts: dict[Path, str] = {}
    for path in paths:
        results = Results.read(path)
        texts[path.with_suffix(".md")] = report(results, plots.pictures_of(results, path))
    texts.update((page, rendered(page.read_text(encoding="utf-8"))) for page in pages)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; returns 1 if something is not as the files say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing, tell what differs")
    args = parser.parse_args(arguments)
    paths = args.files or sorted(RESULTS.glob("*.json"))
    wrong = 0
    try:
        texts = remade(paths, () if args.files else PAGES)
    except ValueError as error:
        parser.error(str(error))
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        wrong += 1
        print(f"{path} {'is not as its figures say' if args.check else 'written'}")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    if not args.check:
        from benchmarks import plots

        drawn = [picture for path in paths for picture in plots.draw(Results.read(path), path)]
        for picture in () if args.files else drawn:
            if (IMAGES / picture.name).exists():  # a page shows it
                shutil.copyfile(picture, IMAGES / picture.name)
    return int(bool(wrong and args.check))


if __name__ == "__main__":
    raise SystemExit(main())
