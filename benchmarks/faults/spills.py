"""A disk that is full after any number of bytes of weights: nothing stays there, and the module is as it was."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults._cases import LEVELS, Case, descriptors, patched, settled_threads, tried
from benchmarks.faults._graphs import WIDTH, drawn_graph, drawn_steps, same
from vramkit.errors import StoreError
from vramkit.offload import offload_of

__all__ = ["COUNT", "run"]

COUNT = 1_000


class _Disk:
    """Has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = 0
        self._open = Path.open

    def open(self, path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file; those that spill files are written through fill the disk."""
        file: Any = self._open(path, mode, *args, **kwargs)
        if mode == "r+b":
            file = _Full(file, self)
        return file


class _Full:
    """A file on that disk."""

    def __init__(self, file: Any, disk: _Disk) -> None:
        self._file = file
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Write what there is room for."""
        room = self._disk.room - self._disk.written
        self._disk.written += self._file.write(data[: max(0, room)])
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


def run(count: int, seed: int) -> dict[str, int]:
    """Fill `count` disks."""
    return tried("spills", count, seed, _try)


def _try(draw: random.Random, folder: Path, counts: Counter[str]) -> None:
    case = Case(drawn_graph(draw), folder, level=draw.choice(LEVELS), place="spilled")
    size = sum(tensor.nbytes for tensor in case.resident.state_dict().values())
    threads, files = threading.active_count(), descriptors()
    disk = _Disk(draw.randrange(size))

    def opens(path: Path, *args: Any, **kwargs: Any) -> Any:
        return disk.open(path, *args, **kwargs)

    with patched(Path, "open", opens):
        try:
            case.apply()
            ended = "there was room"
        except StoreError as error:
            if "No space left" not in str(error):
                raise
            ended = "a StoreError, and the module as it was"
    if case.offload is None:
        assert offload_of(case.module) is None
        assert same(case.resident, case.module)
        assert not case.files()
        assert settled_threads(threads) <= threads
        assert descriptors() <= files
        case.apply()
    steps = drawn_steps(draw, case.resident, fails=False)  # type: ignore[arg-type]
    assert case.is_right(torch.randn(3, WIDTH), steps)
    assert case.offload is not None
    case.offload.remove()
    assert same(case.resident, case.module)
    counts[ended] += 1
