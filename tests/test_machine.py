"""What is read of the machine: versions with traps, the rate of a disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vramkit.errors import ConfigError
from vramkit.machine import disk_read_gbps, hazards, versions


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": "9.10"}, []),
        ({"torch": "2.9.0+cu128", "cuda": "12.8", "cudnn": "9.15"}, ["3-D convolutions"]),
        ({"torch": "2.9.0+cu128", "cuda": "12.8", "cudnn": "9.10"}, ["3-D convolutions", "doubles the memory"]),
        ({"torch": "2.9.1+cu128", "cuda": "12.8", "cudnn": "9.10"}, ["doubles the memory"]),
        ({"torch": "2.9.1+cpu"}, []),
        ({"torch": "2.5.1"}, ["older than 2.6"]),
        ({"torch": "2.13.0", "system": "Linux 5.15.90-microsoft-standard-WSL2"}, ["WSL"]),
    ],
)
def test_hazards(found: dict[str, str], told: list[str]) -> None:
    said = hazards(found)
    assert len(said) == len(told)
    assert all(part in text for part, text in zip(told, said, strict=True))


def test_versions_are_those_installed() -> None:
    import torch

    assert versions()["torch"] == torch.__version__
    assert "python" in versions()


def test_of_two_installed_versions_that_which_is_imported_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("first", "9.9.9"), ("second", "1.1.1")):
        info = tmp_path / folder / f"peft-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), *sys.path, str(tmp_path / "second")])
    assert versions()["peft"] == "9.9.9"


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    rate, _ = disk_read_gbps(tmp_path, probe_bytes=2**20)
    assert rate > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="missing cannot be measured"):
        disk_read_gbps(tmp_path / "missing")
