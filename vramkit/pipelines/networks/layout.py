"""How the numbers of a clip lie in memory where convolutions compute it.

cuDNN computes convolutions of clips with the channels of each position side by side. What lies otherwise it copies, before
and after: half as much time again, and as many bytes as input, result and weight have (docs/architecture.md).

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_innermost", "clip_of", "laid_out", "new_frames", "pictures"]


def channels_innermost(x: Tensor) -> bool:
    """Whether clips like `x` are computed with their channels side by side: on CUDA, except in doubles.

    Asked of the device and not of the strides of `x`, which say nothing of one channel or of one position.
    """
    return x.device.type == "cuda" and x.dtype != torch.float64


def new_frames(like: Tensor, *sizes: int) -> Tensor:
    """Memory for a clip [B, C, F, H, W], or for pictures [B, C, H, W], on the device and in the dtype of `like`."""
    layout = torch.contiguous_format
    if channels_innermost(like):
        layout = torch.channels_last if len(sizes) == 4 else torch.channels_last_3d
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=layout)


def laid_out(x: Tensor) -> Tensor:
    """A clip [B, C, F, H, W] as it is computed: `x` itself where it lies so, else a copy."""
    return x.contiguous(memory_format=torch.channels_last_3d) if channels_innermost(x) else x


def pictures(x: Tensor) -> Tensor:
    """The frames of a clip [B, C, F, H, W] as [B F, C, H, W], a view wherever there is one.

    Dimensions of one get strides here that torch takes for those of the layout, as `flatten` alone would not give them.
    """
    return x[0].transpose(0, 1) if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1)


def clip_of(pictures: Tensor, batch: int) -> Tensor:
    """A view [B, C, F, H, W] of pictures [B F, C, H, W]; the way back."""
    clips = pictures.unsqueeze(0) if batch == 1 else torch.unflatten(pictures, 0, (batch, -1))
    return clips.transpose(1, 2)
