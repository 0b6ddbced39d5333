"""Weights that an adapter changes in place: norms, convolutions, modulation tables, which no second matrix can stand beside.

Each is what it was plus what the adapters that count add, times their weights, rounded once. What it was is kept, so that
taking adapters out gives the same bytes back; these weights are small. They change inside `Offload.edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.casting.narrow import NarrowTensor
from vramkit.errors import ConfigError
from vramkit.tensors import is_plain
from vramkit.wrapper import WrapperTensor

__all__ = ["Differences", "refuse_unchangeable"]


class _Changed:
    """One parameter, and what adapters add to it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.base = _parameter(model, name)
        tied = (other for other, each in model.named_parameters(remove_duplicate=False) if each is self.base)
        self.names = list(dict.fromkeys([name, *tied]))
        self.changes: dict[str, Tensor] = {}

    def is_in_place(self, model: nn.Module) -> bool:
        """Whether `show` writes to the parameter that the model has: not to one that lies in a file, or is stored in fp8."""
        current = _parameter(model, self.names[0])
        return current is not self.base and is_plain(current)

    def show(self, model: nn.Module, scales: Mapping[str, float]) -> None:
        """Set it to what it was plus these adapters."""
        current = self._current(model)
        base = self.base.detach()
        if isinstance(base, WrapperTensor):
            base = base.dequantize()
        value = base.to(current.device, torch.float32, copy=True)
        for adapter, scale in scales.items():
            value.add_(self.changes[adapter].to(value.device, torch.float32), alpha=scale)
        if self.is_in_place(model):
            with torch.no_grad():
                current.copy_(value)
        else:
            self._replace(model, nn.Parameter(value.to(current.dtype), requires_grad=False))

    def restore(self, model: nn.Module) -> None:
        """Give the model what it had."""
        current, base = self._current(model), self.base
        if (current.device, current.dtype) != (base.device, base.dtype):
            base = nn.Parameter(base.detach().to(current.device, current.dtype), requires_grad=False)
        self._replace(model, base)

    def _current(self, model: nn.Module) -> nn.Parameter:
        """The parameter that the model has; casting that came after the adapter is done to what it was as well."""
        current = _parameter(model, self.names[0])
        came_after = not is_plain(current) and is_plain(self.base)
        if came_after and not isinstance(current, NarrowTensor):
            raise ConfigError(
                f"{self.names[0]} was quantized with what an adapter adds to it: load the model anew, and load adapters "
                "after quantizing"
            )
        if came_after:
            narrow = current.detach().clone()
            narrow.copy_(self.base)
            self.base = nn.Parameter(narrow, requires_grad=False)
        return current

    def _replace(self, model: nn.Module, parameter: nn.Parameter) -> None:
        for name in self.names:
            setattr(*_owner(model, name), parameter)


class Differences:
    """All parameters of a model that adapters change in place."""

    def __init__(self) -> None:
        self._changed: dict[str, _Changed] = {}

    @property
    def bases(self) -> dict[str, Tensor]:
        """What the parameters are without adapters."""
        return {name: each.base for name, each in self._changed.items()}

    def changes(self, adapter: str) -> dict[str, Tensor]:
        """What one adapter adds, by the names of parameters."""
        return {name: each.changes[adapter] for name, each in self._changed.items() if adapter in each.changes}

    def is_in_place(self, model: nn.Module) -> bool:
        """Whether `show` writes to the parameters that the model has, and replaces none."""
        return all(each.is_in_place(model) for each in self._changed.values())

    def add(self, model: nn.Module, adapter: str, changes: Mapping[str, Tensor]) -> None:
        """Take an adapter in; it counts from the next `show`."""
        for name, change in changes.items():
            if name not in self._changed:
                self._changed[name] = _Changed(model, name)
            self._changed[name].changes[adapter] = change.detach()

    def show(self, model: nn.Module, adapters: Sequence[str], scale_of: Callable[[str, str], float]) -> None:
        """Let these adapters count: ``scale_of(adapter, parameter)`` is how much."""
        for name, each in self._changed.items():
            scales = {adapter: scale_of(adapter, name) for adapter in adapters if adapter in each.changes}
            each.show(model, {adapter: scale for adapter, scale in scales.items() if scale})

    def drop(self, model: nn.Module, adapter: str) -> None:
        """Forget an adapter; parameters that no other one changes are what they were, the rest after the next `show`."""
        for name, each in list(self._changed.items()):
            each.changes.pop(adapter, None)
            if not each.changes:
                each.restore(model)
                del self._changed[name]

    def restore(self, model: nn.Module) -> None:
        """Give the model what it had."""
        for each in self._changed.values():
            each.restore(model)


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module), key  # a layer that carries adapters stands for its base


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    found: nn.Parameter = getattr(*_owner(model, name))
    return found


def refuse_unchangeable(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that is stored in a way in which it cannot be changed.

    Raises:
        ConfigError: one of integers or packed bits that does not say what its values are.
    """
    wide = is_plain(parameter) and parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1
    if not wide and not isinstance(parameter, WrapperTensor):
        raise ConfigError(
            f"{name} is quantized ({type(parameter).__name__}, {parameter.dtype}), and the adapter changes it as a whole: "
            "load the adapter without quantization of this layer, or fuse it before quantizing"
        )
