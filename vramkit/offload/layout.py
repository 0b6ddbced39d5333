"""Where each leaf of a group lies in a slot: frozen when the group is made, the same for every slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from vramkit import tensors

__all__ = ["BufferLayout", "LeafSpec"]

_ALIGNMENT_BYTES = 256  # what device kernels and copy engines like best


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """One plain tensor in a slot. `offset` and `size_bytes` in bytes from the start of the group."""

    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the leaf in `memory`, which holds the group from its first byte on (1-D uint8)."""
        return tensors.typed_view(memory, self.offset, self.dtype, self.shape, self.stride)


@dataclasses.dataclass(frozen=True, slots=True)
class BufferLayout:
    """The leaves of one group, one behind the other, each aligned."""

    leaves: tuple[LeafSpec, ...]
    size_bytes: int

    @classmethod
    def of(cls, leaves: Sequence[torch.Tensor]) -> BufferLayout:
        """Lay `leaves` out in order. Strides are kept where they are dense. Meta tensors do."""
        specs, end = [], 0
        for leaf in leaves:
            size_bytes = leaf.nbytes
            specs.append(LeafSpec(end, size_bytes, leaf.dtype, tuple(leaf.shape), tensors.dense_like(leaf)))
            end += -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return cls(tuple(specs), end)
