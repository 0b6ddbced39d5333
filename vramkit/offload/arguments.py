"""Move the tensors of a call to the device that computes, and leave everything else the very object that was given."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Container, MutableMapping
from typing import Any

import torch

from vramkit.errors import ConfigError

__all__ = ["any_requires_grad", "fields_of", "moved", "moved_call", "with_tensors"]

_HOLD_NOTHING = frozenset({type(None), bool, int, float, str})


def moved_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, unmoved_kwargs: Container[str] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with tensors on `device`, except keyword arguments named in `unmoved_kwargs`.

    Raises:
        ConfigError: a tensor is on the meta device, and so has no values.
    """
    new_kwargs = {name: value if name in unmoved_kwargs else moved(value, device) for name, value in kwargs.items()}
    return moved(args, device), new_kwargs


def moved(value: Any, device: torch.device) -> Any:
    """Return `value` with tensors on `device`; see `with_tensors` and, for errors, `moved_call`."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        if tensor.is_meta:
            raise ConfigError(
                f"an offloaded module was given a tensor of {list(tensor.shape)}, {tensor.dtype}, on the meta device, which "
                "has no values; expected one on a device that has memory: make it outside of torch.device('meta')"
            )
        return tensor.to(device, non_blocking=True)

    return with_tensors(value, move)


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `value` with what `change` makes of its tensors.

    Tuples, lists, mappings and dataclasses are rebuilt only where something in them changes; other objects, caches among
    them, pass as they are.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list) or _is_named_tuple(value):
        items = [with_tensors(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if _is_named_tuple(value) else type(value)(items)
    if type(value) in _HOLD_NOTHING:  # most arguments, and to be no mapping takes longer
        return value
    fields = fields_of(value)
    changed = {key: new for key, item in fields.items() if (new := with_tensors(item, change)) is not item}
    return _with_fields(value, changed) if changed else value


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def fields_of(value: Any) -> dict[Any, Any]:
    """Return what a mapping or a dataclass holds, by key; nothing for other objects."""
    if isinstance(value, MutableMapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return {}


def _with_fields(value: Any, changed: dict[Any, Any]) -> Any:
    rebuilt = copy.copy(value)
    if rebuilt is value or (isinstance(value, UserDict) and rebuilt.data is value.data):
        return value  # it cannot be copied without the original noticing
    for key, item in changed.items():
        if isinstance(rebuilt, MutableMapping):
            rebuilt[key] = item
        else:
            object.__setattr__(rebuilt, key, item)  # frozen ones too
    return rebuilt


def any_requires_grad(value: Any) -> bool:
    """Tell whether a tensor in `value` (looked for as `moved` does) asks for gradients."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if type(value) in (tuple, list) or _is_named_tuple(value):
        return any(map(any_requires_grad, value))
    return any(map(any_requires_grad, fields_of(value).values()))
