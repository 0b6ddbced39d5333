"""What `vramkit batch` refuses, before a worker is started or a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import Stock, picture

from vramkit import cli
from vramkit.batch import ray_workers
from vramkit.demo.checkpoint import cached_checkpoint
from vramkit.demo.presets import TINY
from vramkit.errors import ConfigError

CAT: dict[str, Any] = {"prompt": "a cat"}


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "connected", None)


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights."""
    folder = tmp_path_factory.mktemp("cache")
    whole = cached_checkpoint(TINY, cache=folder)
    return shutil.copytree(whole, folder / "outline", ignore=shutil.ignore_patterns("*.safetensors"))


def fails(tmp_path: Path, model: Path, lines: list[dict[str, Any]], *options: str, capsys: Any) -> str:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1", "--device", "cpu"]
    assert cli.main(["batch", str(file), "--model", str(model), "--out", str(out), *size, *options]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not out.is_dir() or not list(out.glob("*.mp4"))
    return said.err


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ([], (), "prompts.jsonl has no prompts"),
        ([CAT, {"promt": "a cat"}], (), "line 2: there is no 'promt'"),
        ([CAT | {"name": "a"}, CAT | {"name": "A"}], (), "line 2: the name 'A' is that of line 1 too"),
        ([CAT, CAT | {"height": 40}], (), "line 2: --height is 40; expected a multiple of 16"),
        ([CAT, CAT | {"image": "missing.png"}], (), "line 2: it has image, unlike line 1"),
        ([CAT], ("--fps", "0"), "--fps is 0.0; expected a number above 0"),
        ([CAT], ("--guidance", "nan"), "--guidance is NaN"),
        ([CAT], ("--offload", "none", "--slots", "2"), "--slots was given with --offload none"),
        ([CAT], ("--vram", "6GiB", "--slots", "2"), "--slots was given with --vram"),
        ([CAT], ("--ram", "6GiB"), "--ram and --allow go with --vram"),
        ([CAT], ("--lora-weight", "nan"), "--lora-weight is nan"),
        ([CAT], ("--lora", "./missing.safetensors"), "missing.safetensors"),
        ([CAT], ("--flow-shift", "0"), "--flow-shift=0.0"),
        ([CAT], ("--model", "./missing"), "missing does not exist"),
        ([CAT], ("--image", "./missing.png"), "takes 16 channels"),
    ],
)
def test_what_cannot_be(
    lines: list[dict[str, Any]],
    options: tuple[str, ...],
    said: str,
    outline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "takes 16 channels" in said:
        picture().save(tmp_path / "missing.png")
        options = ("--image", str(tmp_path / "missing.png"))
    assert said in fails(tmp_path, outline, lines, *options, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_folders(outline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.touch()
    assert "out cannot be made: File exists" in fails(tmp_path, outline, [CAT], capsys=capsys)
    out.unlink()
    out.mkdir()
    (out / "journal.jsonl").write_text("dear diary\n")
    assert "is no journal of `vramkit batch`" in fails(tmp_path, outline, [CAT], capsys=capsys)
    (out / "journal.jsonl").unlink()
    (out / "0001.mp4").touch()
    file = tmp_path / "prompts.jsonl"
    assert cli.main(["batch", str(file), "--model", str(outline), "--out", str(out), "--device", "cpu"]) == 1
    assert "0001.mp4 is there, and this folder's journal does not know it" in capsys.readouterr().err
    assert (out / "0001.mp4").read_bytes() == b""


def test_pictures_of_lines(stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stock.folder("LTX-Video")
    capsys.readouterr()
    said = fails(tmp_path, model, [CAT | {"image": "no.png"}], capsys=capsys)
    assert f"line 1: {tmp_path}/no.png does not exist" in said


def test_without_ray(outline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vramkit\[ray\]"'):
        ray_workers.check_installed()
