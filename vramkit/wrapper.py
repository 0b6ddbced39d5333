"""The base of our stored weights: a few inner tensors that are to everybody else one tensor of the dtype it computes as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from typing_extensions import Self

from vramkit.errors import UnsupportedTensorError

__all__ = ["WrapperTensor"]

_aten = torch.ops.aten
_COPYING = {_aten.detach.default, _aten.clone.default, _aten.alias.default}
_TO_COPY = _aten._to_copy.default  # noqa: SLF001 (the name that torch gives to `Tensor.to`)


class WrapperTensor(torch.Tensor):
    """Inner tensors, which move and are copied as they are; whatever computes sees `dequantize()`."""

    @classmethod
    def _shell(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
    ) -> Self:
        """Make the tensor that others see, for `__new__`; its inner tensors are set by `__init__`."""
        with torch.inference_mode(False):  # torch cannot detach a wrapper that was made there
            return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 (torch's extension point)
                cls, tuple(shape), strides=strides, dtype=dtype, device=device, requires_grad=False
            )

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not say how it is dequantized")

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not name its inner tensors")

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return the same kind of tensor around other inner ones; another `dtype` changes what it computes as."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not say how it is put together")

    def assign(self, source: torch.Tensor) -> bool:
        """Take the values of `source` over, for ``copy_``; tell if that could be done."""
        return False

    def refusal(self) -> str:
        """Say what an operation would write to, why it may not, and what to do instead."""
        return "a stored weight, and the change would be lost"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function and the class
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep what only moves or copies the tensor as it is stored; dequantize it for everything else."""
        kwargs = dict(kwargs or {})
        if func in _COPYING:
            return _each(args[0], lambda part: func(part, *args[1:], **kwargs))
        if func.overloadpacket is _aten.to:  # whole only in inference mode; elsewhere it comes as what follows
            return func.decompose(*args, **kwargs)
        if func is _TO_COPY:
            return _to_copy(args[0], kwargs)
        if func is _aten.copy_.default and isinstance(args[0], WrapperTensor) and args[0].assign(args[1]):
            return args[0]
        written = _written(func, args)
        if written is not None:
            raise UnsupportedTensorError(f"{func} would write to {written.refusal()}")
        return _run_on_values(func, args, kwargs)


def _each(
    tensor: WrapperTensor, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
) -> WrapperTensor:
    return tensor.rebuilt({name: change(part) for name, part in tensor.parts().items()}, dtype)


def _to_copy(tensor: WrapperTensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Move it to another device as it is; another floating dtype changes what it computes as."""
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not dtype.is_floating_point:
        return tensor.dequantize().to(dtype, **kwargs)
    return _each(tensor, lambda part: _TO_COPY(part, **kwargs), dtype)


def _written(func: Any, args: Sequence[Any]) -> WrapperTensor | None:
    """Return the first of `args` of our kind that an operation writes to."""
    schema = func._schema  # noqa: SLF001 (torch has no public reader)
    if not schema.is_mutable:
        return None
    pairs = zip(args, (argument.alias_info for argument in schema.arguments), strict=False)
    return next(
        (arg for arg, info in pairs if info is not None and info.is_write and isinstance(arg, WrapperTensor)), None
    )


def _run_on_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # Torch counts the versions of what a view of a counted tensor returns, also in inference mode, whose tensors have none.
    with torch.inference_mode(False) if func.is_view and torch.is_inference_mode_enabled() else nullcontext():
        return func(*map(_values, args), **{name: _values(value) for name, value in kwargs.items()})


def _values(value: Any) -> Any:  # torch's own tree functions take longer than the rest of a small operation
    if isinstance(value, WrapperTensor):
        return value.dequantize()
    return [_values(each) for each in value] if isinstance(value, list | tuple) else value
