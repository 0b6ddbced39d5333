"""The benchmark of several cards runs, tiny, on the CPU, and compares what ranks make with what one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--ranks", "99"], "--ranks 99, and this machine has"),
        (["--tiny", "--ranks", "0"], "expected a whole number of at least 1"),
        (["--tiny", "--out", "{tmp}/file/x"], "cannot be written"),
    ],
)
def test_what_cannot_run_or_be_kept_is_told_before_ranks_are_started(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_gpu.mp, "start_processes", lambda *_, **__: pytest.fail("ranks were started"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        multi_gpu.main(["--out", str(tmp_path / "x"), *(word.format(tmp=tmp_path) for word in words)])
    assert error in capsys.readouterr().err


def test_toy_sizes_have_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outs: list[Path] = []

    def start(_work: Any, args: tuple[Any, ...], **_options: Any) -> Any:
        outs.append(args[0].out)
        return SimpleNamespace(join=lambda timeout: True)

    monkeypatch.setattr(multi_gpu.mp, "start_processes", start)
    multi_gpu.main(["--tiny"])
    assert outs == [multi_gpu.TINY_OUT]
