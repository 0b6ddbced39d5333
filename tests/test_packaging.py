"""What is shipped: a wheel and an sdist that build, hold what they should, and work with the engine's packages alone."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml

import vramkit

ROOT = Path(__file__).parents[1]
OLDEST = (3, 10)
ENGINE = {"torch", "numpy", "safetensors", "psutil", "typing_extensions"}
# What the project is known to need: each is named by an extra or a dependency, whoever else brings it along.
NAMED = {
    *("torch", "safetensors", "accelerate", "bitsandbytes", "optimum-quanto", "psutil", "pytest-benchmark"),
    "transformers",
}


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build `tree` as pip does, with the setuptools that is installed: nothing is downloaded."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "vramkit", tree / "vramkit", ignore=shutil.ignore_patterns("__pycache__"))
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that it holds all that a wheel takes."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return build("wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        return email.message_from_bytes(archive.read(name))


def requirements(metadata: Message) -> dict[str, set[str]]:
    """The packages of each extra, of itself alone; ``""`` has those of the engine."""
    found: dict[str, set[str]] = {"": set()}
    for each in metadata.get_all("Requires-Dist", []):
        package, extra = re.match(r"([\w.-]+)", each), re.search(r'extra == "(\w+)"', each)
        assert package is not None
        found.setdefault(extra[1] if extra else "", set()).add(package[1])
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "vramkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {path.relative_to(ROOT).as_posix() for path in files}


def test_dependencies_are_by_need(metadata: Message) -> None:
    found = requirements(metadata)
    assert found[""] == ENGINE
    assert set().union(*found.values()) >= NAMED
    assert metadata["Requires-Python"] == f">={OLDEST[0]}.{OLDEST[1]}"


def test_extras_that_errors_name_exist(metadata: Message) -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "vramkit").rglob("*.py"))
    named = {*re.findall(r"\bextra\(\s*\"(\w+)\"", sources), *re.findall(r"vramkit\[(\w+)\]", sources)}
    assert named >= {"cli", "hub", "lora", "plots", "quant", "text", "video"}
    assert named <= set(metadata.get_all("Provides-Extra", []))


def test_the_wheel_works_with_the_packages_of_the_engine_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}
    script = shutil.copy(Path(__file__).parent / "engine_only.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "right\n", done.stderr
    assert "vramkit[cli]" in done.stderr


def test_every_file_is_in_the_grammar_of_the_oldest_python() -> None:
    """Newer names of the standard library are found by mypy, which checks for that version."""
    paths = [path for folder in ("vramkit", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 300
    for path in paths:
        ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=OLDEST)
    assert f'python_version = "{OLDEST[0]}.{OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vramkit.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"


def test_reports_of_problems_ask_for_the_doctor() -> None:
    templates = {path.stem: path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert {"problem", "model", "wish"} <= set(templates)
    for name in ("problem", "model"):
        form = yaml.safe_load(templates[name].read_text(encoding="utf-8"))
        (doctor,) = (part for part in form["body"] if part.get("id") == "doctor")
        assert "vramkit doctor --json" in doctor["attributes"]["description"]
        assert doctor["validations"]["required"]
