"""What the summary of the tests of a device says."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no part of the installed package

from benchmarks.gpu_tests import summary

_REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_engine" name="test_good[1]" time="1"/>
<testcase classname="tests.gpu.test_engine" name="test_bad"><failure message="x">x</failure></testcase>
<testcase classname="tests.gpu.test_engine" name="test_bad_at_its_end"><error message="x">x</error></testcase>
<testcase classname="tests.gpu.test_quant" name="test_absent"><skipped message="x"/></testcase>
</testsuite></testsuites>"""


def test_counts_and_names(tmp_path: Path) -> None:
    reports = [tmp_path / "a.xml", tmp_path / "b.xml"]
    for report in reports:
        report.write_text(_REPORT)
    assert summary(reports[:1], 12.34) == {
        "tests": 4,
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "seconds": 12.3,
        "failures": "tests/gpu/test_engine.py::test_bad, tests/gpu/test_engine.py::test_bad_at_its_end",
    }
    assert summary(reports, 1.0)["tests"] == 8
