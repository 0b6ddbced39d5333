"""Weights whose file was cut while they rested in it: to touch their memory would end the process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vramkit import tensors
from vramkit.offload.disk import check_files_of, file_of
from vramkit.offload.watch.at_rest import data_at_rest, resting

__all__ = ["refuse_lost"]


class _Lost:
    """The keeper of them all: whoever touches one is told what became of its file."""

    def knows(self, rest: torch.Tensor) -> bool:
        return True

    def is_inside(self) -> bool:
        return False

    def witness(self) -> torch.Tensor:
        raise AssertionError("no pass runs")

    def serve(self, rest: torch.Tensor, reader: Callable[..., object]) -> torch.Tensor:
        raise AssertionError("no pass runs")

    def check(self, rest: torch.Tensor) -> None:
        """Raise StoreError, unless it was given other memory since."""
        check_files_of(tensors.leaves(rest))

    def handed_out(self, rest: torch.Tensor) -> None:
        self.check(rest)

    def alias(self, rest: torch.Tensor) -> torch.Tensor:
        self.check(rest)
        return data_at_rest(rest)

    def refuse_replacing(self, rest: torch.Tensor) -> None:
        """Let it be given other memory."""


_LOST = _Lost()


def refuse_lost(module: nn.Module) -> None:
    """From now on let who touches a parameter of `module` whose file was cut get a StoreError, until it is replaced."""
    for parameter in module.parameters():
        if any(file is not None and file.is_cut for file in map(file_of, tensors.leaves(parameter))):
            resting(parameter, _LOST)
