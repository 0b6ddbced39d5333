"""What the summary of the tests of a device says, and which of them run with every access to memory checked."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no part of the installed package

from benchmarks import gpu_tests
from benchmarks.gpu_tests import errors_in, few, main, summary
from benchmarks.rows import Results, Row

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
    ended = summary(reports[:1], 1.0, ["tests/gpu/test_engine.py::test_bad", "a.py::test_hung"])
    with pytest.raises(FileNotFoundError):  # nobody said what it was to hold
        summary([*reports, tmp_path / "none.xml"], 1.0)
    assert (ended["tests"], ended["failed"]) == (5, 3)
    assert ended["failures"].startswith("a.py::test_hung, ")


def test_few_cases_have_every_value_of_every_parameter() -> None:
    values = ["abc", "xyz", "12"]
    names = [f"a.py::test_one[{'-'.join(case)}]" for case in itertools.product(*values)]
    chosen = few([*names, "a.py::test_two", "b.py::test_one[a]"])
    assert {"a.py::test_two", "b.py::test_one[a]"} < set(chosen)
    cases = [name.partition("[")[2].rstrip("]").split("-") for name in chosen if name in names]
    assert [set(found) for found in zip(*cases, strict=True)] == [set(each) for each in values]
    assert len(cases) < len(names) / 2


def test_errors_are_those_that_were_counted() -> None:
    shortened = "========= ERROR SUMMARY: 112 errors were not printed. Use --print-limit option to adjust\n"
    assert errors_in(f"{shortened}========= ERROR SUMMARY: 212 errors\n") == 212
    assert errors_in("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors") == 0
    assert errors_in("========= ERROR SUMMARY: 1 error\n") == 1
    with pytest.raises(RuntimeError, match=r"counted nothing; its last words: =* Error: Device not supported"):
        errors_in("========= Error: Device not supported\n")


@pytest.mark.parametrize("errors", [0, 3])
def test_checked_runs_have_a_row_beside_the_whole(
    errors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[list[str]] = []

    def run(command: list[str], *, env: Row | None = None, **_options: Any) -> SimpleNamespace:
        option = next((word for word in command if word.startswith("--junitxml=")), None)
        if option is not None:
            name = command[-1].partition("::")[2] if command[0] == "sanitizer" else "test"
            passed = f'<testcase classname="tests.gpu.a" name="{name}"/>'
            Path(option.partition("=")[2]).write_text(f"<testsuites><testsuite>{passed}</testsuite></testsuites>")
        if command[0] == "sanitizer":
            assert env is not None
            assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"]
            Path(command[command.index("--log-file") + 1]).write_text(f"it says\n= ERROR SUMMARY: {errors} errors\n")
            checked.append(command)
        return SimpleNamespace(
            stdout="tests/gpu/a.py::test[1]\ntests/gpu/a.py::test[2]\ntests/gpu/a.py::test[quanto_int8]\n3 tests collected\n"
        )

    monkeypatch.setattr(gpu_tests.subprocess, "run", run)
    monkeypatch.setattr(gpu_tests, "_has_device", lambda: True)
    out = tmp_path / "out.json"
    assert main(["--out", str(out)]) == 0
    for _ in range(2):
        assert main(["--memcheck", "sanitizer", "--out", str(out)]) == (1 if errors else 0)
    assert sorted(command[-1] for command in checked[:2]) == ["tests/gpu/a.py::test[1]", "tests/gpu/a.py::test[2]"]
    assert ("it says" in capsys.readouterr().out) == (errors > 0)
    rows = {row["run_of"]: row for row in Results.read(out).rows}
    assert len(Results.read(out).rows) == 2
    assert (rows["whole"]["passed"], rows["memcheck"]["passed"], rows["memcheck"]["errors"]) == (2, 2, 2 * errors)


def test_a_checked_process_that_leaves_no_report_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_options: Any) -> SimpleNamespace:
        if command[0] == "sanitizer":
            Path(command[command.index("--log-file") + 1]).write_text("= ERROR SUMMARY: 0 errors\n")
        return SimpleNamespace(stdout="tests/gpu/a.py::test[1]\n1 test collected\n")

    monkeypatch.setattr(gpu_tests.subprocess, "run", run)
    monkeypatch.setattr(gpu_tests, "_has_device", lambda: True)
    out = tmp_path / "out.json"
    assert main(["--memcheck", "sanitizer", "--out", str(out)]) == 1
    assert Results.read(out).rows[0]["failures"] == "tests/gpu/a.py::test[1]"


def test_what_is_checked_is_there() -> None:
    folder = Path(__file__).parents[1]
    for name in gpu_tests._CHECKED:
        path, _, test = name.partition("::")
        assert f"def {test}(" in (folder / path).read_text(encoding="utf-8")


def test_without_a_device_no_counts_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *_, **__: pytest.fail("tests were run"))
    monkeypatch.setattr(gpu_tests, "_has_device", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "out.json")])
    assert "this machine has no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
