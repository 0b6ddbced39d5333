"""A model for checks of ranks, for which nothing but torch has to be there."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (67, 130)  # that no number of ranks divides


class Blocks(nn.Module):
    """Blocks, of which a call may skip some."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        narrow, wide = WIDTHS
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(narrow, wide), nn.GELU(), nn.Linear(wide, narrow)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor, skip: tuple[int, ...] = ()) -> torch.Tensor:
        for at, block in enumerate(self.blocks):
            x = x if at in skip else x + block(x)
        return x


def blocks(seed: int = 0) -> Blocks:
    torch.manual_seed(seed)
    return Blocks().eval().requires_grad_(False)
