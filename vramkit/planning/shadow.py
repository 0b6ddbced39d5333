"""Twins without memory: of modules, and of a pipeline around them. The originals are read, never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vramkit import tensors

__all__ = ["shadow_of", "shadows_of"]

_KNOWN_BYTES = 2**18  # buffers up to this size keep their values: masks, tables of positions


def shadows_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return twins of `modules` whose weights are on the meta device; what they share, their twins share."""
    memo: dict[int, Any] = {}
    for module in modules.values():
        for part in module.modules():
            for parameter in part._parameters.values():  # noqa: SLF001 (`parameters()` is overridden by models of others)
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = _without_memory(parameter)
            for buffer in part._buffers.values():  # noqa: SLF001
                if buffer is not None and (buffer.is_meta or buffer.nbytes > _KNOWN_BYTES) and id(buffer) not in memo:
                    memo[id(buffer)] = _without_memory(buffer)
            for held in vars(part).values():  # weights that are computed before each call, as weight norms do
                if isinstance(held, torch.Tensor) and not held.is_leaf:
                    memo[id(held)] = _without_memory(held)
    kept = list(memo)  # deepcopy puts more into the memo, and keeps what it has copied alive there
    shared = {key: memo[key] for key in kept}
    return {name: copy.deepcopy(module, shared).requires_grad_(requires_grad=False) for name, module in modules.items()}


def shadow_of(pipeline: Any, shadows: Mapping[str, nn.Module]) -> Any:
    """Return a twin of `pipeline` with `shadows` in the place of its modules, and schedulers of its own."""
    twin = copy.copy(pipeline)
    for name, component in getattr(pipeline, "components", {}).items():
        if name in shadows:
            vars(twin)[name] = shadows[name]
        elif hasattr(component, "set_timesteps"):
            vars(twin)[name] = copy.deepcopy(component)
    for name in ("together", "branches"):  # a rehearsal is of one process
        if name in vars(twin):
            vars(twin)[name] = None
    if hasattr(twin, "set_progress_bar_config"):
        twin._progress_bar_config = {}  # noqa: SLF001 - both kinds of pipelines keep it under this name
        twin.set_progress_bar_config(disable=True)
    return twin


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "__tensor_flatten__"):
        bare = tensors.rebuild(tensor, [leaf.to("meta") for leaf in tensors.leaves(tensor)])
    else:
        bare = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensors.as_owned(bare, like=tensor) if isinstance(tensor, nn.Parameter) else bare
