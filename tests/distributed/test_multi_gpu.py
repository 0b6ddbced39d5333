"""The benchmark of several cards runs, tiny, on the CPU, and compares what ranks make with what one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks import multi_gpu


def test_ranks_are_measured_beside_one(tmp_path: Path) -> None:
    cases = ["guidance", "hunyuan", "decode", "decode_tiles"]  # the others are the same with other sizes
    assert set(cases) <= multi_gpu.CASES.keys() == multi_gpu.TARGETS.keys() == multi_gpu.SHAPES.keys()
    multi_gpu.main(["--tiny", "--out", str(tmp_path / "multi_gpu"), "--repeats", "1", "--cases", ",".join(cases)])
    rows = json.loads((tmp_path / "multi_gpu.json").read_text())["rows"]
    assert [row["case"] for row in rows] == cases
    assert all(row["ratio"] > 0 and row["relative_error"] < 1e-5 for row in rows)
    assert [row.get("weights") for row in rows] == ["pushed", "pushed", None, None]
    assert all(row["same_bytes"] for row in rows if row["case"] in ("guidance", "decode_tiles"))
    assert (tmp_path / "multi_gpu.md").read_text().count("| 2 |") == len(rows)


def test_a_case_that_takes_too_long_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException):
        multi_gpu.main(["--tiny", "--out", str(tmp_path / "multi_gpu"), "--cases", "link", "--limit-s", "0.01"])
    assert list(tmp_path.iterdir()) == []
