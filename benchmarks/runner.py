"""Runs settings, each in a process of its own: what hangs is ended, and what fails becomes a row that says how.

The process is ``python -m benchmarks.runner`` with the setting on its standard input; it writes a line of JSON for each
row, so that rows that were finished count although the process fell.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.rows import Row, Setting

__all__ = ["CASES", "case_named", "measured_here", "run"]

CASES = (
    "forward",
    "quantized",
    "compiled",
    "encode",
    "decode",
    "clip",
    "foreign",
    "guide",
    "loading",
    "applying",
    "lora",
    "budgets",
    "cards",
    "links",
    "ram",
    "growth",
    "host",
    "planning",
    "quality",
)
_ERROR_LENGTH = 300


def case_named(name: str) -> Any:
    """Return the file of a case: ``settings(scale)`` and ``measure(setting, bench)``.

    Raises:
        ValueError: there is none.
    """
    if name not in CASES:
        raise ValueError(f"there is no case {name!r}; there are {', '.join(CASES)}")
    return importlib.import_module(f"benchmarks.cases.{name}")


def measured_here(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure a setting in this process; what it raises becomes its row."""
    start = time.perf_counter()
    try:
        yield from case_named(setting.case).measure(setting, bench)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        traceback.print_exc()
        text = str(error).strip().split("\n")[0][:_ERROR_LENGTH]
        yield setting.row(error=f"{type(error).__name__}: {text}", ended_after_s=round(time.perf_counter() - start, 1))


def run(
    setting: Setting, bench: Bench, *, environment: dict[str, str] | None = None, timeout_s: float | None = None
) -> list[Row]:
    """Measure a setting in a new process; returns its rows, the last one an error if it did not come to its end.

    It has `timeout_s`, or as long as the setting says.
    """
    with tempfile.TemporaryDirectory(prefix="vramkit-row-") as folder:
        out, errors = Path(folder) / "rows.jsonl", Path(folder) / "stderr"
        request = {"setting": _fields(setting), "bench": bench.to_json(), "out": str(out)}
        with errors.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.runner"],
                stdin=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
            ended = _wait(process, json.dumps(request), timeout_s or setting.timeout_s)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        if ended:
            lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
            last = f": {lines[-1].strip()[:_ERROR_LENGTH]}" if lines else ""
            rows.append(setting.row(error=f"{ended}{last}"))
    return rows


def _wait(process: subprocess.Popen[str], request: str, timeout_s: float) -> str:
    """Return how the process ended, nothing if well; it and its children are gone then."""
    try:
        process.communicate(request, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    code = process.returncode
    return (
        ""
        if code == 0
        else f"its process was ended by signal {-code}"
        if code < 0
        else f"its process ended with {code}"
    )


def _fields(setting: Setting) -> Row:
    return {name: getattr(setting, name) for name in setting.__dataclass_fields__}


def _rows(request: Row) -> Iterable[Row]:
    return measured_here(Setting(**request["setting"]), Bench.from_json(request["bench"]))


def main() -> None:
    """Measure the setting that standard input names."""
    request = json.load(sys.stdin)
    with Path(request["out"]).open("a") as out:
        for row in _rows(request):
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
