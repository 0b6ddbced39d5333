"""What quantizing a module costs: the error of each layer and of a whole forward, worst layers first.

Two ways lead to the same figures. With the quantized module and its original, the quantized one runs, and each layer's
output is compared with what the original's weights make of the same input, moved to the device for the moment. With the
original and a config, the original runs, and each layer's output is replaced by what a quantized copy of that one layer
makes of its input. Either way one layer exists twice at a time, and no second model is on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vramkit import tensors
from vramkit.casting.narrow import NarrowTensor
from vramkit.casting.weights import Role
from vramkit.errors import ConfigError
from vramkit.memory import format_bytes, module_bytes
from vramkit.offload import apply_group_offloading, offload_of
from vramkit.quant.api import Quantizer
from vramkit.quant.quality import Noise
from vramkit.quant.scaled_linear import ScaledLinear

__all__ = ["LayerQuality", "QuantizationReport", "report"]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerQuality:
    """What one quantized layer costs. Ratios of signal to quantization noise in decibels, sizes in bytes."""

    name: str
    kind: str
    """How its weight is kept: for fp8 the dtype, and whether it is multiplied as it is, else the class of the weight."""
    weight_db: float
    output_db: float | None
    """Over all calls of the forward, on the inputs that the layer saw there; None if it was not called."""
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Figures of `report`; ``str()`` of it is a table."""

    layers: tuple[LayerQuality, ...]
    """Quantized layers, worst output first."""
    skipped: tuple[str, ...]
    """Layers with a weight matrix that are not quantized."""
    forward_db: float
    """Signal to quantization noise of the module's outputs, in decibels."""
    bytes_before: int
    """Bytes of the whole module."""
    bytes_after: int

    def __str__(self) -> str:
        rows = [("layer", "kind", "weight dB", "output dB", "before", "after")]
        rows += [
            (
                layer.name,
                layer.kind,
                f"{layer.weight_db:.1f}",
                "not called" if layer.output_db is None else f"{layer.output_db:.1f}",
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
            )
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"forward: {self.forward_db:.1f} dB")
        lines.append(f"module: {format_bytes(self.bytes_before)} before, {format_bytes(self.bytes_after)} after")
        lines.append(f"not quantized: {', '.join(self.skipped) or 'none'}")
        if any(layer.kind.endswith("scaled_mm") for layer in self.layers):
            wide = [layer.name for layer in self.layers if layer.kind.endswith("storage")]
            lines.append(f"widened at use, for sizes that scaled_mm cannot multiply: {', '.join(wide) or 'none'}")
        return "\n".join(lines)


def report(
    module: nn.Module, inputs: Any, *, reference: nn.Module | None = None, config: Any = None
) -> QuantizationReport:
    """Measure what quantization costs: each layer's weights, its outputs on the inputs it sees, and one whole forward.

    Args:
        module: with `reference`, the quantized module, on a device or offloaded; with `config`, the original.
        inputs: one forward's: a tensor, a sequence of positional or a mapping of keyword arguments.
        reference: the original module. It may rest in host memory or in a mapped file: single layers of it are moved to the
            device, and for its own forward it is streamed there.
        config: a quantization config, as `quantize` takes it: says what it would cost. `module` is left as it is.

    Raises:
        ConfigError: both or none of `reference` and `config`, a reference of another architecture, no quantized layer, or a
            forward that returns no floating tensors.
    """
    if (reference is None) == (config is None):
        raise ConfigError(
            "report compares with the original: give reference=original_module with a quantized module, or "
            "config=quantization_config with the original one; one of the two"
        )
    args, kwargs = _arguments(inputs)
    with torch.no_grad():
        if reference is None:
            return _predicted(module, config, args, kwargs)
        return _measured(module, reference, args, kwargs)


# -- the two ways ------------------------------------------------------------------------------------------------------


def _measured(module: nn.Module, reference: nn.Module, args: Any, kwargs: Any) -> QuantizationReport:
    """Run the quantized module, each layer beside the original's weights, then the original."""
    originals = dict(reference.named_modules())
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, layer in module.named_modules():
        if is_quantized(layer):
            if name not in originals:
                raise ConfigError(f"the reference has no module {name!r}; give the module as it was before quantizing")
            pairs[name] = layer, originals[name]
    probes = {name: _Probe(name) for name in pairs}

    def beside(name: str) -> _Hook:
        def compare(_: nn.Module, given: Any, options: Any, output: Any) -> None:
            like = _tensors_of(output)[0]
            original = _bare(pairs[name][1], like.device, like.dtype)
            probes[name].output_of(original.forward(*given, **options), output)

        return compare

    with _hooked({name: (layer, beside(name)) for name, (layer, _) in pairs.items()}):
        result = _tensors_of(module(*args, **kwargs))
    device = result[0].device
    for name, (layer, original) in pairs.items():
        probes[name].weights_of(_bare(original, device), _bare(layer, device))
    with _computing_on(reference, device):
        exact = _tensors_of(reference(*args, **kwargs))
    skipped = [name for name, layer in module.named_modules() if _has_plain_matrix(layer)]
    return _summary(probes, exact, result, skipped, module_bytes(reference), module_bytes(module))


def _predicted(module: nn.Module, config: Any, args: Any, kwargs: Any) -> QuantizationReport:
    """Run the original, then once more with each layer's output replaced by that of a quantized copy of this one layer."""
    quantizer = Quantizer(module, config)
    roles: dict[nn.Module, dict[str, Role]] = {}
    for weight in quantizer.weights.values():
        roles.setdefault(weight.owner, {})[weight.key] = weight.role
    layers = {name: layer for name, layer in module.named_modules() if layer in roles}  # shared ones once
    probes = {name: _Probe(name) for name in layers}

    def instead(name: str) -> _Hook:
        def replace(layer: nn.Module, given: Any, options: Any, output: Any) -> Any:
            device = _tensors_of(output)[0].device
            quantized: Any = _bare(layer, device)
            for key, role in roles[layer].items():
                stored = quantizer.quantized(getattr(quantized, key), role)
                setattr(quantized, key, nn.Parameter(stored, requires_grad=False))
            quantized = quantizer.handler.finished(quantized)
            if not probes[name].calls:
                probes[name].weights_of(_bare(layer, device), quantized)
            replaced = quantized.forward(*given, **options)
            probes[name].output_of(output, replaced)
            return replaced

        return replace

    exact = _tensors_of(module(*args, **kwargs))
    with _hooked({name: (layer, instead(name)) for name, layer in layers.items()}):
        result = _tensors_of(module(*args, **kwargs))
    skipped = [name for name, layer in module.named_modules() if name not in layers and _has_plain_matrix(layer)]
    before = module_bytes(module)
    saved = sum(probe.bytes_before - probe.bytes_after for probe in probes.values())
    return _summary(probes, exact, result, skipped, before, before - saved)


def _summary(  # noqa: PLR0917 (all of a report)
    probes: Mapping[str, _Probe],
    exact: Sequence[Tensor],
    result: Sequence[Tensor],
    skipped: Sequence[str],
    bytes_before: int,
    bytes_after: int,
) -> QuantizationReport:
    if not probes:
        raise ConfigError("no layer of the module is quantized, so there is nothing to report")
    noise = Noise()
    for one, other in zip(exact, result, strict=True):
        noise.add(one, other)
    layers = sorted((probe.quality() for probe in probes.values()), key=_badness)
    return QuantizationReport(tuple(layers), tuple(skipped), noise.db, bytes_before, bytes_after)


def _badness(layer: LayerQuality) -> tuple[bool, float]:
    """Sort by output; layers that were not called come last, by weight; NaN comes first."""
    decibels = layer.weight_db if layer.output_db is None else layer.output_db
    return layer.output_db is None, -math.inf if math.isnan(decibels) else decibels


# -- one layer ---------------------------------------------------------------------------------------------------------

_Hook = Callable[[nn.Module, Any, Any, Any], Any]


class _Probe:
    """Collects the figures of one layer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = ""
        self.calls = 0
        self.bytes_before = self.bytes_after = 0
        self._weight, self._output = Noise(), Noise()

    def weights_of(self, original: nn.Module, quantized: nn.Module) -> None:
        """Compare the quantized parameters with those of the original."""
        wide = dict(original.named_parameters(recurse=False))
        for key, parameter in quantized.named_parameters(recurse=False):
            if not tensors.is_plain(parameter):
                self.kind = _kind(quantized, parameter)
                self._weight.add(wide[key], parameter.dequantize())
        self.bytes_before, self.bytes_after = module_bytes(original), module_bytes(quantized)

    def output_of(self, exact: Any, result: Any) -> None:
        """Compare what one call returned."""
        self.calls += 1
        for one, other in zip(_tensors_of(exact), _tensors_of(result), strict=True):
            self._output.add(one, other)

    def quality(self) -> LayerQuality:
        """Return the figures."""
        output_db = self._output.db if self.calls else None
        return LayerQuality(self.name, self.kind, self._weight.db, output_db, self.bytes_before, self.bytes_after)


def _kind(layer: nn.Module, parameter: Tensor) -> str:
    if not isinstance(parameter, NarrowTensor):
        return type(parameter).__name__
    compute = "scaled_mm" if isinstance(layer, ScaledLinear) else "storage"
    return f"{str(parameter.stored.dtype).removeprefix('torch.')}, {compute}"


def is_quantized(layer: nn.Module) -> bool:
    """Whether a module itself owns a parameter that is stored in another way than as a plain tensor."""
    return any(not tensors.is_plain(parameter) for parameter in layer.parameters(recurse=False))


def _has_plain_matrix(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and tensors.is_plain(weight) and weight.ndim > 1


def _bare(layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a layer that shares everything with `layer` but has its own parameters on `device`, for a call of `forward`.

    Calling its forward directly runs no hooks. `dtype` is what floating parameters are turned to.
    """
    bare = object.__new__(type(layer))
    bare.__dict__.update(layer.__dict__)
    moved = {key: None if p is None else _moved(p, device, dtype) for key, p in layer._parameters.items()}  # noqa: SLF001
    bare.__dict__["_parameters"] = moved
    return bare


def _moved(parameter: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if parameter.is_floating_point() else None
    if tensors.is_plain(parameter):
        return tensors.as_owned(parameter.detach().to(device, wanted), like=parameter)
    parts = [leaf.to(device) for leaf in tensors.leaves(parameter)]
    return tensors.as_owned(tensors.rebuild(parameter, parts), like=parameter)


# -- one forward -------------------------------------------------------------------------------------------------------


def _arguments(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _tensors_of(output: Any) -> list[Tensor]:
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise ConfigError(
            f"a forward returned no floating tensor, but {type(output).__name__}; nothing can be compared"
        )
    return found


@contextlib.contextmanager
def _hooked(hooks: Mapping[str, tuple[nn.Module, _Hook]]) -> Iterator[None]:
    """Have hooks run after the layers."""
    with contextlib.ExitStack() as stack:
        for layer, hook in hooks.values():
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def _computing_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let `module` run on `device`: as it is if it does already or is offloaded, else streamed there for the moment."""
    rests_on = next(module.parameters()).device
    if rests_on.type == device.type or offload_of(module) is not None:
        yield
        return
    offload = apply_group_offloading(module, device, offload_type="leaf_level")
    try:
        yield
    finally:
        offload.remove()
