"""Weights in fewer bytes than they were given in: what a plan may choose where results need not be exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vramkit.casting import apply_layerwise_casting
from vramkit.errors import ConfigError
from vramkit.planning.components import Component
from vramkit.planning.device import Device
from vramkit.planning.ledger import Ledger
from vramkit.planning.plans import Allowed
from vramkit.tensors import is_plain

__all__ = ["STORED", "Narrowed", "Stored", "narrow_shadow", "ways_to_store"]

_COMPUTES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """One way to store the large weights of a component, and how much of the signal it leaves over the noise, in decibels.

    The figures are those of benchmarks/results/quality.json (docs/quantization.md), the worst of five models, where layers
    that models name as fragile stay wide.
    """

    name: str
    backend: str
    """Of `vramkit.quant`, or ``"casting"``."""
    options: tuple[tuple[str, Any], ...] = ()
    weights_db: float | None = None
    """Of the weights; None where nothing was measured."""
    layer_db: float | None = None
    """Of the output of a layer."""
    forward_db: float | None = None
    """Of the output of a model."""
    keeps_fragile: bool = True
    """Whether layers stay wide that lose more than others: embeddings, norms, modulation, heads."""

    @property
    def is_widened_once(self) -> bool:
        """Whether a loop over chunks keeps the wide weights that it uses; else one at a time is wide, in its product."""
        return self.backend == "casting"

    def described(self) -> str:
        """Return what is known of the error."""
        if self.weights_db is None:
            return "fragile layers as well, whose error was not measured"
        return (
            f"{self.weights_db:g} dB; the least that was measured is {self.layer_db:g} dB in the output of a layer and "
            f"{self.forward_db:g} dB in that of a model"
        )


# Those that lose less come first.
_BOUNDED = (
    Stored("int8", "quanto", (("weights", "int8"),), 41.1, 37.6, 29.0),
    Stored("fp8", "casting", (), 31.5, 30.8, 24.5),
    Stored("nf4", "bitsandbytes_4bit", (("quant_type", "nf4"),), 20.6, 19.3, 12.1),
)
_UNBOUNDED = (Stored("nf4 throughout", "bitsandbytes_4bit", (("quant_type", "nf4"),), keeps_fragile=False),)
STORED: Mapping[str, Stored] = {way.name: way for way in (*_BOUNDED, *_UNBOUNDED)}


def ways_to_store(allow: Allowed) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    """Return the ways that `allow` lets a plan choose, those that lose less first; and notes on what is not installed."""
    allowed = {"exact": (), "bounded": _BOUNDED, "any": _BOUNDED + _UNBOUNDED}[allow]
    found = tuple(way for way in allowed if _is_installed(way))
    missing = ", ".join(way.name for way in allowed if way not in found)
    notes = (f'not looked at, for want of packages: {missing}; pip install "vramkit[quant]"',) if missing else ()
    return found, notes


def narrow_shadow(component: Component, way: Stored) -> bool:
    """Narrow a twin without memory; False where that is not done: to autoencoders, and to what is narrow already."""
    module = component.module
    if component.phase == "decode" or not all(is_plain(parameter) for parameter in module.parameters()):
        return False
    ledger = Ledger({}, {})
    try:
        with torch.no_grad(), ledger, Device(torch.device("cpu"), ledger):
            if way.backend == "casting":
                _cast(module)
            else:
                _quantize_twin(module, way)
    except ConfigError:  # no layer to narrow
        return False
    return True


class Narrowed:
    """Which components are stored in less, and how that is undone.

    Undoing gives weights as they were rounded. So a component that is narrow is planned to be no wider before that: the
    plan would promise more than there is.
    """

    def __init__(self) -> None:
        self._undo: dict[str, tuple[str, Callable[[], None]]] = {}

    @property
    def ways(self) -> dict[str, str]:
        """By component, the name of the way."""
        return {name: way for name, (way, _) in self._undo.items()}

    def become(self, name: str, module: nn.Module, way: Stored) -> None:
        """Store a component so, unless it is already.

        Raises:
            ConfigError, ConflictError: as `apply_layerwise_casting` and `quantize`.
        """
        if self.ways.get(name) == way.name:
            return
        self.undo(name)
        self._undo[name] = way.name, _narrow(module, way)

    def undo(self, name: str) -> None:
        """Give a component wide weights again; does nothing if it has them."""
        _, undo = self._undo.pop(name, ("", None))
        if undo is not None:
            undo()


def _narrow(module: nn.Module, way: Stored) -> Callable[[], None]:
    if way.backend == "casting":
        casting: Any = _cast(module)
        undo: Callable[[], None] = casting.remove
        return undo
    from vramkit.quant import dequantize, quantize  # noqa: PLC0415 - beside its one use

    quantize(module, _config_of(way), skip_modules=None if way.keeps_fragile else ())
    return lambda: dequantize(module)


def _cast(module: nn.Module) -> Any:
    """Store the weights of large layers in fp8, with a scale per row."""
    options: dict[str, Any] = {}
    skipped = getattr(module, "skip_layerwise_casting", None) or getattr(
        module, "_skip_layerwise_casting_patterns", None
    )
    if skipped:
        options["skip_modules_pattern"] = skipped
    return apply_layerwise_casting(module, torch.float8_e4m3fn, _dtype_of(module), **options)


def _quantize_twin(module: nn.Module, way: Stored) -> None:
    from vramkit.quant.api import Quantizer  # noqa: PLC0415 - beside its one use

    quantizer = Quantizer(module, _config_of(way), skip_modules=None if way.keeps_fragile else ())
    done: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for weight in quantizer.weights.values():
        wide = weight.parameter
        if id(wide) not in done:
            done[id(wide)] = nn.Parameter(quantizer.handler.stored(wide, weight.role), requires_grad=False)
        setattr(weight.owner, weight.key, done[id(wide)])
    quantizer.finish()


def _config_of(way: Stored) -> Any:
    """Return the backend's config.

    Raises:
        ConfigError: its package is not installed.
    """
    if way.backend == "casting":
        return None
    from vramkit.quant.registry import config_class, handler_for  # noqa: PLC0415 - backends are imported where one is asked for

    config = config_class(way.backend).from_options(dict(way.options))
    handler_for(config)
    return config


def _is_installed(way: Stored) -> bool:
    try:
        _config_of(way)
    except ConfigError:
        return False
    return True


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype that most of the weights have."""
    sizes = dict.fromkeys(_COMPUTES, 0)
    for parameter in module.parameters():
        if parameter.dtype in sizes:
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
