"""Running kinds of faults and counting what came of them, in this process or in several."""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import pkgutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.faults import BROKEN
from benchmarks.faults._cases import prepare
from benchmarks.measure import environment
from benchmarks.numbers import at_least_one
from benchmarks.rows import Results, Row

_WHAT = """Run kinds of faults by name, or all, and keep their counts in benchmarks/results/faults.json.

    python -m benchmarks.faults                        all kinds, each as often as a full run does
    python -m benchmarks.faults headers --count 500    one kind, 500 cases of it

Ends with 1 where a case was broken. The counts of kinds that did not run stay in the file as they were.
"""
RESULTS = Path(__file__).parents[1] / "results" / "faults.json"


def kinds() -> list[str]:
    """Return the names of the files here that hold a kind of fault."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if not name.startswith("_"))


def tried(kind: str, count: int | None, seed: int, jobs: int = 1) -> Row:
    """Run one kind and return its row: what was tried, how long it took, how many ended how.

    Each of several `jobs` is a process with a seed of its own, from `seed` on, and its share of the cases.
    """
    count = _module(kind).COUNT if count is None else count
    start = time.perf_counter()
    outcomes = Counter({BROKEN: 0})
    if jobs == 1:
        outcomes.update(_counted(kind, count, seed))
    else:
        shares = [count * (job + 1) // jobs - count * job // jobs for job in range(jobs)]
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(_counted, [kind] * jobs, shares, range(seed, seed + jobs)):
                outcomes.update(found)
    seconds = round(time.perf_counter() - start, 1)
    return {"kind": kind, "count": count, "seed": seed, "jobs": jobs, "seconds": seconds, "outcomes": dict(outcomes)}


def _module(kind: str) -> Any:
    return importlib.import_module(f"benchmarks.faults.{kind}")


def _counted(kind: str, count: int, seed: int) -> dict[str, int]:
    """Run cases of one kind in this process."""
    module = _module(kind)
    prepare()
    try:
        counts: dict[str, int] = module.run(count, seed)
    finally:
        gc.unfreeze()
    return counts


def main(arguments: Sequence[str] | None = None) -> dict[str, Row]:
    """Run what was asked for; print and keep the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=_WHAT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds())}")
    parser.add_argument("--count", type=at_least_one, help="cases of each kind; each kind's own number if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=at_least_one, default=1, help="processes of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(kinds()):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(kinds())}")
    try:
        Results.kept_in(options.out, title="faults")
    except ValueError as error:
        parser.error(str(error))
    rows: dict[str, Row] = {}
    for kind in options.kinds or kinds():
        rows[kind] = tried(kind, options.count, options.seed, options.jobs)
        counts = ", ".join(f"{number} {outcome}" for outcome, number in rows[kind]["outcomes"].items())
        print(f"{kind}: {rows[kind]['count']} tried in {rows[kind]['seconds']} s: {counts}", flush=True)
        results = Results.of(options.out, title="faults")
        results.add([rows[kind]], environment())
        results.write(options.out)
    return rows
