"""What is to be known of an operator of torch, looked up once: of hundreds of thousands of calls each asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

__all__ = ["Operator", "operator_of"]

_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten._convolution, torch.ops.aten.cudnn_convolution}  # noqa: SLF001


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """One overload of an operator."""

    packet: Any
    """All overloads of it."""
    makes_new: bool
    """Whether it writes to nothing, and what it returns is no view."""
    writes_to_first: bool
    """Whether it writes in place to its first argument, which keeps its shape, and returns it."""
    returns: int
    """How many results it has."""
    count_flops: Callable[..., int] | None
    is_convolution: bool


def operator_of(func: Any) -> Operator:
    """Return what is known of `func`, an overload, as torch dispatches it."""
    known = _KNOWN.get(id(func))  # its own hash is worked out in Python
    if known is None:
        schema = func._schema  # noqa: SLF001 (torch has no public reader)
        known = _KNOWN[id(func)] = Operator(
            packet=func.overloadpacket,
            makes_new=not schema.is_mutable and all(each.alias_info is None for each in schema.returns),
            writes_to_first=schema.is_mutable and schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags,
            returns=len(schema.returns),
            count_flops=flop_registry.get(func.overloadpacket),
            is_convolution=func.overloadpacket in _CONVOLUTIONS,
        )
        _ALIVE.append(func)
    return known


_KNOWN: dict[int, Operator] = {}  # by identity
_ALIVE: list[Any] = []  # of which no other has the identity
