"""``python -m benchmarks``: measure rows and put them into a file of results.

    python -m benchmarks --list                                   # the keys of all rows
    python -m benchmarks --case forward --peer vramkit,diffusers --match "wan-14b 832x480x81"
    python -m benchmarks --case cards --folder /dev/shm/weights --minutes 9
    python -m benchmarks --smoke                                  # tiny, on the CPU, into smoke.json

Rows that the file has already, of the same machine, versions and allocator, are measured again; ``--missing`` leaves
those out, so that a long list is worked off by several commands. Everything on the device is always measured before
what is compared with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.numbers import above_nothing, at_least_one
from benchmarks.rows import Results, Row, Setting, key_of
from benchmarks.runner import CASES, run
from benchmarks.selection import missing, settings_of, with_references
from vramkit.offload.config import usable_device

OUT = Path("benchmarks/results/suite.json")
SMOKE_OUT = Path("smoke.json")  # tiny shapes shall not take the place of what was measured
_ALLOCATOR = "expandable_segments:True"  # reserved stays close to allocated; for everybody alike


def measured(
    settings: Sequence[Setting], bench: Bench, results: Results, run_of: Row, *, out: Path, minutes: float | None = None
) -> int:
    """Measure settings one by one, each in its process, and write the file after each; returns how many were left over."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": run_of["allocator"], "TQDM_DISABLE": "1"}
    ends = float("inf") if minutes is None else time.monotonic() + minutes * 60
    for done, setting in enumerate(settings):
        began = time.monotonic()
        limit = min(setting.timeout_s, ends - began)
        if limit <= 0:
            return len(settings) - done
        rows = run(setting, bench, environment=environment, timeout_s=limit)
        took = time.monotonic() - began
        if limit < setting.timeout_s and took >= limit:
            return len(settings) - done  # it was not given its time, which says nothing about it
        results.add(rows, run_of)
        results.write(out)
        for row in rows:
            print(f"[{done + 1}/{len(settings)}] {took:.0f} s  {_line(row)}", flush=True)
    return 0


def _line(row: Row) -> str:
    figures = {"s": row.get("s"), "allocated_bytes": row.get("allocated_bytes"), "error": row.get("error")}
    told = "  ".join(f"{name}={value}" for name, value in figures.items() if value is not None)
    return f"{' | '.join(filter(None, key_of(row)))}  {told}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default=",".join(CASES), help="of: " + ", ".join(CASES))
    parser.add_argument("--peer", default="", help="libraries; what is resident is always measured (default: all)")
    parser.add_argument("--match", default="", help="words that must be in the key of a row")
    parser.add_argument("--list", action="store_true", help="list the rows, measure nothing")
    parser.add_argument("--missing", action="store_true", help="leave out rows that the file has")
    parser.add_argument("--minutes", type=above_nothing, help="end after so long; what is left over is said")
    parser.add_argument(
        "--row-s", type=above_nothing, default=float("inf"), help="end a row after so long; it is an error then"
    )
    parser.add_argument(
        "--out", type=Path, help=f"JSON file; rows of other keys stay in it (default: {OUT}, with --smoke {SMOKE_OUT})"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: RAM or a temporary folder)")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--warm-up-s", type=float, default=1.5, help="seconds of calls that are not counted")
    parser.add_argument("--device", default="", help="default: cuda:0")
    parser.add_argument("--allocator", default=_ALLOCATOR, help="PYTORCH_CUDA_ALLOC_CONF of every process")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns 2 if `--minutes` left something over, else 0."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        settings = _settings(args)
        if args.list:
            for setting in settings:
                print(" | ".join(filter(None, key_of(setting.key))))
            return 0
        if args.device or not args.smoke:
            usable_device(args.device or "cuda:0", "--device")
        out = args.out or (SMOKE_OUT if args.smoke else OUT)
        results, folder = Results.kept_in(out), args.folder and _folder(args.folder)
    except ValueError as error:
        parser.error(str(error))
    where = None if args.smoke or folder else _roomy()
    with tempfile.TemporaryDirectory(prefix="vramkit-benchmarks-", dir=where) as temporary:
        left = _measured(settings, results, args, out=out, folder=folder or Path(temporary))
    if left:
        print(f"{left} rows are left: the same command with --missing goes on")
    return 2 if left else 0


def _settings(args: argparse.Namespace) -> list[Setting]:
    """Return the rows that are asked for; ValueError where there are none."""
    peers, words = tuple(filter(None, args.peer.split(","))), args.match.split()
    found = list(settings_of(args.case.split(","), _scale(args), peers=peers, words=words))
    if not found:
        raise ValueError(
            f"no row has --case {args.case}, --peer {args.peer!r} and --match {args.match!r}; --list names all"
        )
    return [dataclasses.replace(setting, timeout_s=min(setting.timeout_s, args.row_s)) for setting in found]


def _measured(settings: list[Setting], results: Results, args: argparse.Namespace, *, out: Path, folder: Path) -> int:
    """Measure what is asked for; returns how many rows were left over."""
    from benchmarks.measure import environment
    from benchmarks.peers import versions

    scale = _scale(args)
    bench = Bench(folder=folder, scale=scale, repeats=args.repeats, warm_up_s=args.warm_up_s, device_name=args.device)
    # With the settings of the processes: what is asked of torch here has to be the same there.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = args.allocator
    run_of = environment(allocator=args.allocator, scale=scale, peers=versions())
    run_of |= {"repeats": args.repeats, "warm_up_s": args.warm_up_s, "command_device": args.device}
    if args.missing:
        settings = missing(settings, results, run_of)
    settings = with_references(settings, scale, results, run_of)
    return measured(settings, bench, results, run_of, out=out, minutes=args.minutes)


def _scale(args: argparse.Namespace) -> str:
    return "smoke" if args.smoke else "full"


def _roomy() -> Path | None:
    from benchmarks.checkpoints import room_for

    return room_for(30 * 10**9)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--folder {path} cannot be made: {error}") from error
    return path


if __name__ == "__main__":
    raise SystemExit(main())
