"""A driver that refuses to lock memory, at any call: what is not locked is staged, arrives whole, and no error stays behind.

The driver is the one made of paper of ``tests/paper.py``, which judges every copy as the real one does.
"""

from __future__ import annotations

import importlib
import random
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.faults._cases import Case, tried
from vramkit import tensors
from vramkit.offload.assembly import assemble
from vramkit.offload.config import OffloadConfig
from vramkit.offload.resting import RestingPlace
from vramkit.offload.ring import Pieces

__all__ = ["COUNT", "run"]

COUNT = 500
_WIDTH = 1024  # large enough for memory with pages of its own, some of it


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(5))


def run(count: int, seed: int) -> dict[str, int]:
    """Lock the weights of `count` modules."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    paper: Any = importlib.import_module("paper")
    pytest: Any = importlib.import_module("pytest")

    def attempt(draw: random.Random, folder: Path, counts: Counter[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            driver = paper.install(patch)
            counts[_try(draw, folder, driver, paper)] += 1
            counts["errors of the driver that were collected"] += driver.forgotten_errors

    return tried("registration", count, seed, attempt)


def _try(draw: random.Random, folder: Path, driver: Any, paper: Any) -> str:
    case = Case(_Net().eval(), folder, level="block_level", place=draw.choice(["mapped", "plain"]))
    share, register = draw.choice([0.0, 0.3, 1.0]), driver.cudaHostRegister
    refused = []

    def refusing(start: int, size: int, flags: int) -> int:
        if draw.random() < share:
            refused.append(start)
            return 2
        return int(register(start, size, flags))

    driver.cudaHostRegister = refusing
    options: dict[str, Any] = {"granularity": "block_level", "slots": draw.randint(1, 2)}
    config = OffloadConfig(device=paper.DEVICE, **options)
    backend = paper.Backend(driver)
    place = RestingPlace(config, backend)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assembly = assemble(case.module, config, place)
    assert len(told) == bool(refused), f"{len(told)} warnings"
    with backend.judged():
        for group in assembly.groups:
            memory = backend.memory(group.size_bytes)
            group.fill(Pieces(memory))
            _compare(group, memory)
    place.close()
    assert not driver.locked, "memory stays locked"
    return "staged what could not be locked" if refused else "all was locked"


def _compare(group: Any, memory: torch.Tensor) -> None:
    leaves = [leaf for slot in group.slots() for leaf in tensors.leaves(slot.rest)]
    specs = {(spec.dtype, spec.shape): spec for spec in group.layout.leaves}
    for leaf in leaves:
        spec = specs.get((leaf.dtype, tuple(leaf.shape)))
        assert spec is None or torch.equal(spec.view(memory), leaf), "other bytes arrived"
