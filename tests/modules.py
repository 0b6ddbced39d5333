"""Toy models that the engine's tests share: each has one shape of trouble. All are tiny, float32 and in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from vramkit.offload import load_mapped

WIDTH = 48  # C: channels of every token stream, [B, S, C]
BLOCKS = 7


class Block(nn.Module):
    """Norm, two linear layers, a residual."""

    def __init__(self, width: int = WIDTH, hidden: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden or 2 * width)
        self.down = nn.Linear(hidden or 2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class BlockNet(nn.Module):
    """What most transformers look like: an embedder, a list of blocks, a head."""

    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class NestedNet(nn.Module):
    """Block lists at several depths: stages of lists in a list, and a Sequential that is called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(3))
        self.tail = nn.Sequential(Block(), nn.Sequential(Block(), nn.GELU()), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.body.stages:
            for block in stage:
                x = block(x)
        return self.tail(x)


class Table(nn.Module):
    """A module that is never called: its parent reads its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)
        self.shifts = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(2))


class TableBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x) @ self.table.scale + self.table.shifts[0] * self.table.shifts[1]
        return torch.tanh(x @ self.own)


class TableNet(nn.Module):
    """Parameter-only modules inside blocks and at the root, and parameters of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.own = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(TableBlock() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.table.scale + self.own
        for block in self.blocks:
            x = block(x)
        return x


class TwiceNet(nn.Module):
    """Modules that are called more than once, in the pass and in the tree: loops, and one block in two places."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = Block(), Block(), Block()
        self.blocks = nn.ModuleList([first, second, first, third, Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.blocks[1](self.blocks[1](x))


class BackwardNet(nn.Module):
    """Blocks and the layers in them run in another order than they are defined in."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(WIDTH, WIDTH)
            self.middle = nn.Linear(WIDTH, WIDTH)
            self.first = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.last(F.gelu(self.middle(F.gelu(self.first(x)))))

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(self.Reversed() for _ in range(6))
        self.embed = nn.Linear(8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


class OrderNet(nn.Module):
    """Runs the blocks that it is told to, in that order; block -1 is a branch that no other call takes."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.branch = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for index in order:
            if index >= 0:
                x = self.blocks[index](x)
            else:
                for block in self.branch:
                    x = block(x)
        return x


class TiedNet(nn.Module):
    """An output projection tied to the token table, two blocks with one weight, one buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.tokens.weight
        self.blocks[4].up.weight = self.blocks[1].up.weight
        self.register_buffer("gain", torch.rand(WIDTH))
        self.blocks[0].register_buffer("gain", self.gain)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) * self.gain
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.blocks[0].gain)


class StatefulNet(nn.Module):
    """Buffers that a forward writes to, puts others in the place of, and a cache that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("scratch", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.scratch.copy_(x.mean(dim=(0, 1)))
        for block in self.blocks:
            x = block(x)
        self.mean = 0.5 * self.mean + x.detach().mean(dim=(0, 1))
        return x * self.count + self.mean + self.scratch


class AttentionNet(nn.Module):
    """Modules whose forward reads the parameters of their children, or keeps lists of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(4))
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        x = x + self.rnn(x)[0]
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class StridedNet(nn.Module):
    """Weights with strides of their own, holes, no elements, no dimensions, and dtypes other than float32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Strided() for _ in range(5))

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)
            self.transposed = nn.Parameter((torch.randn(WIDTH, WIDTH) * 0.2).t())
            self.holes = nn.Parameter((torch.randn(WIDTH, 2 * WIDTH) * 0.2)[:, ::2])
            self.empty = nn.Parameter(torch.empty(0, WIDTH))
            self.scalar = nn.Parameter(torch.tensor(0.7))
            self.narrow = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) * 0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.lin(x) @ self.transposed @ self.holes) * self.scalar
            return x + (x.bfloat16() @ self.narrow).float() + self.empty.sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Codec(nn.Module):
    """An autoencoder whose methods call its parts and never its forward; whole, or tile by tile."""

    def __init__(self, encoder_blocks: int = 3, decoder_blocks: int = 4) -> None:
        super().__init__()
        self.use_tiling = False
        self.encoder = nn.Sequential(nn.Linear(8, WIDTH), *(Block() for _ in range(encoder_blocks)))
        self.quant = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Block() for _ in range(decoder_blocks))
        self.out = nn.Linear(WIDTH, 8)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.use_tiling:
            return torch.cat([self._decode(tile) for tile in z.split(2, dim=1)], dim=1)
        return self._decode(z)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        for layer in self.decoder.layers:
            z = layer(z)
        return self.out(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


class WideNet(nn.Module):
    """One block is several times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(40))
        self.blocks.insert(3, Block(hidden=5 * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tokens(channels: int, batch: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randn(batch, length, channels)


# name -> (class, positional arguments for one forward)
CASES: dict[str, tuple[type[nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "blocks": (BlockNet, lambda: (tokens(8),)),
    "nested": (NestedNet, lambda: (tokens(WIDTH),)),
    "parameter_only": (TableNet, lambda: (tokens(WIDTH),)),
    "called_twice": (TwiceNet, lambda: (tokens(WIDTH),)),
    "backward_order": (BackwardNet, lambda: (tokens(8),)),
    "tied": (TiedNet, lambda: (torch.randint(0, 40, (2, 6)),)),
    "stateful": (StatefulNet, lambda: (tokens(WIDTH),)),
    "attention_rnn_conv": (AttentionNet, lambda: (tokens(WIDTH),)),
    "strided": (StridedNet, lambda: (tokens(WIDTH),)),
    "codec": (Codec, lambda: (tokens(8),)),
    "wide": (WideNet, lambda: (tokens(WIDTH),)),
}


def save(model: nn.Module, path: Path) -> Path:
    """Write the distinct tensors of `model` with the reference implementation of safetensors."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in kept)]
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in named}, path)
    return path


def mapped_copy(model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of `model` whose weights are views of a new file in `folder`."""
    path = save(model, folder / f"{len(list(folder.iterdir()))}.safetensors")
    return load_mapped(copy.deepcopy(model), path, dtype=dtype)


_HOOKS = [
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_pre_hooks",
]


def traces(module: nn.Module) -> dict[str, Any]:
    """What applying may leave on a module, by where it is."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found[f"{name}.__dict__"] = sorted(vars(part))
        found[f"{name} hooks"] = {held: len(getattr(part, held)) for held in _HOOKS}
        for key, parameter in part.named_parameters(recurse=False):
            found[f"{name}.{key}"] = (id(parameter), parameter.requires_grad, parameter.device)
    return found
