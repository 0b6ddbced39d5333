"""A small sample of the faults in files; ``python -m benchmarks.faults`` tries them by the thousand."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no part of the installed package

from benchmarks.faults import BROKEN, _runs, configs, headers
from benchmarks.faults._runs import RESULTS, kinds, main
from benchmarks.rows import Results


def test_mutated_headers_end_as_with_the_reference_readers(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = headers.run(600, seed=1)
    assert outcomes[BROKEN] == 0, capsys.readouterr().err
    assert sum(outcomes.values()) == 600
    assert outcomes["safetensors, refused"] > 200
    assert outcomes["safetensors, accepted, same bytes"] > 20
    assert outcomes["gguf, accepted, same bytes"] > 10


def test_mutated_configs_load_or_say_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_time_limit", lambda _seconds: contextlib.nullcontext())  # pytest has its own
    outcomes = configs.run(100, seed=1)
    assert outcomes[BROKEN] == 0, capsys.readouterr().err
    assert sum(outcomes.values()) == 100
    assert sum(number for name, number in outcomes.items() if name.endswith("refused")) > 50
    assert sum(number for name, number in outcomes.items() if name.endswith("loaded")) > 5


def test_the_same_seed_tries_the_same() -> None:
    assert headers.run(60, seed=3) == headers.run(60, seed=3)


def test_counts_are_kept_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "faults.json"
    before = Results(title="faults")
    before.add([{"kind": "another", "count": 1}], {"device": "another"})
    before.write(out)
    rows = main(["headers", "--count", "20", "--out", str(out)])
    kept = {row["kind"]: row for row in Results.read(out).rows}
    assert kept["another"] == {"kind": "another", "count": 1, "run": 0}
    assert kept["headers"] == {**rows["headers"], "run": 1}
    assert kept["headers"]["outcomes"][BROKEN] == 0
    assert "headers: 20 tried in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nonsense", "--out", str(out)])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--count", "0"], "'0' was given; expected a whole number of at least 1"),
        (["--count", "-3"], "expected a whole number of at least 1"),
        (["--jobs", "0"], "expected a whole number of at least 1"),
        (["--out", "{tmp}/cut.json"], "cannot be read as results"),
        (["--out", "{tmp}/cut.json/x.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_counted_or_kept_is_told_before_anything_is_tried(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runs, "tried", lambda *_: pytest.fail("something was tried"))
    (tmp_path / "cut.json").write_text('{"benchmark": "fau')
    with pytest.raises(SystemExit, match="2"):
        main(["headers", "--out", str(tmp_path / "x.json"), *(word.format(tmp=tmp_path) for word in words)])
    assert error in capsys.readouterr().err


def test_the_command_shares_cases_among_processes(tmp_path: Path) -> None:
    """Processes that are started anew cannot import what lies in a package's ``__main__``."""
    out, root = tmp_path / "faults.json", Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.faults", "headers", "--count", "8", "--jobs", "2", "--out", str(out)]
    subprocess.run(command, cwd=root, check=True, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    (row,) = Results.read(out).rows
    assert (row["jobs"], sum(row["outcomes"].values())) == (2, 8)


def test_the_kept_results_are_of_full_runs() -> None:
    kept = {row["kind"]: row for row in Results.read(RESULTS).rows}
    assert "headers" in kept
    assert kept.keys() <= set(kinds())
    for row in kept.values():
        assert row["outcomes"][BROKEN] == 0
    assert kept["headers"]["count"] >= 10_000


def test_a_product_of_many_sizes_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": {"dtype": "U8", "shape": [2**63 - 1] * 100_000, "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    from vramkit.errors import CheckpointError
    from vramkit.offload import read_checkpoint

    start = time.process_time()
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        read_checkpoint(path)
    assert time.process_time() - start < 30  # a product of them takes minutes
    assert len(str(caught.value)) <= 1000
