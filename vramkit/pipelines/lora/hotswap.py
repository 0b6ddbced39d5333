"""Adapters in the place of others: the same tensors, so nothing that was compiled or laid out for them changes.

Adapters that will be swapped are padded with zeros to one rank, and their alphas are worked into their weights: a scale that
changed would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.lora.keys import LoraWeights

__all__ = ["fits", "owned", "padded", "write"]


def padded(weights: Mapping[str, LoraWeights], target_rank: int | None) -> dict[str, LoraWeights]:
    """Return the weights with `target_rank` and a scale of 1; as they are, where it is None.

    Raises:
        ConfigError: a rank above `target_rank`.
    """
    if target_rank is None:
        return dict(weights)
    highest = max((each.rank for each in weights.values()), default=0)
    if highest > target_rank:
        raise ConfigError(
            f"the adapter has rank {highest}, above target_rank={target_rank}: enable_lora_hotswap(target_rank={highest}) "
            "before the first adapter is loaded"
        )
    return {name: _padded(each, target_rank) for name, each in weights.items()}


def fits(layers: Mapping[str, Any], adapter: str, weights: Mapping[str, LoraWeights]) -> str | None:
    """Say why the tensors of an adapter have no room for `weights`; None if they have."""
    for name, each in weights.items():
        layer = layers.get(name)
        if layer is None or adapter not in layer.lora_A:
            return f"{adapter!r} has no layer {name}, the new adapter has"
        if each.rank > layer.r[adapter]:
            return f"{adapter!r} has room for rank {layer.r[adapter]} at {name}, the new adapter has rank {each.rank}"
        if each.bias is not None and layer.lora_B[adapter].bias is None:
            return f"{adapter!r} has no bias at {name}, the new adapter has"
        if not layer.lora_alpha[adapter]:
            return f"{adapter!r} has alpha 0 at {name}"
    return None


def owned(layers: Mapping[str, Any], adapter: str) -> None:
    """Give an adapter tensors of its own: those that it was loaded with lie in a file, or belong to whoever gave them."""
    for layer in layers.values():
        if adapter in layer.lora_A:
            for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                for key, parameter in list(part.named_parameters(recurse=False)):
                    setattr(part, key, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@torch.no_grad()
def write(layers: Mapping[str, Any], adapter: str, weights: Mapping[str, LoraWeights]) -> None:
    """Write `weights` into the tensors of an adapter; layers that they lack get zeros."""
    for name, layer in layers.items():
        if adapter not in layer.lora_A:
            continue
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if name not in weights:
            up.weight.zero_()
            if up.bias is not None:
                up.bias.zero_()
            continue
        rank = layer.r[adapter]
        each = _padded(weights[name], rank, unit=layer.lora_alpha[adapter] / rank)
        down.weight.copy_(each.down)
        up.weight.copy_(each.up)
        if up.bias is not None:
            up.bias.copy_(torch.zeros_like(up.bias) if each.bias is None else each.bias)


def _padded(weights: LoraWeights, rank: int, unit: float = 1.0) -> LoraWeights:
    """Return the same effect with another rank, under a scale of `unit`."""
    more, factor = rank - weights.rank, weights.alpha / weights.rank / unit
    up, bias = weights.up, weights.bias
    if factor != 1:
        up = _scaled(up, factor)
        bias = None if bias is None else _scaled(bias, factor)
    down = torch.cat([weights.down, weights.down.new_zeros(more, weights.down.shape[1])])
    up = torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1)
    return LoraWeights(down=down, up=up, alpha=rank * unit, bias=bias)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor.detach().float().mul(factor)
