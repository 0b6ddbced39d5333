"""A tensor that is stored in fp8, or in another narrow dtype, and is to everybody else a tensor of its compute dtype.

Modules that look at ``weight.dtype`` to cast their input see the compute dtype. Offloading moves the fp8 bytes, because they
are what `__tensor_flatten__` names. The wide values exist only while an operation uses them, on the device that computes.

Scales are one power of two per row: per index of the first dimension, in a stack of matrices of the first two.
Multiplying by it is exact in every compute dtype, so the only error is the rounding to fp8, which is the same at any size of
the weights. Without scales e4m3 runs out of exponents at weights below 2^-6 and loses 12 dB and more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vramkit.wrapper import WrapperTensor

__all__ = ["SCALED_DTYPES", "STORAGE_DTYPES", "NarrowTensor", "narrowed", "row_scales"]

SCALED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
STORAGE_DTYPES = (*SCALED_DTYPES, torch.float16, torch.bfloat16, torch.float32)
_EXPONENT, _ONE_EXPONENT = 0x7F800000, 0x00800000  # bits of a float32


class NarrowTensor(WrapperTensor):
    """fp8 values, with a scale per row or none, that computes as `dtype`. Made by `narrowed`."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    is_given: bool

    @staticmethod
    def __new__(
        cls: type[NarrowTensor],
        stored: torch.Tensor,
        scale: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        is_given: bool = False,
    ) -> NarrowTensor:
        """Wrap fp8 `stored` and a float32 `scale` of its dimensions, 1 where shared; `dtype` is what it computes as.

        Those that somebody else narrowed (`is_given`) have scales that may be any numbers.
        """
        return cls._shell(stored.shape, dtype, stored.device, stored.stride())

    def __init__(
        self, stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, *, is_given: bool = False
    ) -> None:
        self.stored = stored
        self.scale = scale
        self.is_given = is_given

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        if self.scale is None:
            return self.stored.to(self.dtype)
        if self.is_given:  # fp8 fits every wide dtype, and the product is made in float32 and rounded once
            return self.stored.to(self.dtype).mul_(self.scale)
        if self.dtype == torch.float16:  # a scale below 2^-24 is zero in fp16 though the product is not
            return (self.stored.to(torch.float32) * self.scale).to(torch.float16)
        return self.stored.to(self.dtype).mul_(self.scale.to(self.dtype))

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name."""
        return {"stored": self.stored} if self.scale is None else {"stored": self.stored, "scale": self.scale}

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> NarrowTensor:
        """Return the same kind of tensor around other inner ones."""
        return NarrowTensor(parts["stored"], parts.get("scale"), dtype or self.dtype, is_given=self.is_given)

    def taken(self, parts: dict[str, torch.Tensor]) -> NarrowTensor:
        """Return some of a stack; scales have its dimensions, so they were indexed as it was."""
        return self.rebuilt(parts)

    def assign(self, source: torch.Tensor) -> bool:
        """Narrow the values of any `source` and keep them."""
        wide = source.dequantize() if isinstance(source, WrapperTensor) else source
        over = None if self.scale is None else tuple(dim for dim, size in enumerate(self.scale.shape) if size == 1)
        new = narrowed(wide.to(self.device), self.stored.dtype, self.dtype, scaled=self.scale is not None, over=over)
        for name, part in self.parts().items():
            part.copy_(new.parts()[name])
        return True

    def refusal(self) -> str:
        """Say what an operation would write to, why it may not, and what to do instead."""
        return (
            f"a weight that is stored in {self.stored.dtype}, and the change would be lost; call remove() on the casting "
            "first, change the weight, and cast again"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        """Name the inner tensors (an interface of torch)."""
        return list(self.parts()), (self.dtype, self.is_given)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: tuple[torch.dtype, bool], size: Sequence[int], stride: Sequence[int]
    ) -> NarrowTensor:
        """Wrap other inner tensors (an interface of torch)."""
        return NarrowTensor(inner["stored"], inner.get("scale"), context[0], is_given=context[1])

    def __repr__(self) -> str:  # type: ignore[override]
        scales = "unscaled" if self.scale is None else "a scale per row" if self.scale.numel() > 1 else "one scale"
        return f"NarrowTensor({list(self.shape)}, {self.dtype} in {self.stored.dtype}, {scales}, device={self.device})"


def narrowed(
    tensor: torch.Tensor,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    *,
    scaled: bool = True,
    over: Sequence[int] | None = None,
) -> NarrowTensor:
    """Store `tensor` in fp8.

    Args:
        tensor: finite floating point, any shape.
        storage_dtype: ``torch.float8_e4m3fn`` (SQNR of 31 dB) or ``torch.float8_e5m2`` (25 dB).
        compute_dtype: what it computes as.
        scaled: False casts plainly, as the peers do.
        over: dimensions that share a scale; None is all but the first.
    """
    tensor = tensor.detach()
    if not scaled or not tensor.ndim or not tensor.numel():
        return NarrowTensor(tensor.to(storage_dtype), None, compute_dtype)
    scale = row_scales(tensor, storage_dtype, over)
    return NarrowTensor(torch.div(tensor, scale).to(storage_dtype), scale, compute_dtype)


def row_scales(tensor: torch.Tensor, storage_dtype: torch.dtype, over: Sequence[int] | None = None) -> torch.Tensor:
    """Return the least power of two per row under which the row fits `storage_dtype`: float32, 1 in dimensions `over`.

    It is 2^-126 or more, and NaN for rows that are not finite: fp8 e4m3 has no infinity, and casts may turn one into its
    largest number.
    """
    inner = tuple(range(1, tensor.ndim)) or (0,) if over is None else tuple(over)
    peak = torch.linalg.vector_norm(tensor, math.inf, dim=inner, keepdim=True).float()
    # In the bits of the quotient, for what is small costs a device nothing but its start: the power of two above it, where
    # those of numbers that are not finite overflow to a zero, and adding none of the peak makes them NaN.
    bits: torch.Tensor = (peak / torch.finfo(storage_dtype).max).view(torch.int32)
    return bits.bitwise_and_(_EXPONENT).add_(_ONE_EXPONENT).view(torch.float32).add_(peak, alpha=0)
