"""A window in host memory: a file in memory that has no name, mapped by all ranks of a host."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vramkit.distributed.ranks import Ranks, Transfer

__all__ = ["FileWindow"]


class FileWindow:
    """Slots of ranks that compute on the CPU. Nothing is left of it when ranks die, for it is in no folder."""

    def __init__(self, descriptor: int, ranks: Ranks) -> None:
        """Take an open file, and what all ranks it is for have in common."""
        self._file = os.fdopen(descriptor, "r+b")
        self._ranks = ranks
        self._others: list[tuple[int, Tensor]] = []

    @classmethod
    def made(cls, size_bytes: int, ranks: Ranks) -> tuple[FileWindow, Tensor]:
        """Return a new one with its memory.

        Raises:
            OSError: there is no room for it, or the system has no such files (Linux has).
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("files without a name are there on Linux alone")
        window = cls(os.memfd_create("vramkit-window"), ranks)
        os.posix_fallocate(window._file.fileno(), 0, size_bytes)
        return window, _mapped(window._path, size_bytes)

    def open(self, memory: Tensor) -> None:
        """Map those of the others; see `Window.open`."""
        paths = self._ranks.collect(self._path)
        others = [rank for rank in range(self._ranks.size) if rank != self._ranks.rank]
        self._others = [(rank, _mapped(paths[rank], memory.nbytes)) for rank in others]

    def enter(self) -> None:
        """Nothing is left to wait for: a copy on the CPU begins when its slot is free, and ranks have met since."""

    def push(self, given: Tensor, offsets: Sequence[int]) -> None:
        """Copy at once."""
        for rank, memory in self._others:
            memory[offsets[rank] : offsets[rank] + given.nbytes].copy_(given)

    def leave(self) -> Transfer:
        """Say so through the ranks."""
        return self._ranks.arrive()

    def close(self) -> None:
        """Let the others' memory go, and the file."""
        self._others.clear()
        self._file.close()

    @property
    def _path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"


def _mapped(path: str, size_bytes: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size_bytes, dtype=torch.uint8, device="cpu")
