"""The tests of a CUDA device, and what came of them.

    python -m benchmarks.gpu_tests                                 # all of them
    python -m benchmarks.gpu_tests --memcheck compute-sanitizer    # few, with every access to memory checked

Many processes share the card, but for the tests that read how much of it is free. Under NVIDIA's compute-sanitizer they work
without torch's cache of memory: each tensor is an allocation of its own then, and an access beside it or after its end an
error. Counts and the machine that they hold for go into results/gpu_tests.json, each kind of run into its row. Exits
with 1 if a test failed or an error was found.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.numbers import at_least_one
from benchmarks.rows import Results, Row

OUT = Path("benchmarks/results/gpu_tests.json")
_TESTS = ("tests/gpu", "tests/offload", "tests/test_memory.py")
_PARTS = {"together": "gpu and not alone", "alone": "gpu and alone"}
# Where the engine writes to slots while kernels read, and where bytes are unpacked by indices. None that measures memory
# (nothing is counted without the cache), and none that compiles, as quanto does when it is used first (it takes minutes, and
# the kernels are not ours).
_CHECKED = (
    "tests/gpu/test_engine.py::test_three_forwards_are_the_same_bytes_as_resident",
    "tests/gpu/test_engine.py::test_delays_on_the_device_change_no_byte",
    "tests/gpu/test_engine.py::test_random_orders_change_no_byte",
    "tests/gpu/test_engine.py::test_tables_are_looked_up_where_they_rest",
    "tests/gpu/test_budgets.py::test_slots_change_hands_while_copies_and_kernels_are_slow",
    "tests/gpu/test_merged_weights.py::test_streamed_is_resident",
    "tests/gpu/test_quant.py::test_streamed_bytes_are_resident_bytes_in_less_memory",
    "tests/gpu/test_fp8_compute.py::test_products_are_those_of_the_narrow_numbers",
    "tests/gpu/test_fp8_compute.py::test_streamed_is_the_same_bytes_as_resident",
)
# Errors of calls are left out: the engine asks the driver for what it may refuse, and takes another way then. No stacks of
# the host either: for those of Python it waits for the interpreter while threads that have it wait for the driver.
_MEMCHECK = (
    "--tool", "memcheck", "--target-processes", "application-only", "--report-api-errors", "no", "--show-backtrace", "no",
)  # fmt: skip
_PYTEST = (
    sys.executable, "-m", "pytest", "-q", "-rfE", "--thorough", "-o", "addopts=", "-p", "no:benchmark",
    "-p", "no:cacheprovider",
)  # fmt: skip
# The process of a test that hangs ends, and tells where each of its threads is, also if none of them lets Python run.
_ENDING = ("-v", "--timeout", "0", "-o", "faulthandler_timeout=60", "-o", "faulthandler_exit_on_timeout=true")


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """Yield every test of a report in JUnit's format, and whether it passed, failed or was skipped."""
    for case in ET.parse(report).iter("testcase"):
        ends = {child.tag for child in case} & {"failure", "error", "skipped"}
        end = "skipped" if ends == {"skipped"} else "failed" if ends else "passed"
        yield f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}", end


def summary(reports: list[Path], seconds: float, names: Iterable[str] = ()) -> Row:
    """Count what the reports hold, and name the tests that failed; those of `names` that no report has failed too."""
    found = [each for report in reports for each in outcomes(report)]
    found += [(name, "failed") for name in sorted({*names} - {name for name, _ in found})]
    counts = collections.Counter(end for _, end in found)
    return {
        "tests": len(found),
        **{end: counts[end] for end in ("passed", "failed", "skipped")},
        "seconds": round(seconds, 1),
        "failures": ", ".join(sorted(name for name, end in found if end == "failed")),
    }


def few(names: Iterable[str]) -> list[str]:
    """Return some cases of each test that together have each value of each parameter."""
    names, seen, chosen = sorted(names), set[tuple[str, int, str]](), []
    for name in random.Random(0).sample(names, len(names)):  # mixed: neighbours differ in one parameter only
        test, _, values = name.removesuffix("]").partition("[")
        new = {(test, at, value) for at, value in enumerate(values.split("-"))} - seen
        if new:
            seen |= new
            chosen.append(name)
    return sorted(chosen)


def errors_in(log: str) -> int:
    """Return how many errors compute-sanitizer counted.

    Raises:
        RuntimeError: it did not come to counting.
    """
    found = re.search(r"ERROR SUMMARY: (\d+) errors?$", log, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"compute-sanitizer counted nothing; its last words: {log.strip()[-500:]}")
    return int(found[1])


def whole(processes: int) -> Row:
    """Run all tests in many processes, and those that want to be alone in one."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{part}.xml" for part in _PARTS]
        for report, (part, marks) in zip(reports, _PARTS.items(), strict=True):
            spread = ["-n", str(processes), "--dist", "worksteal"] if part == "together" else []
            command = [*_PYTEST, *spread, "--timeout", "240", "-m", marks, *_TESTS]
            subprocess.run([*command, f"--junitxml={report}"], check=False)
        return summary(reports, time.monotonic() - start)


def memchecked(sanitizer: str, processes: int) -> Row:
    """Run few tests under compute-sanitizer's memcheck, in a few processes that share them.

    Raises:
        RuntimeError: it did not come to counting. OSError: it cannot be started.
    """
    listed = subprocess.run([*_PYTEST, "--collect-only", *_CHECKED], check=True, stdout=subprocess.PIPE, text=True)
    names = few(line for line in listed.stdout.splitlines() if "::" in line and "quanto" not in line)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        shares = [names[at::processes] for at in range(min(processes, len(names)))]
        reports = [Path(folder) / f"{at}.xml" for at in range(len(shares))]
        errors = sum(pool.map(_memchecked, [sanitizer] * len(shares), shares, reports))
        written = [report for report in reports if report.exists()]  # the process of a test that hangs ends without
        return summary(written, time.monotonic() - start, names) | {"errors": errors}


def _memchecked(sanitizer: str, names: list[str], report: Path) -> int:
    log = report.with_suffix(".log")
    command = [sanitizer, *_MEMCHECK, "--error-exitcode", "9", "--log-file", str(log)]
    command += [*_PYTEST, *_ENDING, f"--junitxml={report}", *names]
    subprocess.run(command, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    text = log.read_text(errors="replace") if log.exists() else ""
    errors = errors_in(text)
    if errors:
        print(text)
    return errors


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> int:
    """Run them; returns 1 if one failed, if there was none, or if an error was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=at_least_one, default=10, help="that share the device (default: 10)")
    parser.add_argument("--memcheck", metavar="PATH", help="of compute-sanitizer, to run few tests under it")
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file (default: {OUT})")
    args = parser.parse_args(arguments)
    from benchmarks.measure import environment

    try:
        if not _has_device():
            raise ValueError("this machine has no CUDA device, so that all of them would be left out")
        Results.kept_in(args.out, title="gpu_tests")
    except ValueError as error:
        parser.error(str(error))
    kind = "memcheck" if args.memcheck else "whole"
    found = {"run_of": kind} | (memchecked(args.memcheck, args.processes) if args.memcheck else whole(args.processes))
    results = Results.of(args.out, title="gpu_tests")
    results.rows = [row for row in results.rows if row.get("run_of", "whole") != kind]
    results.add([found], environment())
    results.write(args.out)
    print(found)
    return 0 if found["passed"] and not found["failed"] and not found.get("errors") else 1


if __name__ == "__main__":
    raise SystemExit(main())
