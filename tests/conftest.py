from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from families import Stock

# Set before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Otherwise MKL picks a kernel by the alignment of its operands, and weights in a file are aligned otherwise than in a slot.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch

# Tensors here are so small that a second thread costs more than it computes, most of all on a busy machine.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run every case of the sweeps, not one of each kind")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        if hasattr(config, "workeroutput"):
            config.workeroutput["left_out"] = len(left_out)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Tell how many tests the workers of xdist leave out, each the same ones: it does not do so itself."""
    if node.gateway.id == "gw0" and error is None:
        left_out = node.workeroutput.get("left_out", 0)
        node.config.hook.pytest_deselected(items=[SimpleNamespace() for _ in range(left_out)])


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_passed_over() -> None:
    """What was imported is most of what a collection looks through, and the library and its tests ask for thousands."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Tiny checkpoints of the families, one for all tests."""
    from families import Stock

    return Stock(tmp_path_factory)


@pytest.fixture(scope="session")
def wan_folder(stock: Stock) -> Path:
    """A tiny Wan checkpoint in the published folder layout: to be read, not changed."""
    return stock.folder("Wan2.1")


@pytest.fixture
def clean_memory() -> Iterator[None]:
    """Start and end without garbage, so that growth is the test's own."""
    gc.collect()
    yield
    gc.collect()
