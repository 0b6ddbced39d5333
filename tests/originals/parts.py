"""What several of them are made of, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 48

Put = Callable[[torch.Tensor], torch.Tensor]
Call = Callable[[Any, Put], list[torch.Tensor]]
Original = tuple[Callable[[], nn.Module], Call]


def ones(*shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers around one, the same for every model that is made to compare."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def rotations(length: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(length), 1 / 10 ** torch.linspace(0, 2, WIDTH // 2))
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        pairs = torch.view_as_complex(x.to(torch.float32).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs).flatten(2).type_as(x)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2).to(v.dtype) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """Reads its weight, by whichever name, and casts it."""

    def __init__(self, name: str = "weight", width: int = WIDTH) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Parameter(torch.rand(width) + 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return normal.type_as(x) * getattr(self, self.name).to(x.dtype)


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))


def tokens_and(*shapes: tuple[int, ...]) -> Call:
    def call(model: nn.Module, put: Put) -> list[torch.Tensor]:
        got = model(put(ones(2, 8, WIDTH)), *(put(ones(*shape, seed=3)) for shape in shapes))
        return list(got) if isinstance(got, tuple) else [got]

    return call


def given(*values: torch.Tensor, method: str = "__call__") -> Callable[[Any, Put], list[torch.Tensor]]:
    return lambda model, put: [getattr(model, method)(*map(put, values))]
