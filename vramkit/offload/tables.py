"""Embedding tables that stay where they rest: a lookup needs a few rows, so the rows travel and the table does not.

Where the table is page-locked the device reads the rows by address while it runs the lookup, and the host waits for nothing.
Else the indices come to the host (one wait), the rows are gathered there, and they travel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vramkit import hooks, tensors
from vramkit.offload.arguments import moved
from vramkit.offload.group import TensorSlot
from vramkit.offload.layout import BufferLayout

__all__ = ["TableHook"]


class TableHook(hooks.ModuleHook):
    """Lets one ``nn.Embedding`` look its rows up in host memory."""

    def __init__(self, slot: TensorSlot, pinned: torch.Tensor | None, device: torch.device) -> None:
        """Prepare the lookup; `pinned` is the page-locked memory of the table (1-D uint8), if it is."""
        self._slot = slot
        self._device = device
        self._alias = None if pinned is None else _on_device(slot.rest, pinned, device)
        self._padding_idx: int | None = None

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Show the embedding something on the device that it can look up its indices in."""
        assert isinstance(module, nn.Embedding)
        if self._alias is not None:
            self._slot.show(self._alias)
            return moved(args, self._device), kwargs
        indices = args[0] if args else kwargs["input"]
        distinct, places = torch.unique(indices.cpu(), return_inverse=True)
        rows = F.embedding(distinct, self._slot.rest.detach()).to(self._device)
        self._slot.show(tensors.as_owned(rows, like=self._slot.rest))
        self._padding_idx, module.padding_idx = module.padding_idx, None  # it counts rows of the whole table
        return (places.to(self._device),), {}

    def post_forward(self, module: nn.Module) -> None:
        """Show the table at rest again."""
        self._slot.show(self._slot.rest)
        if self._padding_idx is not None:
            assert isinstance(module, nn.Embedding)
            self._padding_idx, module.padding_idx = None, self._padding_idx


class _Interface:
    """What ``__cuda_array_interface__`` asks of an owner of bytes that the device can address."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


def _on_device(table: torch.Tensor, pinned: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return page-locked host memory as a tensor of the device, without a copy; None for tables of a special kind."""
    if device.type != "cuda" or not tensors.is_plain(table):
        return None
    memory = torch.as_tensor(_Interface(pinned), device=device)
    (spec,) = BufferLayout.of([table.detach()]).leaves
    return tensors.as_owned(spec.view(memory), like=table)
