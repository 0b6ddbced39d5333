"""The tensors of a LoRA file, read into what they change of a model.

What a file changes is ``up @ down * alpha / rank`` per layer and, in some files, whole differences: of weights (``diff``),
of biases (``diff_b``), of modulation tables (``diff_m``). A difference is never scaled by alpha.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.errors import CheckpointError
from vramkit.pipelines.lora.config import LoraConfig
from vramkit.pipelines.lora.names import Names, parse, refuse_other_kinds

__all__ = ["AdapterWeights", "LoraWeights", "check_fit", "lora_weights"]

_DIFFERENCES = ("diff", "diff_b", "diff_m")
_Parts = dict[str, Tensor]  # part of a name -> tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraWeights:
    """What an adapter adds to one linear layer: ``(up @ down) * alpha / rank``, and a bias on the same scale."""

    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank]
    alpha: float
    bias: Tensor | None = None  # [outputs]

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AdapterWeights:
    """What an adapter changes of one model."""

    layers: dict[str, LoraWeights] = field(default_factory=dict)
    """By the names of linear layers."""
    changes: dict[str, Tensor] = field(default_factory=dict)
    """What is added to other weights, by the names of the parameters: norms, convolutions, tables; of their shapes."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Names of the file that the model has no place for -> why."""


class _DoesNotFitError(Exception):
    """A layer of the file is for another model."""


class _DamagedError(Exception):
    """A layer of the file makes no sense for any model."""


def lora_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    config: LoraConfig | None = None,
    *,
    source: str,
    bases: Mapping[str, Tensor] = MappingProxyType({}),
) -> AdapterWeights:
    """Read the tensors of a LoRA file for `model`.

    Args:
        model: its layers may carry adapters already.
        state: tensors by their names in the file.
        config: its alphas count where the file has none. Without both, alpha is the rank.
        source: the file, for messages.
        bases: what parameters are without adapters, of those that the model shows changed.

    Raises:
        CheckpointError: parts that are no LoRA, halves of pairs, shapes that do not go together, or another kind of adapter.
    """
    refuse_other_kinds(state, source)
    reading = _Reading(Names(model), config or LoraConfig(), bases)
    layers = {layer for layer, part in map(parse, state) if part != "alpha"}
    for key, tensor in state.items():
        reading.add(key, tensor, layers)
    for name in reading.found:
        reading.join(name)
    if problems := reading.problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}. Is it a LoRA file, and whole?"
        )
    return AdapterWeights(layers=reading.layers, changes=reading.changes, left_out=reading.left_out)


def check_fit(read: Mapping[str, AdapterWeights], state: Mapping[str, Tensor], *, source: str, model: str) -> None:
    """Warn, once, of what has no place in the models; `read` and the names in it are by component.

    Raises:
        CheckpointError: nothing has a place, or there is nothing.
    """
    left = {key: reason for weights in read.values() for key, reason in weights.left_out.items()}
    listed = "; ".join(f"{key} {reason}" for key, reason in list(left.items())[:5])
    listed += f"; and {len(left) - 5} more" if len(left) > 5 else ""
    if not any(weights.layers or weights.changes for weights in read.values()):
        if not left:
            raise CheckpointError(f"{source} holds no LoRA weights")
        raise CheckpointError(f"{source} does not fit {model}: {listed}. Is it for another model?")
    if left:
        share = sum(state[key].nbytes for key in left) / max(1, sum(tensor.nbytes for tensor in state.values()))
        warnings.warn(
            f"{source}: {len(left)} of {len(state)} tensors, {share:.1%} of its bytes, have no place in {model} and are "
            f"left out: {listed}",
            stacklevel=5,
        )


class _Reading:
    """One file on its way into the names of one model."""

    def __init__(self, names: Names, config: LoraConfig, bases: Mapping[str, Tensor]) -> None:
        self.names = names
        self.config = config
        self.bases = bases
        self.found: dict[str, _Parts] = defaultdict(dict)  # our name -> parts
        self.keys: dict[str, list[str]] = defaultdict(list)  # our name -> names in the file
        self.spelled: dict[str, str] = {}  # our name -> spelling of the file
        self.layers: dict[str, LoraWeights] = {}
        self.changes: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        self.problems: list[str] = []

    def add(self, key: str, tensor: Tensor, layers: Container[str]) -> None:
        """Sort one tensor to the layers that it is for, in a file that has `layers`."""
        layer, part = parse(key)
        if part is None:
            self.problems.append(f"{key} is not a name that LoRA files have")
            return
        if tensor.is_meta or tensor.is_complex() or not (tensor.is_floating_point() or part == "alpha"):
            self.problems.append(f"{key} is {tensor.dtype} on {tensor.device}, expected floating numbers")
            return
        spelling, names = self.names.find(layer, part)
        if part in ("value", "value_b") and not self._is_value(part, spelling, names):
            self.problems.append(f"{key} is not a name that LoRA files have")
        elif not names and part == "alpha" and layer not in layers:  # a strength, and nobody knows whose
            self.problems.append(f"{key} is an alpha of no layer in the file")
        elif not names:
            # Trainers write differences of layers that they did not train.
            if part not in _DIFFERENCES or _is_any(tensor):
                self.left_out[key] = "is not a name that the model knows"
        else:
            try:
                pieces = (
                    [tensor] * len(names) if part in ("down", "alpha") else self.names.rows(spelling, names, tensor)
                )
            except ValueError as error:
                self.left_out[key] = str(error)
                return
            for name, piece in zip(names, pieces, strict=True):
                if part in self.found[name]:
                    self.problems.append(f"{key} is there twice, under another name as well")
                self.found[name][part] = piece
                self.keys[name].append(key)
                self.spelled[name] = spelling

    def join(self, name: str) -> None:
        """Put the parts of one layer together."""
        parts = self.found[name]
        try:
            if name in self.names.tables:
                self._join_table(name, parts)
            else:
                self._join_module(name, self.names.modules[name], parts)
        except _DoesNotFitError as error:
            self.left_out |= dict.fromkeys(self.keys[name], str(error))
        except _DamagedError as error:
            self.problems.append(f"{name} {error}")

    def _is_value(self, part: str, spelling: str, names: tuple[str, ...]) -> bool:
        ways = (spelling, *names)
        return self.config.replaces(ways) or (part == "value_b" and self.config.has_biases)

    def _join_table(self, name: str, parts: _Parts) -> None:
        table = self.names.tables[name]
        for part, tensor in parts.items():
            if part not in ("diff", "diff_m"):
                raise _DamagedError(f"is a table, of which there is no {part}")
            if _is_any(tensor):
                if _squeezed(tensor) != _squeezed(table):
                    raise _DoesNotFitError(f"is {list(tensor.shape)}, the model has {list(table.shape)}")
                self.changes[name] = tensor.reshape(table.shape)

    def _join_module(self, name: str, module: nn.Module, parts: _Parts) -> None:
        bias = self._bias(name, module, parts)
        diff = self._difference(name, module, parts)
        pair = self._pair(name, module, parts)
        if isinstance(module, nn.Linear):
            if (weights := _linear(pair, diff, bias, module)) is not None:
                self.layers[name] = weights
            return
        if pair is not None:
            product = (_wide(pair.up) @ _wide(pair.down)).mul_(pair.alpha / pair.rank)
            diff = product.reshape(_shape(module)) if diff is None else diff + product.reshape(_shape(module))
        if diff is not None:
            self.changes[f"{name}.weight"] = diff
        if bias is not None:
            if pair is not None and pair.bias is not None:
                raise _DamagedError("has a bias of LoRA and is no linear layer")
            if module.bias is None:
                raise _DoesNotFitError("has a difference of a bias, the layer of the model has none")
            self.changes[f"{name}.bias"] = bias

    def _bias(self, name: str, module: nn.Module, parts: _Parts) -> Tensor | None:
        """What is added to the bias, whatever alpha is."""
        bias = parts.get("diff_b")
        if "value_b" in parts:
            if module.bias is None:
                raise _DoesNotFitError("has a bias, the layer of the model has none")
            _check_rows(parts["value_b"], module, "a bias")
            bias = self._added(parts["value_b"], f"{name}.bias", module.bias)
        if bias is None or not _is_any(bias):
            return None
        _check_rows(bias, module, "a bias")
        return bias

    def _difference(self, name: str, module: nn.Module, parts: _Parts) -> Tensor | None:
        """What is added to the weight, whatever alpha is."""
        diff, shape = parts.get("diff"), _shape(module)
        if "value" in parts:
            if tuple(parts["value"].shape) != shape:
                raise _DoesNotFitError(f"is {list(parts['value'].shape)}, the model has {list(shape)}")
            diff = self._added(parts["value"], f"{name}.weight", module.weight)
        if diff is None or not _is_any(diff):
            return None
        if tuple(diff.shape) != shape:
            raise _DoesNotFitError(f"has a diff of {list(diff.shape)}, the layer of the model is {list(shape)}")
        return diff

    def _added(self, value: Tensor, name: str, parameter: Any) -> Tensor:
        """What makes `value` of a parameter."""
        return _wide(value) - _wide(self.bases.get(name, parameter)).to(value.device)

    def _pair(self, name: str, module: nn.Module, parts: _Parts) -> LoraWeights | None:
        down, up = parts.get("down"), parts.get("up")
        if down is None and up is None:
            if "bias" in parts:
                raise _DamagedError("has a bias of LoRA without its weights")
            return None
        if down is None or up is None:
            raise _DamagedError(f"has no lora_{'A' if down is None else 'B'} weight")
        shapes = f"lora_A of {list(down.shape)} and lora_B of {list(up.shape)}"
        if min(down.ndim, up.ndim) > 1:
            down, up = down.flatten(1), up.flatten(1)  # convolutions; some write linear layers as those
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise _DamagedError(f"has {shapes}; expected [rank, in] and [out, rank]")
        outputs, inputs = _matrix(module)
        if (down.shape[1], up.shape[0]) != (inputs, outputs):
            raise _DoesNotFitError(
                f"is for {down.shape[1]} -> {up.shape[0]} features, the layer of the model has {inputs} -> {outputs}"
            )
        bias = parts.get("bias")
        if bias is not None:
            _check_rows(bias, module, "a bias of LoRA")
        rank = down.shape[0]
        if not rank:  # resized by a tool that found nothing in this layer
            return None
        alpha = parts.get("alpha")
        if alpha is not None and (alpha.numel() != 1 or not math.isfinite(alpha)):
            given = list(alpha.shape) if alpha.numel() != 1 else float(alpha)
            raise _DamagedError(f"has an alpha of {given}, expected one number")
        scale = self.config.alpha((self.spelled[name], name), rank) if alpha is None else float(alpha)
        return LoraWeights(down=down, up=up, alpha=scale, bias=bias)


def _linear(
    pair: LoraWeights | None, diff: Tensor | None, bias: Tensor | None, module: nn.Linear
) -> LoraWeights | None:
    """Everything that is added to a linear layer as one LoRA, whose scale the differences do not take part in."""
    if pair is not None and diff is None and (bias is None or pair.alpha):
        if bias is None:
            return pair
        bias = _wide(bias) * (pair.rank / pair.alpha)  # the bias of a LoRA is scaled as its weights are
        bias = bias if pair.bias is None else bias + _wide(pair.bias)
        return LoraWeights(down=pair.down, up=pair.up, alpha=pair.alpha, bias=bias)
    downs, ups = [], []
    if pair is not None and pair.alpha:
        factor = pair.alpha / pair.rank
        downs, ups = [pair.down], [_wide(pair.up) * factor]
        if pair.bias is not None:
            bias = _wide(pair.bias) * factor + (0 if bias is None else _wide(bias))
    if diff is not None:
        eye = torch.eye(min(diff.shape), dtype=diff.dtype)
        is_wide = diff.shape[0] <= diff.shape[1]
        downs, ups = [*downs, diff if is_wide else eye], [*ups, eye if is_wide else diff]
    if not downs:
        if bias is None:
            return pair
        downs, ups = [bias.new_zeros(1, module.in_features)], [bias.new_zeros(module.out_features, 1)]
    is_one = len(downs) == 1
    down = downs[0] if is_one else torch.cat([_wide(each) for each in downs])
    up = ups[0] if is_one else torch.cat([_wide(each) for each in ups], dim=1)
    return LoraWeights(down=down, up=up, alpha=float(down.shape[0]), bias=bias)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a weight; packed ones do not have it."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def _matrix(module: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of the matrix that a weight is."""
    outputs, *inner = _shape(module)
    inputs = 1
    for size in inner:
        inputs *= size
    return outputs, inputs


def _check_rows(bias: Tensor, module: nn.Module, what: str) -> None:
    if tuple(bias.shape) != _shape(module)[:1]:
        raise _DoesNotFitError(f"has {what} of {list(bias.shape)}, expected [{_shape(module)[0]}]")


def _squeezed(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _is_any(tensor: Tensor) -> bool:
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).any())
