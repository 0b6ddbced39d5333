"""What tests of a whole pipeline start from; the fixture `family` of their module says of which one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from families import Stock, models_of


@pytest.fixture
def folder(stock: Stock, family: str) -> Path:
    """A checkpoint, to be read."""
    return stock.folder(family)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoiled."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def oracle(stock: Stock, family: str) -> Any:
    return stock.oracle(family)


@pytest.fixture
def pipeline(stock: Stock, family: str) -> Any:
    return stock.pipeline(family)


@pytest.fixture
def idle(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline that fails the test when anything is computed."""

    def computed(*arguments: Any, **options: Any) -> Any:
        pytest.fail("a model ran")

    for model in models_of(pipeline).values():
        monkeypatch.setattr(model, "forward", computed)
    return pipeline
