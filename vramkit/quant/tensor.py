"""The bases of our quantized weights: which inner tensors they have, what else makes them, and how they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from typing_extensions import Self

from vramkit.wrapper import WrapperTensor

__all__ = ["QuantizedTensor", "TurnedTensor", "autocast_dtype"]


class QuantizedTensor(WrapperTensor):
    """A weight [out, in] with kernels of its own, or a stack [n, out, in] of such.

    A subclass lists its inner tensors and what else makes it (`notes`, hashable: compiled code is for one value), and says
    how a matrix is dequantized and multiplied. A stack has the inner tensors of its matrices, stacked: indexing it by the
    first dimension gives what the same matrices were if they were quantized alone.
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

    @classmethod
    def stacked(cls, matrices: Sequence[Self]) -> Self:
        """Return a stack of matrices that were quantized alike."""
        first = matrices[0]
        parts = {name: torch.stack([matrix.parts()[name] for matrix in matrices]) for name in first.parts()}
        return cls(parts, (len(matrices), *first.shape), first.dtype, first.notes)

    def widened(self) -> torch.Tensor:
        """Return the values of a matrix as an ordinary tensor of the compute dtype."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype; a stack is widened matrix by matrix."""
        if self.ndim == 2:
            return self.widened()
        matrices = [self.taken({name: part[i] for name, part in self.parts().items()}) for i in range(self.shape[0])]
        if torch.compiler.is_compiling():  # which orders the work itself, and copies what is written piece by piece
            return torch.stack([matrix.widened() for matrix in matrices])
        wide = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for target, matrix in zip(wide, matrices, strict=True):
            target.copy_(matrix.widened())
        return wide

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply inputs [..., in] by this weight: [..., out] in the dtype of `inputs`."""
        return F.linear(inputs, self.values_once(), bias)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name."""
        return {name: part for name in self.inner_names if (part := getattr(self, name)) is not None}

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return the same kind of tensor around other inner ones."""
        return type(self)(parts, self.shape, dtype or self.dtype, self.notes)

    def taken(self, parts: dict[str, torch.Tensor]) -> Self:
        """Return a matrix or a shorter stack, by what indexing left of the first dimension of the first inner tensor."""
        first = self.inner_names[0]
        left = parts[first].shape[: parts[first].ndim - getattr(self, first).ndim + 1]
        return type(self)(parts, (*left, *self.shape[1:]), self.dtype, self.notes)

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
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (reading attributes would come here, one by one)
                return _linear(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class TurnedTensor(WrapperTensor):
    """The transpose [in, out] of a quantized weight [out, in], for layers that keep theirs so (Conv1D of transformers)."""

    base: WrapperTensor

    @staticmethod
    def __new__(cls: type[TurnedTensor], base: WrapperTensor) -> TurnedTensor:
        """Wrap `base`."""
        return cls._shell((base.shape[1], base.shape[0]), base.dtype, base.device)

    def __init__(self, base: WrapperTensor) -> None:
        self.base = base

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        return self.base.dequantize().t()

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the only inner tensor."""
        return {"base": self.base}

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> TurnedTensor:
        """Return the same kind of tensor around another `base`."""
        base = parts["base"]
        assert isinstance(base, WrapperTensor)
        return TurnedTensor(base if dtype in (None, base.dtype) else base.rebuilt(base.parts(), dtype))

    def assign(self, source: torch.Tensor) -> bool:
        """Take the values of another turned tensor over."""
        return isinstance(source, TurnedTensor) and self.base.assign(source.base)

    def refusal(self) -> str:
        """Say what an operation would write to, why it may not, and what to do instead."""
        return self.base.refusal()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the inner tensor (an interface of torch)."""
        return ["base"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], context: None, size: Any, stride: Any) -> TurnedTensor:
        """Wrap another inner tensor (an interface of torch)."""
        return TurnedTensor(inner["base"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TurnedTensor({self.base!r})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply ``addmm(bias, x, weight)`` by the kernels of the kind; everything else is taken apart by torch first."""
        if func is torch.addmm and not kwargs and isinstance(args[2], TurnedTensor) and args[0].ndim == 1:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (as above)
                return _linear(args[1], args[2].base, args[0])
        return super().__torch_function__(func, types, args, kwargs)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """Return what autocast makes of a floating `tensor` before it is multiplied, or None where it leaves it as it is."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind) if tensor.is_floating_point() else None


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:  # noqa: A002 (torch's name for it)
    plain = [t.dequantize() if isinstance(t, WrapperTensor) else t for t in (input, bias)]
    if not isinstance(weight, QuantizedTensor) or weight.ndim != 2:
        return F.linear(plain[0], weight.dequantize() if isinstance(weight, WrapperTensor) else weight, plain[1])
    dtype = autocast_dtype(plain[0])
    if dtype is None:
        return weight.linear(*plain)
    # The kernels of the kinds are unknown to autocast, and what they are made of is cast by it to one dtype or the other.
    plain = [None if t is None else t.to(dtype) for t in plain]
    cast = weight if weight.dtype == dtype else weight.rebuilt(weight.parts(), dtype)
    with torch.autocast(plain[0].device.type, enabled=False):
        return cast.linear(*plain)
