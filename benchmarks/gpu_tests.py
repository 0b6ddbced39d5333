"""The tests of a CUDA device, whole, and what came of them: ``python -m benchmarks.gpu_tests``.

Many processes share the card, but for the tests that read how much of it is free. Counts and the machine that they hold for
go into results/gpu_tests.json. Exits with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.rows import Results, Row

OUT = Path("benchmarks/results/gpu_tests.json")
_TESTS = ("tests/gpu", "tests/offload", "tests/test_memory.py")
_PARTS = {"together": "gpu and not alone", "alone": "gpu and alone"}


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """Yield every test of a report in JUnit's format, and whether it passed, failed or was skipped."""
    for case in ET.parse(report).iter("testcase"):
        ends = {child.tag for child in case} & {"failure", "error", "skipped"}
        end = "skipped" if ends == {"skipped"} else "failed" if ends else "passed"
        yield f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}", end


def summary(reports: list[Path], seconds: float) -> Row:
    """Count what the reports hold, and name the tests that failed."""
    found = [each for report in reports for each in outcomes(report)]
    counts = collections.Counter(end for _, end in found)
    return {
        "tests": len(found),
        **{end: counts[end] for end in ("passed", "failed", "skipped")},
        "seconds": round(seconds, 1),
        "failures": ", ".join(sorted(name for name, end in found if end == "failed")),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run them; returns 1 if one failed, or if there was none."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=10, help="that share the device (default: 10)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file (default: {OUT})")
    args = parser.parse_args(arguments)
    from benchmarks.measure import environment

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{part}.xml" for part in _PARTS]
        for report, (part, marks) in zip(reports, _PARTS.items(), strict=True):
            spread = ["-n", str(args.processes), "--dist", "worksteal"] if part == "together" else []
            quiet = ["-q", "-rfE", "--thorough", "-o", "addopts=", "-p", "no:benchmark", "-p", "no:cacheprovider"]
            command = [sys.executable, "-m", "pytest", *quiet, *spread, "--timeout", "240", "-m", marks, *_TESTS]
            subprocess.run([*command, f"--junitxml={report}"], check=False)
        found = summary(reports, time.monotonic() - start)
    results = Results(title="gpu_tests")
    results.add([found], environment())
    results.write(args.out)
    print(found)
    return 0 if found["passed"] and not found["failed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
