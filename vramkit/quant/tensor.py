"""The base of our quantized weights: a few inner tensors that are to everybody else one tensor of the compute dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from typing_extensions import Self

from vramkit import tensors
from vramkit.errors import UnsupportedTensorError

__all__ = ["QuantizedTensor"]

_aten = torch.ops.aten
_COPYING = {_aten.detach.default, _aten.clone.default, _aten.alias.default}
_TO_COPY = _aten._to_copy.default  # noqa: SLF001 (the name that torch gives to `Tensor.to`)


class QuantizedTensor(torch.Tensor):
    """A weight [out, in] made of inner tensors, which move and are copied; whatever computes sees `dequantize()`.

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
        with torch.inference_mode(False):  # torch cannot detach a wrapper that was made there
            return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 (torch's extension point)
                cls, tuple(shape), dtype=dtype, device=first.device, requires_grad=False
            )

    def __init__(
        self, inner: dict[str, torch.Tensor], shape: Sequence[int], dtype: torch.dtype, notes: tuple[Any, ...]
    ) -> None:
        for name in self.inner_names:
            setattr(self, name, inner.get(name))
        self.notes = notes

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not say how it is dequantized")

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply inputs [..., in] by this weight: [..., out] in the dtype of `inputs`."""
        return F.linear(inputs, self.dequantize(), bias)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name."""
        return {name: part for name in self.inner_names if (part := getattr(self, name)) is not None}

    def rebuilt(self, inner: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return the same kind of tensor around other inner ones."""
        return type(self)(inner, self.shape, dtype or self.dtype, self.notes)

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

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function and the class
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep what only moves or copies the tensor quantized; dequantize it for everything else."""
        kwargs = dict(kwargs or {})
        if func in _COPYING:
            return _each(args[0], lambda part: func(part, *args[1:], **kwargs))
        if func.overloadpacket is _aten.to:  # whole only in inference mode; elsewhere it comes as what follows
            return func.decompose(*args, **kwargs)
        if func is _TO_COPY:
            return _to_copy(args[0], kwargs)
        if func is _aten.copy_.default and _is_same_kind(args[0], args[1]):
            for name, part in args[0].parts().items():
                part.copy_(args[1].parts()[name])
            return args[0]
        if tensors.writes_to(func, args, QuantizedTensor):
            raise UnsupportedTensorError(
                f"{func} would write to a quantized weight, and the change would be lost; dequantize the module first "
                "(vramkit.quant.dequantize), change it, and quantize it again"
            )
        return tensors.run_on_values(func, args, kwargs, QuantizedTensor, lambda tensor: tensor.dequantize())


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:  # noqa: A002 (torch's name for it)
    plain = [t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (input, bias)]
    if isinstance(weight, QuantizedTensor):
        return weight.linear(*plain)
    return F.linear(plain[0], weight, plain[1])


def _each(
    tensor: QuantizedTensor, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
) -> QuantizedTensor:
    return tensor.rebuilt({name: change(part) for name, part in tensor.parts().items()}, dtype)


def _to_copy(tensor: QuantizedTensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Move it to another device as it is; another floating dtype changes what it computes as."""
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not dtype.is_floating_point:
        return tensor.dequantize().to(dtype, **kwargs)
    return _each(tensor, lambda part: _TO_COPY(part, **kwargs), dtype)


def _is_same_kind(target: Any, source: Any) -> bool:
    both = isinstance(target, QuantizedTensor) and type(target) is type(source)
    return both and (target.notes, target.shape, list(target.parts())) == (
        source.notes,
        source.shape,
        list(source.parts()),
    )
