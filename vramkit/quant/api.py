"""The public calls: quantize the weights of a module, see what was done, take it back."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vramkit.casting.api import DEFAULT_SKIP_PATTERNS
from vramkit.errors import ConfigError, ConflictError
from vramkit.memory import format_bytes, tensor_bytes
from vramkit.offload.backend import accelerator_for
from vramkit.offload.handle import editable, refuse_part_of_offloaded
from vramkit.offload.inventory import refuse_foreign_hooks
from vramkit.quant.config import QuantConfig
from vramkit.quant.handler import Handler
from vramkit.quant.registry import as_config, handler_for
from vramkit.tensors import is_plain

__all__ = [
    "Quantization",
    "Quantizer",
    "adopt",
    "dequantize",
    "note_quantization",
    "quantization_of",
    "quantize",
    "skip_modules_of",
]

_ATTRIBUTE = "_vramkit_quantization"
_BITSANDBYTES_LAYERS = MappingProxyType(
    {
        "Linear4bit": "vramkit.quant.bitsandbytes_4bit",
        "LinearFP4": "vramkit.quant.bitsandbytes_4bit",
        "LinearNF4": "vramkit.quant.bitsandbytes_4bit",
        "Linear8bitLt": "vramkit.quant.bitsandbytes_8bit",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """What was done to a module."""

    config: QuantConfig
    """As it was used: its `skip_modules` are the patterns that held."""
    quantized: tuple[str, ...]
    """Names of the layers whose weights are quantized."""
    skipped: tuple[str, ...]
    """Names of the layers of the same classes that stay as they were."""
    original_bytes: int
    """The quantized weights before, in the dtype that they compute in."""
    quantized_bytes: int
    """And after."""

    def __str__(self) -> str:
        return (
            f"{self.config.backend}: {len(self.quantized)} weights, {format_bytes(self.original_bytes)} -> "
            f"{format_bytes(self.quantized_bytes)}; {len(self.skipped)} layers as they were"
        )


def quantize(module: nn.Module, config: Any, *, skip_modules: Sequence[str] | None = None) -> Quantization:
    """Quantize the weights of the linear layers of `module`, one by one, where they rest.

    The layers stay what they are (but for fp8 that multiplies in fp8); only their weights are of another kind. A weight in
    host memory, or mapped from a file, is quantized on the accelerator if there is one, and comes back.

    Args:
        module: any module, also one that is offloaded.
        config: one of vramkit's configs, or `BitsAndBytesConfig` or `QuantoConfig` of diffusers or transformers.
        skip_modules: regular expressions searched in module names; what matches stays as it is, with what is below it.
            None: what the config says, else the model's own list (`skip_modules_of`).

    Returns:
        What was done; `quantization_of(module)` returns it later.

    Raises:
        ConfigError: the config cannot be used, its package is missing, weights are on the meta device, or nothing is left
            to quantize.
        ConflictError: weights are quantized already, or another library moves them.
    """
    quantizer = Quantizer(module, config, skip_modules=skip_modules)
    for name, part in module.named_modules():
        refuse_foreign_hooks(name or type(module).__name__, part)
    refuse_part_of_offloaded(module)
    for name, layer in quantizer.layers.items():
        if layer.weight.device.type == "meta":
            raise ConfigError(f"{name}.weight is on the meta device, so it has no values to quantize; load the weights")
    with editable(module):
        done: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for layer in quantizer.layers.values():
            weight = layer.weight
            if id(weight) not in done:
                done[id(weight)] = nn.Parameter(quantizer.quantized(weight), requires_grad=False)
            layer.weight = done[id(weight)]
            del weight  # the original goes before the next one is quantized
        return quantizer.finish()


def dequantize(module: nn.Module) -> None:
    """Give the layers of `module` ordinary weights again, rounded as they were stored. Does nothing if none is quantized."""
    found = quantization_of(module)
    if found is None:
        return
    handler = handler_for(found.config)
    with editable(module):
        done: dict[int, nn.Parameter] = {}
        for name in found.quantized:
            layer = module.get_submodule(name)
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            if id(weight) not in done:
                done[id(weight)] = nn.Parameter(handler.dequantize(weight), requires_grad=False)
            layer.weight = done[id(weight)]
    delattr(module, _ATTRIBUTE)


def adopt(module: nn.Module) -> tuple[str, ...]:
    """Put plain linear layers with weights of ours in the place of ``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes.

    Such layers change their weights while they run, so they cannot be streamed. The new ones hold the same bytes and give
    the same numbers.

    Args:
        module: a model that another library quantized by bitsandbytes; changed in place.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: a layer is not quantized yet; nothing is changed then.
    """
    found: dict[str, nn.Linear] = {}
    for name, layer in module.named_modules():
        kind = _BITSANDBYTES_LAYERS.get(type(layer).__name__) if name else None
        if kind is None or not type(layer).__module__.startswith("bitsandbytes."):
            continue
        old: Any = layer
        weight = importlib.import_module(kind).adopted(old)
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = old.bias
        found[name] = new.train(old.training)
    for name, linear in found.items():
        module.set_submodule(name, linear)
    return tuple(found)


def quantization_of(module: nn.Module) -> Quantization | None:
    """Return what `quantize`, or loading, did to this very module, or None."""
    return getattr(module, _ATTRIBUTE, None)


def skip_modules_of(module: nn.Module) -> tuple[str, ...]:
    """The patterns of layers that `quantize` leaves alone by default.

    A model of vramkit says so itself (`quantization_skip_modules`). For others: embeddings, norms, modulation, heads, and
    the layers that a class of transformers keeps in fp32 (``wo`` of T5).
    """
    own = getattr(module, "quantization_skip_modules", None)
    if own is not None:
        return tuple(own)
    fragile = getattr(module, "_keep_in_fp32_modules", None) or ()
    return (*DEFAULT_SKIP_PATTERNS, *(rf"(^|\.){re.escape(name)}(\.|$)" for name in sorted(fragile)))


class Quantizer:
    """The choice of layers of one module, made before anything is changed, and the work on one weight after the other."""

    def __init__(self, module: nn.Module, config: Any, *, skip_modules: Sequence[str] | None = None) -> None:
        """Choose the layers; also of modules on the meta device. See `quantize` for the errors."""
        config = as_config(config)
        given = config.skip_modules if skip_modules is None else skip_modules
        self.config = dataclasses.replace(config, skip_modules=skip_modules_of(module) if given is None else given)
        self.handler: Handler = handler_for(self.config)
        self._module = module
        chosen, self._skipped = _chosen(module, self.handler, self.config.skip_modules or ())
        self.layers = chosen
        if not chosen:
            raise ConfigError(f"{type(module).__name__} has no layer to quantize: all are skipped or of other classes")
        for name, layer in chosen.items():
            if not is_plain(layer.weight):
                raise ConflictError(
                    f"{name}.weight is a {type(layer.weight).__name__} already; dequantize it, or remove() the casting"
                )
        self.handler.check(next(iter(chosen.values())).weight.device)

    def quantized(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantize one weight on the accelerator, or where it is; the result is where the weight was."""
        return self.handler.quantize(weight.detach().to(accelerator_for(weight.device))).to(weight.device)

    def converted(self, names: Sequence[str], weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
        """Quantize a tensor that is being loaded (see `load_mapped`), if all its owners are to be quantized."""
        if not {name.removesuffix(".weight") for name in names} <= self.layers.keys():
            return None
        if not all(name.endswith(".weight") for name in names):
            return None
        worker = accelerator_for(weight.device)
        wide = weight.to(worker).to(dtype or weight.dtype)  # as the file has it over the link, which is narrower mostly
        return self.handler.quantize(wide).to(weight.device)

    def finish(self) -> Quantization:
        """Let layers stand that the handler wants in the place of those it was given, and note what was done."""
        return note_quantization(self._module, self.config, self.handler, list(self.layers), tuple(self._skipped))


def note_quantization(
    module: nn.Module, config: QuantConfig, handler: Handler, names: Sequence[str], skipped: tuple[str, ...]
) -> Quantization:
    """Finish layers `names` that came with quantized weights, and note what was done."""
    for name in names:
        layer = module.get_submodule(name)
        finished = handler.finished(layer)
        if finished is not layer:
            module.set_submodule(name, finished)
    layers: list[Any] = [module.get_submodule(name) for name in names]
    weights = {id(layer.weight): layer.weight for layer in layers}
    done = Quantization(
        config,
        tuple(names),
        skipped,
        sum(weight.numel() * weight.dtype.itemsize for weight in weights.values()),
        sum(map(tensor_bytes, weights.values())),
    )
    setattr(module, _ATTRIBUTE, done)
    return done


def _chosen(module: nn.Module, handler: Handler, patterns: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Walk the layers; a skipped module is left alone with all that is below it, and so are the adapters of PEFT."""
    try:
        skips = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(f"skip_modules={list(patterns)!r}: not a regular expression: {error}") from error
    chosen: dict[str, Any] = {}
    skipped: list[str] = []

    seen: set[nn.Module] = set()  # a layer that stands in two places is one

    def walk(part: nn.Module, name: str, is_skipped: bool) -> None:
        if part in seen:
            return
        seen.add(part)
        is_skipped = is_skipped or any(name and skip.search(name) for skip in skips)
        if isinstance(part, handler.layers):
            if is_skipped or not handler.accepts(part):
                skipped.append(name)
            else:
                chosen[name] = part
        for child_name, child in part.named_children():
            if hasattr(part, "base_layer") and child_name != "base_layer":
                continue  # the adapters of PEFT beside it
            walk(child, f"{name}.{child_name}" if name else child_name, is_skipped)

    walk(module, "", is_skipped=False)
    return chosen, skipped
