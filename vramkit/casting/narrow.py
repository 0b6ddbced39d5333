"""A tensor that is stored in fp8 and is to everybody else a tensor of its compute dtype.

Modules that look at ``weight.dtype`` to cast their input see the compute dtype. Offloading moves the fp8 bytes, because they
are what `__tensor_flatten__` names. The wide values exist only while an operation uses them, on the device that computes.

Scales are one power of two per row (the first dimension): multiplying by it is exact in every compute dtype, so the only
error is the rounding to fp8, which is the same at any size of the weights. Without scales e4m3 runs out of exponents at
weights below 2^-6 and loses 12 dB and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vramkit import tensors
from vramkit.errors import UnsupportedTensorError

__all__ = ["STORAGE_DTYPES", "NarrowTensor", "narrowed", "row_scales"]

STORAGE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_aten = torch.ops.aten


class NarrowTensor(torch.Tensor):
    """fp8 values, with a scale per row or none, that computes as `dtype`. Made by `narrowed`."""

    stored: torch.Tensor
    scale: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[NarrowTensor], stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
    ) -> NarrowTensor:
        """Wrap fp8 `stored` and a float32 `scale` of shape [rows, 1, ...]; `dtype` is what it computes as."""
        with torch.inference_mode(False):  # torch cannot detach a wrapper that was made there
            return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 (torch's extension point)
                cls, stored.shape, strides=stored.stride(), dtype=dtype, device=stored.device, requires_grad=False
            )

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.stored = stored
        self.scale = scale

    def widened(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        if self.scale is None:
            return self.stored.to(self.dtype)
        if self.dtype == torch.float16:  # a scale below 2^-24 is zero in fp16 though the product is not
            return (self.stored.to(torch.float32) * self.scale).to(torch.float16)
        return self.stored.to(self.dtype).mul_(self.scale.to(self.dtype))

    def dequantize(self) -> torch.Tensor:
        """Return `widened`, by the name that quantized tensors of all kinds have for it."""
        return self.widened()

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Name the inner tensors (an interface of torch)."""
        return ["stored"] if self.scale is None else ["stored", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], dtype: torch.dtype, size: Sequence[int], stride: Sequence[int]
    ) -> NarrowTensor:
        """Wrap other inner tensors (an interface of torch)."""
        return NarrowTensor(inner["stored"], inner.get("scale"), dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        scales = "unscaled" if self.scale is None else "a scale per row"
        return f"NarrowTensor({list(self.shape)}, {self.dtype} in {self.stored.dtype}, {scales}, device={self.device})"

    # Composite functions (linear, conv) are taken apart before they come here, and then run on widened weights.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001 (torch's extension point)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function and the class
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep fp8 for what only moves or copies the tensor; widen it for everything else."""
        kwargs = dict(kwargs or {})
        if func in _MOVING:
            return _each(args[0], lambda inner: func(inner, *args[1:], **kwargs))
        if func.overloadpacket is _aten.to:  # whole only in inference mode; elsewhere it comes as what follows
            return func.decompose(*args, **kwargs)
        if func is _TO_COPY:
            return _to_copy(args[0], kwargs)
        if func is _aten.copy_.default and isinstance(args[0], NarrowTensor):
            return _assign(args[0], args[1])
        if tensors.writes_to(func, args, NarrowTensor):
            raise UnsupportedTensorError(
                f"{func} would write to a weight that is stored in {args[0].stored.dtype}, and the change would be lost; "
                "call remove() on the casting first, change the weight, and cast again"
            )
        return tensors.run_on_values(func, args, kwargs, NarrowTensor, NarrowTensor.widened)


_MOVING = {_aten.detach.default, _aten.clone.default, _aten.alias.default}
_TO_COPY = _aten._to_copy.default  # noqa: SLF001 (the name that torch gives to `Tensor.to`)


def _each(
    tensor: NarrowTensor, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
) -> NarrowTensor:
    scale = None if tensor.scale is None else change(tensor.scale)
    return NarrowTensor(change(tensor.stored), scale, dtype or tensor.dtype)


def _assign(target: NarrowTensor, source: torch.Tensor) -> NarrowTensor:
    wide = source.widened() if isinstance(source, NarrowTensor) else source
    new = narrowed(wide.to(target.device), target.stored.dtype, target.dtype, scaled=target.scale is not None)
    target.stored.copy_(new.stored)
    if target.scale is not None and new.scale is not None:
        target.scale.copy_(new.scale)
    return target


def _to_copy(tensor: NarrowTensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Move it to another device as fp8; another floating dtype changes what it computes as."""
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not dtype.is_floating_point:
        return tensor.widened().to(dtype, **kwargs)
    return _each(tensor, lambda inner: _TO_COPY(inner, **kwargs), dtype)


def narrowed(
    tensor: torch.Tensor, storage_dtype: torch.dtype, compute_dtype: torch.dtype, *, scaled: bool = True
) -> NarrowTensor:
    """Store `tensor` in fp8.

    Args:
        tensor: finite floating point, any shape; a scale belongs to each index of its first dimension.
        storage_dtype: ``torch.float8_e4m3fn`` (SQNR of 31 dB) or ``torch.float8_e5m2`` (25 dB).
        compute_dtype: what it computes as.
        scaled: False casts plainly, as the peers do.
    """
    tensor = tensor.detach()
    if not scaled or not tensor.ndim or not tensor.numel():
        return NarrowTensor(tensor.to(storage_dtype), None, compute_dtype)
    scale = row_scales(tensor, storage_dtype)
    return NarrowTensor(torch.div(tensor, scale).to(storage_dtype), scale, compute_dtype)


def row_scales(tensor: torch.Tensor, storage_dtype: torch.dtype) -> torch.Tensor:
    """Return the least power of two per row under which the row fits `storage_dtype`: float32 [rows, 1, ...].

    It is NaN for rows that are not finite: fp8 e4m3 has no infinity, and casts may turn one into its largest number.
    """
    inner = tuple(range(1, tensor.ndim)) or (0,)
    peak = torch.linalg.vector_norm(tensor, math.inf, dim=inner, keepdim=True).float()
    _, exponent = torch.frexp(peak / torch.finfo(storage_dtype).max)  # the quotient is below 2 ** exponent
    return torch.ldexp((peak * 0).add_(1), exponent.clamp(-126, 126))
