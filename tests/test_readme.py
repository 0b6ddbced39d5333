"""The README's Python blocks run as they stand, one after the other, with a small checkpoint for the one of the hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import write_lora

from vramkit import AutoModel

README = Path(__file__).parents[1] / "README.md"
SMALLER = {
    "height=480": "height=32",
    "width=832": "width=48",
    "num_frames=81": "num_frames=5",
    "num_inference_steps=50": "num_inference_steps=2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def small(wan_folder, tmp_path):
    transformer = AutoModel.from_pretrained(wan_folder, subfolder="transformer")
    adapter = write_lora(transformer, tmp_path / "adapter").parent

    def replace(code: str) -> str:
        code = code.replace("Wan-AI/Wan2.1-T2V-14B-Diffusers", str(wan_folder))
        code = code.replace("benjamin-paine/steamboat-willie-14b", str(adapter))
        for given, smaller in SMALLER.items():
            code = code.replace(given, smaller)
        return code

    return replace


def test_python_blocks_run(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) >= 4
    names: dict[str, object] = {}
    for code in found:
        exec(compile(small(code), str(README), "exec"), names)
    assert (tmp_path / "clip.mp4").stat().st_size > 0


def test_commands_are_those_of_ci():
    commands = " ".join(blocks("bash"))
    assert 'pip install -e ".[test]" -c constraints.txt && pytest' in commands
    assert "vramkit demo" in commands


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
