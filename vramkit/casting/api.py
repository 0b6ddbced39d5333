"""Store the weights of a module's large layers in fp8, and take that back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vramkit.casting.coverage import Coverage, count, warn_if_little
from vramkit.casting.narrow import SCALED_DTYPES, STORAGE_DTYPES, NarrowTensor, narrowed
from vramkit.casting.weights import CONVOLUTIONS, Reason, Role, Skips, Weight, reasons_to_leave, shared_dims, weights_of
from vramkit.errors import ConfigError, ConflictError
from vramkit.offload.backend import accelerator_for
from vramkit.offload.inventory import refuse_foreign_hooks
from vramkit.offload.offloaded import editable, refuse_part_of_offloaded
from vramkit.tensors import as_owned, is_plain

__all__ = ["DEFAULT_SKIP_PATTERNS", "LayerwiseCasting", "apply_layerwise_casting"]

DEFAULT_SKIP_PATTERNS = ("embed", "norm", "modulation", "^proj_in$", "^proj_out$", "^(lm_)?head$", "^output$")
"""Names of layers that lose more than others or hold little: embeddings, norms, modulation, heads."""

_WITH_BIAS = (nn.Linear, *CONVOLUTIONS)
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
    """Store the weights of linear, convolution and embedding layers, and fused experts, in fp8.

    Mirrors ``diffusers.hooks.apply_layerwise_casting``, with a scale per row (``scaled=False`` for the peers' numbers: then
    biases are cast too). The wide weights exist only while a layer runs; of experts that a layer picks from a stack
    ``[n, rows, columns]``, only those. Works before or after offloading: the link then carries fp8 and the device widens.
    Embeddings with ``max_norm`` are passed over: they write to their tables. So is a weight that a skipped layer shares.

    Weights that are fp8 already, as a file has them, stay as they are there, with its scales or without, also after
    ``remove()``; only what they compute as is chosen.

    Args:
        module: any module; what is offloaded already is cast where it rests.
        storage_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``; or ``torch.float16``, ``torch.bfloat16`` and
            ``torch.float32``, which need no scales: weights and biases are cast plainly, as by the peers.
        compute_dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``. Parameters
            that are not cast keep their dtype, which should be this one.
        skip_modules_pattern: regular expressions searched in module names; what matches is left alone, with what is below
            it. ``"auto"`` is `DEFAULT_SKIP_PATTERNS`, None skips nothing. Adapters (LoRA) are never cast.
        skip_modules_classes: classes of modules to leave alone.
        non_blocking: accepted; nothing is moved here.
        scaled: whether each row has a scale, in fp8.

    Returns:
        The handle; its ``remove()`` gives the module wide weights again (rounded as they were stored), its ``coverage``
        says how much was cast, and what was left and why. A `CoverageWarning` says it where more than half of the module
        was left because nobody knows what it is.

    Raises:
        ConfigError: a dtype, a device or a pattern that cannot be used, weights that hold infinities or NaN, or that are
            too large for ``torch.float16``.
        ConflictError: weights are cast already to something else, or another library casts or moves them.
    """
    del non_blocking
    chosen = _Choice(storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, scaled)
    weights = list(weights_of(module, chosen.skips))
    reasons = reasons_to_leave(weights, chosen.reason_to_leave)
    targets = [weight for weight in weights if reasons[weight.name] is None]
    _check(module, targets, chosen)
    with editable(module):
        casting = LayerwiseCasting(module)
        casting.cast(targets, chosen)
        casting.coverage = count(weights, reasons)
    warn_if_little(module, casting.coverage, stacklevel=2)
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
        given = [patterns] if isinstance(patterns, str) else patterns or ()
        self.skips = Skips.of("skip_modules_pattern", given, classes or ())
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.scaled = scaled and storage_dtype in SCALED_DTYPES

    def reason_to_leave(self, weight: Weight) -> Reason | None:
        """Say why a parameter is not stored in fp8; None if it is. Vectors are only without scales, as with the peers."""
        if weight.left is not None or weight.role is Role.OTHER:
            return weight.left or Reason.KIND
        if weight.role is not Role.VECTOR:
            return None
        return Reason.VECTOR if self.scaled or not isinstance(weight.owner, _WITH_BIAS) else None

    def narrowed(self, tensor: torch.Tensor, over: Sequence[int]) -> NarrowTensor:
        """Store one tensor."""
        wide = tensor.to(self.compute_dtype) if not self.scaled else tensor
        return narrowed(wide, self.storage_dtype, self.compute_dtype, scaled=self.scaled, over=over)


class LayerwiseCasting:
    """fp8 storage of one module, from `apply_layerwise_casting` until `remove`."""

    coverage: Coverage
    """How much of the module is stored in fp8, and what was left, by name, size and reason."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._cast: list[tuple[nn.Module, str, torch.dtype]] = []

    def cast(self, weights: Sequence[Weight], chosen: _Choice) -> None:
        """Replace `weights`, one by one, so that at most one exists twice."""
        done: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        for weight in weights:
            parameter = weight.parameter
            if isinstance(parameter, NarrowTensor) and parameter.dtype == chosen.compute_dtype:
                continue
            if _is_fp8(parameter) or isinstance(parameter, NarrowTensor):  # of a file, and stays as it is there
                if id(parameter) not in done:
                    done[id(parameter)] = _owned(_given(parameter, chosen.compute_dtype), parameter)
                setattr(weight.owner, weight.key, done[id(parameter)])
                continue
            if id(parameter) not in done:
                wide = parameter.to(self._worker(parameter))
                narrow = chosen.narrowed(wide, shared_dims(weight.role, wide.ndim)).to(parameter.device)
                done[id(parameter)] = _owned(narrow, parameter)
            self._cast.append((weight.owner, weight.key, parameter.dtype))
            setattr(weight.owner, weight.key, done[id(parameter)])

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


def _is_fp8(parameter: torch.Tensor) -> bool:
    """Tell whether it is a plain fp8 tensor."""
    return parameter.dtype in SCALED_DTYPES and is_plain(parameter)


def _given(parameter: torch.Tensor, compute_dtype: torch.dtype) -> NarrowTensor:
    """Let fp8 values, as somebody else narrowed them, compute as another dtype."""
    if isinstance(parameter, NarrowTensor):
        return parameter.rebuilt(parameter.parts(), compute_dtype)
    return NarrowTensor(parameter.detach(), None, compute_dtype, is_given=True)


def _owned(tensor: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    owned = as_owned(tensor, like=like)
    assert isinstance(owned, nn.Parameter)
    return owned


def _check(module: nn.Module, weights: Sequence[Weight], chosen: _Choice) -> None:
    for name, part in module.named_modules():
        refuse_foreign_hooks(name or type(module).__name__, part)
    refuse_part_of_offloaded(module)
    if not weights:
        raise ConfigError(f"{type(module).__name__} has no layer to cast: all are skipped or of other classes")
    for weight in weights:
        parameter = weight.parameter
        if parameter.device.type not in _DEVICES:
            raise ConfigError(
                f"{weight.name} is on {str(parameter.device)!r}; fp8 storage works on {', '.join(_DEVICES)}"
            )
        if isinstance(parameter, NarrowTensor):
            present = (parameter.stored.dtype, chosen.compute_dtype if parameter.is_given else parameter.dtype)
            if present != (chosen.storage_dtype, chosen.compute_dtype):
                raise ConflictError(
                    f"{weight.name} is stored in {present[0]} for {present[1]} already; remove() that casting first"
                )
        elif _is_fp8(parameter):
            if parameter.dtype != chosen.storage_dtype:
                raise ConfigError(
                    f"{weight.name} is {parameter.dtype} already; expected storage_dtype to be that, got "
                    f"{chosen.storage_dtype}"
                )
        elif not is_plain(parameter):
            raise ConflictError(f"{weight.name} is a {type(parameter).__name__} already; dequantize the module first")
        elif chosen.scaled and not _fits(parameter, torch.finfo(parameter.dtype).max):
            raise ConfigError(
                f"{weight.name} holds infinities or NaN, which fp8 with scales cannot store; skip that layer"
            )
        elif chosen.storage_dtype == torch.float16 and not _fits(parameter, torch.finfo(torch.float16).max):
            raise ConfigError(
                f"{weight.name} holds numbers that torch.float16 cannot; use torch.bfloat16, or skip that layer"
            )


def _fits(parameter: torch.Tensor, largest: float) -> bool:
    """Tell whether all numbers lie within `largest`; NaN does not."""
    return not parameter.numel() or all(abs(bound.item()) <= largest for bound in torch.aminmax(parameter.detach()))
