"""Masks of texts: ones for the tokens of a text, zeros for the padding that makes all texts equally long.

Padding stands behind the text with nearly all tokenizers. Then the mask is no more than a number of tokens, and cutting the
text does what masking does, with kernels that need no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_tokens", "text_lengths"]


def text_lengths(mask: Tensor) -> tuple[int, ...] | None:
    """The number of ones in each row of a mask [B, T], or None if one of them has zeros before ones.

    Waits for the device of the mask.
    """
    given = mask.bool()
    lengths = given.sum(dim=1)
    whole = (first_tokens(lengths, mask.shape[1]) == given).all(dim=1)
    counts = tuple(torch.where(whole, lengths, -1).tolist())
    return None if -1 in counts else counts


def first_tokens(lengths: Tensor, tokens: int) -> Tensor:
    """A mask [B, T] whose rows begin with `lengths` ones."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]
