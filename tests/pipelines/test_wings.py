"""The parts of `vramkit.pipelines`: what it exports, and that what they import of each other goes in no circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import vramkit
from vramkit import pipelines

FOLDER = Path(pipelines.__file__).parent


def imports() -> dict[str, set[str]]:
    """Return for each part the other parts that its files import, wherever in the file."""
    found: dict[str, set[str]] = {
        folder.name: set() for folder in FOLDER.iterdir() if (folder / "__init__.py").exists()
    }
    for part, others in found.items():
        for file in (FOLDER / part).rglob("*.py"):
            names = [node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
            others.update(name.split(".")[2] for name in names if name and name.startswith("vramkit.pipelines."))
        others.discard(part)
    return found


def test_no_file_lies_loose_but_an_address_that_scripts_have():
    assert {file.name for file in FOLDER.glob("*.py")} == {"__init__.py", "video.py"}


def test_parts_import_each_other_in_no_circle():
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "ltx", "cogvideox"])
def test_nothing_imports_a_family(family: str):
    assert [part for part, others in imports().items() if family in others] == []


def test_exported_names_are_those_of_the_package_and_are_loaded_when_used():
    assert set(pipelines.__all__) <= set(vramkit.__all__)
    assert all(getattr(pipelines, name) is getattr(vramkit, name) for name in pipelines.__all__)
    assert set(dir(pipelines)) >= set(pipelines.__all__)
    with pytest.raises(ImportError, match="NoSuchPipeline"):
        from vramkit.pipelines import NoSuchPipeline  # noqa: F401
    code = "import sys, vramkit.pipelines; print([m for m in sys.modules if m.startswith('vramkit.pipelines.')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_address_of_video_calls():
    from vramkit.pipelines import video
    from vramkit.pipelines.calling import video as home

    assert all(getattr(video, name) is getattr(home, name) for name in video.__all__)
