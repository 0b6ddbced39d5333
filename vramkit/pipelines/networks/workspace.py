"""Memory of a residual block that the next one computes in.

A block needs its input and as much again for its result. With the channels halved both fit into the input: the result takes
one half, the shortcut the other. After that two halves take turns: what a block has read to the end is where the next one
puts its result.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["compact", "halves"]


def halves(x: Tensor, channels: int) -> tuple[Tensor, Tensor] | None:
    """The first and the next `channels` of `x` [B, C, ...], None where it has not as many."""
    return (x[:, :channels], x[:, channels : 2 * channels]) if x.shape[1] >= 2 * channels else None


def compact(x: Tensor) -> Tensor:
    """`x` in memory of its own size: a copy if it is a part of something larger."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
