"""Move the tensors of a call to the device that computes, and leave everything else the very object that was given."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

__all__ = ["any_requires_grad", "moved", "moved_call"]


def moved_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, unmoved_kwargs: Container[str] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with tensors on `device`, except keyword arguments named in `unmoved_kwargs`."""
    new_kwargs = {name: value if name in unmoved_kwargs else moved(value, device) for name, value in kwargs.items()}
    return moved(args, device), new_kwargs


def moved(value: Any, device: torch.device) -> Any:
    """Return `value` with tensors on `device`.

    Tuples, named tuples, lists and dicts are rebuilt only where something in them moves; other objects, caches among
    them, pass as they are.
    """
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if type(value) in (tuple, list) or _is_named_tuple(value):
        items = [moved(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if _is_named_tuple(value) else type(value)(items)
    if type(value) is dict:
        pairs = {key: moved(item, device) for key, item in value.items()}
        return value if all(pairs[key] is value[key] for key in value) else pairs
    return value


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def any_requires_grad(value: Any) -> bool:
    """Tell whether a tensor in `value` (looked for as `moved` does) asks for gradients."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if type(value) in (tuple, list) or _is_named_tuple(value):
        return any(map(any_requires_grad, value))
    return type(value) is dict and any(map(any_requires_grad, value.values()))
