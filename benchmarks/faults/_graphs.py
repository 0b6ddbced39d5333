"""Random module graphs, and histories of passes through them: what a graph is and does is drawn from one source of chance.

A graph has nested lists of layers, some of which share a weight or are in two places, parameters without a layer, and
buffers that passes write to. Each pass goes its own way through the layers: it skips some, comes by others twice, calls
them, or reads their weights.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Graph", "OnPurposeError", "Step", "change", "drawn_graph", "drawn_steps", "same"]

WIDTH = 16
Step = tuple[int, Literal["call", "read", "raise"]]


class OnPurposeError(Exception):
    """Raised in the middle of a pass."""


class Plain(nn.Linear):
    """One layer."""


class Mixed(nn.Module):
    """Two layers, as a block of a transformer has them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Scaled(nn.Module):
    """A parameter without a layer, and a buffer that is written in each forward."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.scale + self.calls


class Graph(nn.Module):
    """Lists of layers in lists; a forward takes the steps that it is given."""

    def __init__(self, tree: Sequence[Any], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.parts = _nested(tree, layers)
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forget_calls(self) -> None:
        """Let the buffers be what they were at first."""
        for layer in self.layers():
            if isinstance(layer, Scaled):
                layer.calls.zero_()

    def layers(self) -> list[nn.Module]:
        """Return the layers, each once, in the order of their definition."""
        return [part for part in self.parts.modules() if isinstance(part, Plain | Mixed | Scaled)]

    def forward(self, x: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
        """Take `steps` from `x`, [batch, WIDTH]."""
        layers = self.layers()
        x = self.entry(x)
        for at, way in steps:
            layer = layers[at % len(layers)]
            if way == "raise":
                raise OnPurposeError
            if way == "read":
                weight = next(layer.parameters())
                x = x + torch.tanh(weight.sum() * x)
            else:
                x = torch.tanh(layer(x)) + self.shift
        return x


def _nested(tree: Sequence[Any], layers: Sequence[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(layers[node] if isinstance(node, int) else _nested(node, layers) for node in tree)


def drawn_graph(draw: random.Random) -> Graph:
    """Return a graph of 1 to 10 layers."""
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 10)):
        kind = draw.choice(["linear", "mixed", "wide", "scaled", "tied"])
        tied = [layer for layer in layers if isinstance(layer, Plain)]
        if kind == "scaled":
            layers.append(Scaled())
        elif kind in ("mixed", "wide"):
            layers.append(Mixed(WIDTH * (1 if kind == "mixed" else 6)))
        else:
            layers.append(Plain(WIDTH, WIDTH))
            if kind == "tied" and tied:
                layers[-1].weight = draw.choice(tied).weight
    tree = _drawn_tree(draw, list(range(len(layers))))
    if draw.random() < 0.3:
        tree.append(draw.randrange(len(layers)))  # in two places
    return Graph(tree, layers).eval()


def _drawn_tree(draw: random.Random, nodes: list[int], depth: int = 0) -> list[Any]:
    if depth == 2 or len(nodes) < 2 or draw.random() < 0.4:
        return list(nodes)
    cut = draw.randint(1, len(nodes) - 1)
    return [_drawn_tree(draw, nodes[:cut], depth + 1), *_drawn_tree(draw, nodes[cut:], depth + 1)]


def drawn_steps(draw: random.Random, graph: Graph, *, fails: bool) -> list[Step]:
    """Return a way through the layers: mostly in order, with some left out, repeated, exchanged or read."""
    order = list(range(len(graph.layers())))
    for _ in range(draw.choice([0, 0, 1, 3])):
        at, other = draw.randrange(len(order)), draw.randrange(len(order))
        how = draw.choice(["exchange", "repeat", "skip"])
        if how == "exchange":
            order[at], order[other] = order[other], order[at]
        elif how == "repeat":
            order.insert(at, order[other])
        elif len(order) > 1:
            del order[at]
    steps: list[Step] = [(at, "read" if draw.random() < 0.15 else "call") for at in order]
    if fails:
        steps.insert(draw.randint(0, len(steps)), (0, "raise"))
    return steps


def change(draw: random.Random) -> Callable[[Graph], None]:
    """Return a change of weights or layers, to be made of two equal graphs."""
    seed, kind, where = draw.randrange(2**31), draw.choice(["scale", "replace", "requires_grad"]), draw.randrange(100)

    def apply(graph: Graph) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = graph.layers()
        layer = layers[where % len(layers)]
        if kind == "replace" and isinstance(layer, Mixed):
            layer.up = copy.deepcopy(layer.up)
            layer.up.weight.data.copy_(torch.randn(layer.up.weight.shape, generator=generator) * 0.2)
        elif kind == "requires_grad":
            graph.entry.weight.requires_grad_(bool(seed % 2))
        else:
            with torch.no_grad():
                next(layer.parameters()).mul_(0.5)

    return apply


def same(resident: nn.Module, streamed: nn.Module) -> bool:
    """Tell whether two modules hold the same bytes under the same names, with the same ties."""
    states = resident.state_dict(), streamed.state_dict()
    equal = all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    return states[0].keys() == states[1].keys() and equal and _ties(resident) == _ties(streamed)


def _ties(module: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(names.values())
