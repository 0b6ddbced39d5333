"""README: its Python blocks run as they stand, its commands are those of CI, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import README, SMALLER, blocks, run_blocks


def test_python_blocks_run(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(README, {"Wan-AI/Wan2.1-T2V-14B-Diffusers": str(wan_folder), **SMALLER}, at_least=3)
    assert (tmp_path / "clip.mp4").stat().st_size > 0


def test_commands_are_those_of_ci() -> None:
    commands = "".join(blocks(README, "bash"))
    assert 'pip install -e ".[test]" -c constraints.txt && pytest\n' in commands
    assert 'pip install -e ".[all]" -c constraints.txt && vramkit demo\n' in commands


def test_pictures_and_links_exist() -> None:
    targets = re.findall(r"\]\(((?!http)[^)#]+)", README.read_text(encoding="utf-8"))
    assert len(targets) > 10
    for target in targets:
        assert (README.parent / target).exists(), target


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140
