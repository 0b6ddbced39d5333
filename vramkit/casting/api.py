"""Store the weights of a module's large layers in fp8, and take that back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from vramkit.casting.narrow import STORAGE_DTYPES, NarrowTensor, narrowed
from vramkit.errors import ConfigError, ConflictError
from vramkit.offload.backend import accelerator_for
from vramkit.offload.handle import editable, refuse_part_of_offloaded
from vramkit.offload.inventory import refuse_foreign_hooks
from vramkit.tensors import as_owned

__all__ = ["DEFAULT_SKIP_PATTERNS", "LayerwiseCasting", "apply_layerwise_casting"]

DEFAULT_SKIP_PATTERNS = ("embed", "norm", "modulation", "^proj_in$", "^proj_out$", "^(lm_)?head$", "^output$")
"""Names of layers that lose more than others or hold little: embeddings, norms, modulation, heads."""

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
_COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cpu", "cuda", "xpu")


def apply_layerwise_casting(  # noqa: PLR0917 (the peers' signature)
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Sequence[str] | None = "auto",
    skip_modules_classes: Sequence[type[nn.Module]] | None = None,
    non_blocking: bool = False,
    *,
    scaled: bool = True,
) -> LayerwiseCasting:
    """Store weights of linear, convolution and embedding layers in fp8; they compute in `compute_dtype`.

    Mirrors ``diffusers.hooks.apply_layerwise_casting``, with a scale per row (``scaled=False`` for the peers' numbers: then
    biases are cast too). The wide weights exist only while a layer runs. Works before or after offloading: the link then
    carries fp8 and the device widens.

    Args:
        module: any module; what is offloaded already is cast where it rests.
        storage_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        compute_dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``. Parameters
            that are not cast keep their dtype, which should be this one.
        skip_modules_pattern: regular expressions searched in module names; what matches is left alone, with what is below
            it. ``"auto"`` is `DEFAULT_SKIP_PATTERNS`, None skips nothing. Adapters (LoRA) are never cast.
        skip_modules_classes: classes of modules to leave alone.
        non_blocking: accepted; nothing is moved here.
        scaled: whether each row has a scale.

    Returns:
        The handle; its ``remove()`` gives the module wide weights again (rounded as they were stored).

    Raises:
        ConfigError: a dtype, a device or a pattern that cannot be used, or weights that hold infinities or NaN.
        ConflictError: weights are cast already to something else, or another library casts or moves them.
    """
    del non_blocking
    chosen = _Choice(storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, scaled)
    layers = list(chosen.layers(module))
    _check(module, layers, chosen)
    with editable(module):
        casting = LayerwiseCasting(module)
        casting.cast(layers, chosen)
    return casting


class _Choice:
    """What is cast, to what."""

    def __init__(
        self,
        storage_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        patterns: str | Sequence[str] | None,
        classes: Sequence[type[nn.Module]] | None,
        scaled: bool,
    ) -> None:
        if storage_dtype not in STORAGE_DTYPES:
            raise ConfigError(f"storage_dtype={storage_dtype}; expected one of {', '.join(map(str, STORAGE_DTYPES))}")
        if compute_dtype not in _COMPUTE_DTYPES:
            raise ConfigError(f"compute_dtype={compute_dtype}; expected one of {', '.join(map(str, _COMPUTE_DTYPES))}")
        if patterns == "auto":
            patterns = DEFAULT_SKIP_PATTERNS
        try:
            self._patterns = [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns or ())]
        except re.error as error:
            raise ConfigError(f"skip_modules_pattern={patterns!r} is not a regular expression: {error}") from error
        self._classes = tuple(classes or ())
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.scaled = scaled

    def layers(self, module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
        """Walk the layers to cast; a skipped module is left alone with all that is below it."""
        if isinstance(module, self._classes) or any(pattern.search(name) for pattern in self._patterns if name):
            return
        if isinstance(module, _LAYERS):
            yield name, module
        has_adapters = hasattr(module, "base_layer")  # PEFT's, which are added to what the base layer computes
        for child_name, child in module.named_children():
            if has_adapters and child_name != "base_layer":
                continue
            yield from self.layers(child, f"{name}.{child_name}" if name else child_name)

    def accepts(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of a layer is stored in fp8: all without scales (as the peers do), else matrices."""
        return parameter.is_floating_point() and (parameter.ndim > 1 or not self.scaled)

    def narrowed(self, tensor: torch.Tensor) -> NarrowTensor:
        """Store one tensor."""
        wide = tensor.to(self.compute_dtype) if not self.scaled else tensor
        return narrowed(wide, self.storage_dtype, self.compute_dtype, scaled=self.scaled)


class LayerwiseCasting:
    """fp8 storage of one module, from `apply_layerwise_casting` until `remove`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._cast: list[tuple[nn.Module, str, torch.dtype]] = []

    def cast(self, layers: Sequence[tuple[str, nn.Module]], chosen: _Choice) -> None:
        """Replace the weights of `layers`, one by one, so that at most one exists twice."""
        done: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        for _, layer in layers:
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if isinstance(parameter, NarrowTensor) or not chosen.accepts(parameter):
                    continue
                if id(parameter) not in done:
                    narrow = chosen.narrowed(parameter.to(self._worker(parameter))).to(parameter.device)
                    done[id(parameter)] = _owned(narrow, parameter)
                self._cast.append((layer, name, parameter.dtype))
                setattr(layer, name, done[id(parameter)])

    @staticmethod
    def _worker(parameter: nn.Parameter) -> torch.device:
        """Where to convert, which gives the same bytes everywhere: an accelerator that has fp8, or where the weight is."""
        worker = accelerator_for(parameter.device)
        return worker if worker.type in _DEVICES else parameter.device

    def remove(self) -> None:
        """Give the layers ordinary weights of the dtype they had. What fp8 rounded away does not come back."""
        cast, self._cast = self._cast, []
        if not cast:
            return
        done: dict[int, nn.Parameter] = {}
        with editable(self._module):
            for layer, name, dtype in cast:
                parameter = getattr(layer, name)
                if isinstance(parameter, NarrowTensor):
                    if id(parameter) not in done:
                        done[id(parameter)] = _owned(parameter.dequantize().to(dtype), parameter)
                    setattr(layer, name, done[id(parameter)])


def _owned(tensor: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    owned = as_owned(tensor, like=like)
    assert isinstance(owned, nn.Parameter)
    return owned


def _check(module: nn.Module, layers: Sequence[tuple[str, nn.Module]], chosen: _Choice) -> None:
    for name, part in module.named_modules():
        refuse_foreign_hooks(name or type(module).__name__, part)
    refuse_part_of_offloaded(module)
    if not layers:
        raise ConfigError(f"{type(module).__name__} has no layer to cast: all are skipped or of other classes")
    for name, layer in layers:
        for key, parameter in layer.named_parameters(recurse=False):
            label = f"{name}.{key}" if name else key
            if parameter.device.type not in _DEVICES:
                raise ConfigError(
                    f"{label} is on {str(parameter.device)!r}; fp8 storage works on {', '.join(_DEVICES)}"
                )
            if isinstance(parameter, NarrowTensor):
                present = (parameter.stored.dtype, parameter.dtype)
                if present != (chosen.storage_dtype, chosen.compute_dtype):
                    raise ConflictError(
                        f"{label} is stored in {present[0]} for {present[1]} already; remove() that casting first"
                    )
            elif chosen.scaled and chosen.accepts(parameter) and not _is_finite(parameter):
                raise ConfigError(
                    f"{label} holds infinities or NaN, which fp8 with scales cannot store; skip that layer"
                )


def _is_finite(parameter: torch.Tensor) -> bool:
    return not parameter.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(parameter.detach()))
