"""Where a module keeps tensors: parameters, buffers, and attributes that are neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["Place", "places_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """One tensor where a module holds it."""

    name: str  # as in a state dict; ``path.attribute[key]`` for one in a list or dict
    kind: str  # "parameter", "buffer" or "attribute"
    is_saved: bool  # whether state dicts have it
    holder: Any  # the dict or list (or tuple, which cannot be written) that has it under `key`
    key: Any
    tensor: torch.Tensor

    @property
    def is_writable(self) -> bool:
        """Tell whether another tensor can be put there."""
        return not isinstance(self.holder, tuple)

    def put(self, tensor: torch.Tensor) -> None:
        """Put another tensor there."""
        self.holder[self.key] = tensor


def places_of(module: nn.Module) -> Iterator[Place]:
    """List all places of all modules in `module`, those of a module with several names under each of them.

    Lists, tuples and dicts are looked into, three deep. Left out are attributes that a hook of torch computes before each
    forward (weight_norm, spectral_norm and pruning in torch.nn.utils).
    """
    for prefix, child in module.named_modules(remove_duplicate=False):
        path = f"{prefix}." if prefix else ""
        unsaved = child._non_persistent_buffers_set  # noqa: SLF001 (torch has no public reader)
        for kind, held in (("parameter", child._parameters), ("buffer", child._buffers)):  # noqa: SLF001
            for key, tensor in held.items():
                if tensor is not None:
                    yield Place(path + key, kind, kind == "parameter" or key not in unsaved, held, key, tensor)
        computed = {_computed_by(hook) for hook in child._forward_pre_hooks.values()}  # noqa: SLF001
        for key, value in vars(child).items():
            if key not in ("_parameters", "_buffers", "_modules") and key not in computed:
                yield from _attributes(path + key, vars(child), key, value, depth=3)


def _attributes(name: str, holder: Any, key: Any, value: object, *, depth: int) -> Iterator[Place]:
    if isinstance(value, torch.Tensor):
        yield Place(name, "attribute", False, holder, key, value)
    elif depth and isinstance(value, dict | list | tuple):
        for at, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _attributes(f"{name}[{at!r}]", value, at, part, depth=depth - 1)


def _computed_by(hook: object) -> str | None:
    name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
    return name if isinstance(name, str) else None
