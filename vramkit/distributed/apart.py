"""Ranks that have weights once on each host and read them each for itself: where computing takes longer than the link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vramkit.offload.backend import Backend
from vramkit.offload.stores import PartedStore, Sharing, Store

__all__ = ["Apart"]


class Apart:
    """The ranks of a mesh, none of which waits for the others in order to load."""

    def __init__(self, mesh: Sharing) -> None:
        self._mesh = mesh

    @property
    def apart(self) -> Apart:
        """This."""
        return self

    def prepare(self, module: nn.Module, options: dict[str, Any], disk_folder: Path | None) -> None:
        """Do as the mesh does: options and weights are the same on all ranks, weights are there once on each host."""
        self._mesh.prepare(module, options, disk_folder)

    def shared(
        self, name: str, stores: Sequence[tuple[int, int, PartedStore]], size_bytes: int
    ) -> Sequence[tuple[int, int, Store]]:
        """Return `stores` as they are."""
        return stores

    def memory(self, backend: Backend, size_bytes: int) -> torch.Tensor:
        """Return memory of the device, as without other ranks."""
        return backend.memory(size_bytes)
