"""The adapters of one model: layers beside linear ones, and other weights that are changed in place, as one thing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload.offloaded import editable, offload_of
from vramkit.pipelines.lora import layers
from vramkit.pipelines.lora.differences import Differences, refuse_unchangeable
from vramkit.pipelines.lora.hotswap import fits, owned, padded, write
from vramkit.pipelines.lora.keys import AdapterWeights

__all__ = ["ModelAdapters", "Weight", "check_name", "name_to_swap", "new_name"]

Weight = float | Mapping[str, float]  # of an adapter: for all layers, or by a part of their names

_KEY = "_lora_adapters"  # the attribute of a model that has the state


@dataclass(slots=True, eq=False)
class _State:
    weights: dict[str, Weight] = field(default_factory=dict)  # of all adapters, in the order of loading
    active: list[str] = field(default_factory=list)
    fused: dict[str, float] = field(default_factory=dict)  # adapter -> lora_scale
    apart: dict[str, layers.Apart] = field(default_factory=dict)  # layers whose adapters are fused and not in place
    is_enabled: bool = True
    differences: Differences = field(default_factory=Differences)
    target_rank: int | None = None  # of adapters that will be swapped
    owned: set[str] = field(
        default_factory=set
    )  # adapters whose tensors are nobody else's, so that they may be written to

    def __bool__(self) -> bool:
        """Whether there are adapters: what the model shows is not what its files would hold."""
        return bool(self.weights)


class ModelAdapters:
    """Reads and changes the adapters of `model`, which keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self._is_compiled = self.model is not model
        self._state: _State = self.model.__dict__.setdefault(_KEY, _State())

    @property
    def names(self) -> list[str]:
        """All adapters, in the order of loading."""
        return list(self._state.weights)

    @property
    def active(self) -> list[str]:
        """Those that count."""
        return list(self._state.active)

    @property
    def fused(self) -> list[str]:
        """Those that are merged into the weights."""
        return list(self._state.fused)

    @property
    def differences(self) -> Differences:
        """The weights that are changed in place."""
        return self._state.differences

    def refuse_fused(self) -> None:
        """Refuse changes beside adapters that are merged.

        Raises:
            ConflictError: some are.
        """
        if self.fused:
            raise ConflictError(
                f"{', '.join(self.fused)} is fused into the weights, beside which adapters do not count: unfuse_lora() "
                "first, or unload_lora_weights() to keep what is fused"
            )

    def check(self, weights: AdapterWeights) -> None:
        """Refuse an adapter that changes what cannot be changed, before anything is.

        Raises:
            ConfigError: it changes a quantized weight that is no linear layer's, or PEFT is missing.
        """
        if weights.layers:
            layers.require_peft()
        for name in weights.changes:
            refuse_unchangeable(name, self.model.get_parameter(name))

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter as files of diffusers name them, with alpha = rank; differences as ``diff``."""
        state: dict[str, Tensor] = {}
        apart = {layer_name: each.layer for layer_name, each in self._state.apart.items()}
        for layer_name, layer in (layers.lora_layers(self.model) | apart).items():
            if name in layer.lora_A:
                state[f"{layer_name}.lora_A.weight"] = layer.lora_A[name].weight
                up, factor = layer.lora_B[name], layer.lora_alpha[name] / layer.r[name]
                state[f"{layer_name}.lora_B.weight"] = up.weight * factor
                if up.bias is not None:
                    state[f"{layer_name}.lora_B.bias"] = up.bias * factor
        for parameter, change in self.differences.changes(name).items():
            path, _, key = parameter.rpartition(".")
            names = {"weight": f"{path}.diff", "bias": f"{path}.diff_b"}
            state[names.get(key, f"{parameter}.diff")] = change
        return state

    def add(self, name: str, weights: AdapterWeights) -> None:
        """Load an adapter, which counts from now on, at weight 1, and no other does."""
        held = padded(weights.layers, self._state.target_rank)
        dtype = _dtype(self.model)
        with editable(self.model):
            self._state.weights[name] = 1.0  # first: what fails below is to be deleted again
            try:
                if held:
                    layers.insert(self.model, name, held, dtype)
                self._state.differences.add(self.model, name, weights.changes)
            except BaseException:
                self.delete(name)
                raise
            if self._state.target_rank is not None:
                owned(layers.lora_layers(self.model), name)
                self._state.owned.add(name)
            self._state.active, self._state.is_enabled = [name], True
            layers.activate(self.model, [name], self.scale)
            layers.enable(self.model, enabled=True)
            self._show()

    def swap(self, name: str, weights: AdapterWeights) -> None:
        """Put other weights in the place of those of an adapter: in the same tensors where they have room.

        Raises:
            ConfigError: they have no room, and the model is compiled.
        """
        reason = fits(layers.lora_layers(self.model), name, weights.layers)
        if reason is not None and self._is_any_compiled():
            raise ConfigError(
                f"{reason}, and a compiled model would be compiled anew: enable_lora_hotswap(target_rank=...) before the "
                "first load_lora_weights, whose adapter has all the layers"
            )
        active = self.active
        if reason is not None:
            self.delete(name)
            self.add(name, weights)
        else:
            known = self.differences.changes(name).keys() == weights.changes.keys()
            with self._opened(is_in_place=known and name in self._state.owned):
                if name not in self._state.owned:
                    owned(layers.lora_layers(self.model), name)
                    self._state.owned.add(name)
                write(layers.lora_layers(self.model), name, weights.layers)
                if not known:
                    self.differences.drop(self.model, name)
                self.differences.add(self.model, name, weights.changes)
                self._state.weights[name] = 1.0
                self._show()
        self.activate({each: self._state.weights[each] for each in active})

    def allow_swaps(self, target_rank: int) -> None:
        """Give adapters that are loaded from now on room for others of ranks up to `target_rank`."""
        self._state.target_rank = target_rank

    def activate(self, weights: Mapping[str, Weight]) -> None:
        """Let these adapters count, and no others."""
        before = self._shown()
        self._state.active = list(weights)
        self._state.weights |= weights
        layers.activate(self.model, self.active, self.scale)
        self._show_again(before)

    def enable(self, *, enabled: bool) -> None:
        """Let the adapters that count be used, or none at all."""
        before = self._shown()
        self._state.is_enabled = enabled
        layers.enable(self.model, enabled=enabled)
        self._show_again(before)

    def delete(self, name: str) -> None:
        """Unload an adapter; where it alone counted, the oldest of the others does from now on."""
        with editable(self.model):
            layers.delete(self.model, name)
            self.differences.drop(self.model, name)
            del self._state.weights[name]
            others = self.names[:1] if self.active == [name] else [each for each in self.active if each != name]
            if others != self.active:
                self._state.active = others
                layers.activate(self.model, others, self.scale)
            self._state.owned.discard(name)
            self._show()

    def take_out(self) -> None:
        """Unload all; what is fused stays in the weights."""
        with editable(self.model):
            layers.keep_merged(self.model, self._state.apart)
            layers.take_out(self.model)
            if not self.fused:
                self.differences.restore(self.model)
        target_rank = self._state.target_rank
        self._state = self.model.__dict__[_KEY] = _State(target_rank=target_rank)

    def refuse_unmergeable(self, names: Sequence[str], scale: float, *, finite: bool, in_place: bool) -> None:
        """Refuse to merge what cannot be, before anything is.

        Raises:
            ConfigError: quantized weights, an adapter with a bias for a layer without one, or, where they are to be
                `finite`, weights that are not.
        """
        layers.refuse_unmergeable(self.model, names, in_place=in_place)
        if finite:
            layers.refuse_infinite(self.model, names, scale)

    def merge(self, names: Sequence[str], scale: float, *, in_place: bool) -> None:
        """Add adapters to the weights, each times its weight and `scale`; not `in_place`: where they are used."""
        with editable(self.model):
            layers.enable(self.model, enabled=True)  # PEFT's layers take what is merged out when they are disabled
            if in_place:
                layers.merge(self.model, names, scale)
            else:
                try:
                    layers.merge_apart(self.model, names, scale, self._state.apart)
                except BaseException:
                    layers.unmerge_apart(self.model, self._state.apart)
                    raise
            self._state.fused = dict.fromkeys(names, scale)
            self._show()

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.fused:
            with editable(self.model):
                layers.unmerge_apart(self.model, self._state.apart)
                layers.unmerge(self.model)
                layers.enable(self.model, enabled=self._state.is_enabled)
                self._state.fused = {}
                self._show()

    def scale(self, adapter: str, name: str) -> float:
        """Return the weight of an adapter at a layer or parameter: the first entry that its name has in it, else 1."""
        weight = self._state.weights[adapter]
        if not isinstance(weight, Mapping):
            return float(weight)
        return next((float(each) for part, each in weight.items() if is_part(part, name)), 1.0)

    def refuse_unknown_parts(self, adapter: str, weight: Mapping[str, float]) -> None:
        """Refuse weights for blocks in which an adapter has nothing.

        Raises:
            ConfigError: such a part of names.
        """
        held = [name for name, layer in layers.lora_layers(self.model).items() if adapter in layer.lora_A]
        held += self.differences.changes(adapter)
        unknown = [part for part in weight if not any(is_part(part, name) for name in held)]
        if unknown:
            raise ConfigError(
                f"weights for {', '.join(map(repr, unknown))}, and {adapter!r} has no layer with that in its name; it has "
                f"{', '.join(held[:3])} and {max(0, len(held) - 3)} more"
            )

    def _show(self) -> None:
        names, factor = self._shown()
        self.differences.show(self.model, names, lambda adapter, name: factor[adapter] * self.scale(adapter, name))

    def _shown(self) -> tuple[list[str], dict[str, float]]:
        """Which adapters the weights that are changed in place show, and how much of each besides its weight."""
        factor = self._state.fused or dict.fromkeys(self.active if self._state.is_enabled else (), 1.0)
        return list(factor), dict(factor)

    def _show_again(self, before: tuple[list[str], dict[str, float]]) -> None:
        changed = [*before[0], *self._shown()[0]]
        if any(self.differences.changes(adapter) for adapter in changed):
            with self._opened(is_in_place=True):
                self._show()

    @contextlib.contextmanager
    def _opened(self, *, is_in_place: bool) -> Iterator[None]:
        """Open the model for changes; written in place, weights in memory are read anew by themselves."""
        offloads = [offload_of(part) for part in self.model.modules()]
        kinds = {kind for offload in offloads if offload is not None for kind in offload.stats().stores}
        if is_in_place and not kinds & {"disk", "mapped"} and self.differences.is_in_place(self.model):
            with torch.no_grad():
                yield
        else:
            with editable(self.model):
                yield

    def _is_any_compiled(self) -> bool:
        return self._is_compiled or any(
            getattr(part, "_compiled_call_impl", None) is not None for part in self.model.modules()
        )


def is_part(part: str, name: str) -> bool:
    """Whether `name` has `part` in it; ``blocks.1`` is no part of ``blocks.10``."""
    return re.search(re.escape(part) + (r"(?!\d)" if part[-1:].isdigit() else ""), name) is not None


def check_name(name: str | None) -> None:
    """Refuse what cannot be the name of an adapter.

    Raises:
        ConfigError: no name, or one with a dot.
    """
    if name is not None and (not isinstance(name, str) or not name or "." in name):
        raise ConfigError(f"adapter_name={name!r} is no name without dots; choose another one")


def new_name(targets: Mapping[str, ModelAdapters], given: str | None) -> str:
    """Return the name of an adapter to come; models that it is not for may have one of the same name.

    Raises:
        ConfigError: it is taken.
    """
    taken = list(dict.fromkeys(name for model in targets.values() for name in model.names))
    if given is None:
        number = len(taken)
        while f"default_{number}" in taken:
            number += 1
        return f"default_{number}"
    if given in taken:
        raise ConfigError(
            f"adapter_name={given!r} is taken; loaded: {', '.join(taken)}. Choose another one, or "
            f"delete_adapters({given!r}) first"
        )
    return given


def name_to_swap(targets: Mapping[str, ModelAdapters], given: str | None) -> str:
    """Return the name of a loaded adapter in whose place another one comes.

    Raises:
        ConfigError: one of the models has none of this name.
    """
    active = [name for model in targets.values() for name in model.active]
    name = given if given is not None else next(iter(active), "default_0")
    for component, model in targets.items():
        if name not in model.names:
            raise ConfigError(
                f"no adapter {name!r} in {component} to put another one in the place of; loaded: "
                f"{', '.join(model.names) or 'none'}"
            )
    return name


def _dtype(model: Any) -> torch.dtype:
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
