"""How convolutions of accelerators lay out what they make, and what they take for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["has_channels_innermost", "laid_out", "workspace_bytes"]

_CHANNELS_INNERMOST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(result: torch.Tensor, given: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the result of a convolution with its channels innermost where `given`, input or weight, lie so."""
    if any(map(has_channels_innermost, given)):
        return result.contiguous(memory_format=_CHANNELS_INNERMOST.get(result.ndim, torch.contiguous_format))
    return result


def workspace_bytes(result: torch.Tensor, given: torch.Tensor, weight: torch.Tensor, *_: Any) -> int:
    """What a convolution takes beside its result: what lies otherwise than with its channels innermost, once more.

    So cuDNN did on an H100 for pictures and for clips, in 16 and in 32 bits; from clips to few channels in 32 bits it copies
    its input however that lies. A product for each position (a kernel of one), or each channel by itself, copies nothing.
    Weights lie as checkpoints have them.
    """
    layout = _CHANNELS_INNERMOST.get(given.ndim)
    is_by_position, is_by_channel = max(weight.shape[2:]) == 1, weight.shape[1] == 1 < given.shape[1]
    if layout is None or not given.is_floating_point() or is_by_position or is_by_channel:
        return 0
    is_narrowed = given.ndim == 5 and given.element_size() == 4 and result.shape[1] < 4
    if is_narrowed or not has_channels_innermost(given):
        return given.nbytes + result.nbytes + weight.nbytes
    return weight.nbytes + (0 if given.is_contiguous(memory_format=layout) else given.nbytes)


def has_channels_innermost(tensor: torch.Tensor) -> bool:
    """Whether kernels take `tensor` [B, C, ...] as lying with its channels innermost, rows outside of columns and so on."""
    least = 1
    for dim in (1, *reversed(range(2, tensor.ndim)), 0):
        if tensor.stride(dim) < least:
            return False
        least = tensor.stride(dim) * tensor.shape[dim]
    return True
