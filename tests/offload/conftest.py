from __future__ import annotations

import gc
from collections.abc import Iterator

import paper
import pytest
import torch
from strict import strict  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toy layers are smaller than the cost of sharing them among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _strict(strict: None) -> None:  # noqa: F811
    """Tests of the engine fail where a device would. Those of the compiler, which knows no such mode, have their own."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[paper.Driver]:
    yield paper.install(monkeypatch)
    gc.collect()  # what goes without close() unlocks its memory, and must find this driver
