"""The public calls: quantize the weights of a module, see what was done, take it back."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vramkit.casting.api import DEFAULT_SKIP_PATTERNS
from vramkit.casting.coverage import Coverage, count, warn_if_little
from vramkit.casting.narrow import SCALED_DTYPES
from vramkit.casting.weights import Reason, Role, Skips, Weight, owner_of, reasons_to_leave, weights_of
from vramkit.errors import ConfigError, ConflictError, UnsupportedTensorError
from vramkit.memory import format_bytes, tensor_bytes
from vramkit.offload.backend import accelerator_for
from vramkit.offload.inventory import refuse_foreign_hooks
from vramkit.offload.offloaded import editable, refuse_part_of_offloaded
from vramkit.quant.config import QuantConfig
from vramkit.quant.handler import Handler
from vramkit.quant.registry import as_config, handler_for
from vramkit.tensors import is_plain, kind_of, materializes
from vramkit.wrapper import WrapperTensor

__all__ = [
    "Quantization",
    "Quantizer",
    "adopt",
    "coverage",
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
_REASONS = MappingProxyType({Role.VECTOR: Reason.VECTOR, Role.TABLE: Reason.TABLE, Role.OTHER: Reason.KIND})


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """What was done to a module."""

    config: QuantConfig
    """As it was used: its `skip_modules` are the patterns that held."""
    quantized: tuple[str, ...]
    """Names of the layers whose weights are quantized, and of parameters that are no layer's ``weight`` (fused experts)."""
    skipped: tuple[str, ...]
    """Names of the layers and parameters of the same kinds that stay as they were."""
    original_bytes: int
    """The quantized weights before, in the dtype that they compute in."""
    quantized_bytes: int
    """And after."""
    coverage: Coverage
    """How much of the module that is, and what was left, by name, size and reason."""

    def __str__(self) -> str:
        return (
            f"{self.config.backend}: {len(self.quantized)} weights, {format_bytes(self.original_bytes)} -> "
            f"{format_bytes(self.quantized_bytes)}; {len(self.skipped)} layers as they were\n{self.coverage}"
        )


def quantize(module: nn.Module, config: Any, *, skip_modules: Sequence[str] | None = None) -> Quantization:
    """Quantize the weights of the linear layers and fused experts of `module`, one by one, where they rest.

    Linear layers are ``nn.Linear``, ``Conv1D`` of transformers, and the parallel linear classes of other libraries, by name.
    Fused experts are parameters ``[n, rows, columns]`` of modules that are none of torch's; each matrix is quantized alone.
    The layers stay what they are (but for fp8 that multiplies in fp8); only their weights are of another kind. A weight in
    host memory, or mapped from a file, is quantized on the accelerator if there is one, and comes back.

    Args:
        module: any module, also one that is offloaded.
        config: one of vramkit's configs, or `BitsAndBytesConfig` or `QuantoConfig` of diffusers or transformers.
        skip_modules: regular expressions searched in module names; what matches stays as it is, with what is below it.
            None: what the config says, else the model's own list (`skip_modules_of`).

    Returns:
        What was done, and in its ``coverage`` how much of the module that is; `quantization_of(module)` returns it later. A
        `CoverageWarning` is given where more than half of the module was left because its weights are of other kinds.

    Raises:
        ConfigError: the config cannot be used, its package is missing, weights are on the meta device, or nothing is left
            to quantize.
        ConflictError: weights are quantized already, or another library moves them.
    """
    quantizer = Quantizer(module, config, skip_modules=skip_modules)
    for name, part in module.named_modules():
        refuse_foreign_hooks(name or type(module).__name__, part)
    refuse_part_of_offloaded(module)
    for name, weight in quantizer.weights.items():
        if weight.parameter.device.type == "meta":
            raise ConfigError(f"{name} is on the meta device, so it has no values to quantize; load the weights")
    with editable(module):
        done: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for weight in quantizer.weights.values():
            wide = weight.parameter
            if id(wide) not in done:
                done[id(wide)] = nn.Parameter(quantizer.quantized(wide, weight.role), requires_grad=False)
            setattr(weight.owner, weight.key, done[id(wide)])
            del wide  # the original goes before the next one is quantized
        finished = quantizer.finish()
    warn_if_little(module, finished.coverage, stacklevel=2)
    return finished


def dequantize(module: nn.Module) -> None:
    """Give `module` ordinary weights again, rounded as they were stored, of the dtype that they compute in.

    Whoever stored them in less: `quantize`, `adopt`, a file, `apply_layerwise_casting`, or another library whose tensors say
    how they are widened (quanto, torchao). Weights that adapters are added to at each use stay so. Does nothing if there is
    nothing to widen.

    Raises:
        UnsupportedTensorError: a weight that does not say how it is widened, or whose layer would quantize it again; nothing
            is changed then.
        ConflictError: `module` belongs to a larger module that is offloaded.
    """
    stored = [
        (part, key)
        for name, part in module.named_modules()
        for key, weight in part.named_parameters(recurse=False)
        if _is_stored(weight, part, f"{name}.{key}" if name else key)
    ]
    if stored:
        refuse_part_of_offloaded(module)
        with editable(module):
            done: dict[int, nn.Parameter] = {}  # tied weights stay tied
            for owner, key in stored:
                weight = getattr(owner, key)
                if id(weight) not in done:
                    done[id(weight)] = nn.Parameter(weight.dequantize(), requires_grad=False)
                setattr(owner, key, done[id(weight)])
    for part in module.modules():
        vars(part).pop(_ATTRIBUTE, None)


def _is_stored(weight: torch.Tensor, owner: nn.Module, name: str) -> bool:
    """Tell whether a weight is to be widened, or refuse it."""
    if is_plain(weight) or materializes(weight):
        return False
    kind = kind_of(weight)
    if kind.dequantize is torch.Tensor.dequantize:
        raise UnsupportedTensorError(
            f"{name} is a {kind.__name__}, which does not say how it is widened. Of bitsandbytes? Call "
            "vramkit.quant.adopt(module) first; else load the original weights"
        )
    if type(owner).__module__.startswith("optimum.quanto."):
        raise UnsupportedTensorError(
            f"{name} belongs to a {type(owner).__name__} of quanto, which would quantize an ordinary weight again at each "
            "call; put the torch layer that it was made of in its place first, with this weight and its bias"
        )
    return True


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
    dtype = _common_dtype(module) or torch.float16
    for name, layer in module.named_modules():
        kind = _BITSANDBYTES_LAYERS.get(type(layer).__name__) if name else None
        if kind is None or not type(layer).__module__.startswith("bitsandbytes."):
            continue
        old: Any = layer
        weight = importlib.import_module(kind).adopted(old, dtype)
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = old.bias
        found[name] = new.train(old.training)
    for name, linear in found.items():
        module.set_submodule(name, linear)
    return tuple(found)


def _common_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that most numbers of ordinary floating parameters have, or None if there is none."""
    numbers: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if is_plain(parameter) and parameter.is_floating_point():
            numbers[parameter.dtype] += parameter.numel()
    return max(numbers, key=numbers.__getitem__, default=None)


def quantization_of(module: nn.Module) -> Quantization | None:
    """Return what `quantize`, or loading, did to this very module, or None."""
    return getattr(module, _ATTRIBUTE, None)


def coverage(module: nn.Module) -> Coverage:
    """Count what of `module` is stored in fewer bits now, by whomever, and name what is not, with sizes and reasons.

    Works for any module, also on the meta device, before and after `quantize`, casting and loading. What no `quantize` of
    this very module chose counts as skipped where the module's own list has its name (`skip_modules_of`).
    """
    found = quantization_of(module)
    patterns = skip_modules_of(module) if found is None else found.config.skip_modules or ()
    handler = None if found is None else handler_for(found.config)
    weights = list(weights_of(module, Skips.of("skip_modules", patterns)))
    return count(weights, _reasons(weights, handler))


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
        weights = list(weights_of(module, Skips.of("skip_modules", self.config.skip_modules or ())))
        reasons = _reasons(weights, self.handler)
        self.weights = {weight.name: weight for weight in weights if reasons[weight.name] is None}
        """Parameter name -> what is quantized."""
        if not self.weights:
            raise ConfigError(f"{type(module).__name__} has no layer to quantize: all are skipped or of other classes")
        for name, weight in self.weights.items():
            if not is_plain(weight.parameter):
                raise ConflictError(
                    f"{name} is a {type(weight.parameter).__name__} already; dequantize it, or remove() the casting"
                )
            if weight.parameter.dtype in SCALED_DTYPES:
                raise ConfigError(
                    f"{name} is {weight.parameter.dtype} already; use apply_layerwise_casting, which takes it as it is, or "
                    "widen it"
                )
        self.handler.check(next(iter(self.weights.values())).parameter.device)

    def quantized(self, weight: torch.Tensor, role: Role) -> torch.Tensor:
        """Quantize one weight on the accelerator, or where it is; the result is where the weight was."""
        return self.handler.stored(weight.detach().to(accelerator_for(weight.device)), role).to(weight.device)

    def converted(self, names: Sequence[str], weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
        """Quantize a tensor that is being loaded (see `load_mapped`), if all its owners are to be quantized."""
        if not set(names) <= self.weights.keys():
            return None
        worker = accelerator_for(weight.device)
        wide = weight.to(worker)  # as the file has it over the link, which is narrower mostly
        wide = wide.dequantize() if isinstance(wide, WrapperTensor) else wide.to(dtype or wide.dtype)
        return self.handler.stored(wide, self.weights[names[0]].role).to(weight.device)

    def finish(self) -> Quantization:
        """Let layers stand that the handler wants in the place of those it was given, and note what was done."""
        return note_quantization(
            self._module, self.config, self.handler, [weight.label for weight in self.weights.values()]
        )


def note_quantization(module: nn.Module, config: QuantConfig, handler: Handler, names: Sequence[str]) -> Quantization:
    """Finish layers `names` (labels of weights) that came with quantized weights, and note what was done."""
    for name in names:
        layer, key = owner_of(module, name)
        finished = handler.finished(layer) if key == "weight" else layer
        if finished is not layer:
            module.set_submodule(name, finished)
    weights = list(weights_of(module, Skips.of("skip_modules", config.skip_modules or ())))
    reasons = _reasons(weights, handler)
    parameters = {id(weight): weight for weight in (getattr(*owner_of(module, name)) for name in names)}
    done = Quantization(
        config,
        tuple(names),
        tuple(
            weight.label
            for weight in weights
            if weight.role in handler.roles and reasons[weight.name] not in (None, Reason.ADAPTER)
        ),
        sum(weight.numel() * weight.dtype.itemsize for weight in parameters.values()),
        sum(map(tensor_bytes, parameters.values())),
        count(weights, reasons),
    )
    setattr(module, _ATTRIBUTE, done)
    return done


def _reasons(weights: Sequence[Weight], handler: Handler | None) -> dict[str, Reason | None]:
    """Say by name why parameters are not quantized; None if they are, or would be by some handler."""

    def reason(weight: Weight) -> Reason | None:
        if weight.left is not None or weight.role in _REASONS:
            return weight.left or _REASONS[weight.role]
        if handler is None:
            return None
        shape = weight.parameter.shape
        takes = weight.role in handler.roles and handler.accepts(shape[-1 if weight.role is Role.TURNED else -2])
        return None if takes else Reason.BACKEND

    return reasons_to_leave(weights, reason)
