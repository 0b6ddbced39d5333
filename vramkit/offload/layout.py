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
    def of(cls, leaves: Sequence[torch.Tensor], behind: Sequence[bool] | None = None) -> BufferLayout:
        """Lay `leaves` out in order, but those marked `behind` after all others. Strides are kept where they are dense.

        The specs are in the order of `leaves` in any case. Meta tensors do.
        """
        marks = [False] * len(leaves) if behind is None else behind
        offsets, end = [0] * len(leaves), 0
        for at in sorted(range(len(leaves)), key=marks.__getitem__):
            offsets[at] = end
            end += -(-leaves[at].nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        specs = (
            LeafSpec(offset, leaf.nbytes, leaf.dtype, tuple(leaf.shape), tensors.dense_like(leaf))
            for offset, leaf in zip(offsets, leaves, strict=True)
        )
        return cls(tuple(specs), end)
