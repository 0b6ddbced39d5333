"""The base of our quantized weights: which inner tensors they have, what else makes them, and how they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from typing_extensions import Self

from vramkit.wrapper import WrapperTensor

__all__ = ["QuantizedTensor"]


class QuantizedTensor(WrapperTensor):
    """A weight [out, in] with kernels of its own.

    A subclass lists its inner tensors and what else makes it (`notes`, hashable: compiled code is for one value), and says
    how it is dequantized and multiplied.
    """

    inner_names: ClassVar[tuple[str, ...]]
    """Attributes that hold inner tensors; some may be None."""
    notes: tuple[Any, ...]

    @staticmethod
    def __new__(
        cls: type[Self],
        inner: dict[str, torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        notes: tuple[Any, ...],
    ) -> Self:
        """Wrap `inner`; the result has `shape` and computes as `dtype`."""
        first = inner[cls.inner_names[0]]
        return cls._shell(shape, dtype, first.device)

    def __init__(
        self, inner: dict[str, torch.Tensor], shape: Sequence[int], dtype: torch.dtype, notes: tuple[Any, ...]
    ) -> None:
        for name in self.inner_names:
            setattr(self, name, inner.get(name))
        self.notes = notes

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply inputs [..., in] by this weight: [..., out] in the dtype of `inputs`."""
        return F.linear(inputs, self.dequantize(), bias)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name."""
        return {name: part for name in self.inner_names if (part := getattr(self, name)) is not None}

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return the same kind of tensor around other inner ones."""
        return type(self)(parts, self.shape, dtype or self.dtype, self.notes)

    def assign(self, source: torch.Tensor) -> bool:
        """Copy the inner tensors of a `source` of the same kind."""
        if type(self) is not type(source) or (self.notes, self.shape) != (source.notes, source.shape):
            return False
        own, other = self.parts(), source.parts()
        if list(own) != list(other):
            return False
        for name, part in own.items():
            part.copy_(other[name])
        return True

    def refusal(self) -> str:
        """Say what an operation would write to, why it may not, and what to do instead."""
        return (
            "a quantized weight, and the change would be lost; dequantize the module first (vramkit.quant.dequantize), "
            "change it, and quantize it again"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Name the inner tensors (an interface of torch)."""
        return list(self.parts()), (tuple(self.shape), self.dtype, self.notes)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Self:
        """Wrap other inner tensors (an interface of torch)."""
        shape, dtype, notes = context
        return cls(inner, shape, dtype, notes)

    def __repr__(self) -> str:  # type: ignore[override]
        stored = ", ".join(map(str, self.notes))
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, stored as {stored}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply by the kernels of the kind; everything else is taken apart by torch first."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (torch's extension point)
            return func(*args, **(kwargs or {}))


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:  # noqa: A002 (torch's name for it)
    plain = [t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (input, bias)]
    if isinstance(weight, QuantizedTensor):
        return weight.linear(*plain)
    return F.linear(plain[0], weight, plain[1])
