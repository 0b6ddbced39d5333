"""Embedding tables that stay where they rest: a lookup needs a few rows, so the rows travel and the table does not.

Where the table is page-locked the device reads the rows by address while it runs the lookup, and the host waits for nothing.
Else the indices come to the host (one wait), the rows are gathered there, and they travel. Whatever else is done with the
weight gets the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vramkit import hooks, tensors
from vramkit.offload.layout import BufferLayout
from vramkit.offload.tensor_slot import TensorSlot
from vramkit.offload.watch import stand_in
from vramkit.wrapper import WrapperTensor

__all__ = ["Table", "TableHook"]


class Table:
    """One table at rest, with its owners, and the tensor that stands for it on the device."""

    def __init__(self, slot: TensorSlot, pinned: torch.Tensor | None, device: torch.device) -> None:
        """Prepare lookups; `pinned` is the page-locked memory of the table (1-D uint8), if it is."""
        self.slot = slot
        alias = None if pinned is None else _by_address(slot.rest, pinned, device)
        rows = (
            alias if alias is not None else RestingRows(tensors.rebuild(slot.rest, tensors.leaves(slot.rest)), device)
        )
        self.on_device = tensors.as_owned(rows, like=slot.rest)
        stand_in(self.on_device, slot.rest)


class TableHook(hooks.ModuleHook):
    """Shows an embedding a tensor that it can look up its indices in, while it runs."""

    def __init__(self, slot: TensorSlot, pinned: torch.Tensor | None, device: torch.device) -> None:
        """Prepare the lookup; see `Table`."""
        self.table = Table(slot, pinned, device)

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show what stands for the table on the device."""
        self.table.slot.show(self.table.on_device)

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Show the table at rest again."""
        self.forget()

    def forget(self) -> None:
        """Show the table at rest, whatever is shown now."""
        self.table.slot.show(self.table.slot.rest)


class RestingRows(WrapperTensor):
    """A table in host memory that is to everybody a tensor of the device: lookups move rows, all else moves the whole."""

    table: torch.Tensor

    @staticmethod
    def __new__(cls: type[RestingRows], table: torch.Tensor, device: torch.device) -> RestingRows:
        """Stand for `table`, [rows, columns], at rest, on `device`."""
        return cls._shell(table.shape, table.dtype, device)

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        self.table = table

    def dequantize(self) -> torch.Tensor:
        """Return the whole table, on the device."""
        return self.table.to(self.device)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the table at rest."""
        return {"table": self.table}

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> RestingRows:
        """Stand for another table."""
        return RestingRows(parts["table"], self.device)

    def refusal(self) -> str:
        """Say why it may not be written to."""
        return (
            "an embedding table that is looked up where it rests, and the change would be lost; change weights inside "
            "`with offload_of(module).edit():`"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function and the class
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look rows up at rest; otherwise as any wrapped tensor."""
        if func is torch.ops.aten.embedding.default and isinstance(args[0], RestingRows):
            return args[0].rows(args[1])
        if func is torch.ops.aten._to_copy.default:  # noqa: SLF001 (the name that torch gives to `Tensor.to`)
            return func(args[0].dequantize(), *args[1:], **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows of `indices` (any shape), on the device: [*indices, columns]."""
        distinct, places = torch.unique(indices.cpu(), return_inverse=True)
        rows = F.embedding(distinct, self.table)
        return F.embedding(places.to(self.device), rows.to(self.device))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001 (torch's extension point)


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


def _by_address(table: torch.Tensor, pinned: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return page-locked host memory as a tensor of the device, without a copy; None for tables of a special kind."""
    if device.type != "cuda" or not tensors.is_plain(table):
        return None
    memory = torch.as_tensor(_Interface(pinned), device=device)
    (spec,) = BufferLayout.of(tensors.leaves(table)).leaves
    return spec.view(memory)
