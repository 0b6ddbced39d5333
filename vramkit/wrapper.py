"""The base of our stored weights: a few inner tensors that are to everybody else one tensor of the dtype it computes as."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from vramkit.errors import UnsupportedTensorError

__all__ = ["WrapperTensor", "widened_in_this_loop", "widened_once"]

_aten = torch.ops.aten
_COPYING = {_aten.detach.default, _aten.clone.default, _aten.alias.default}
_TO_COPY = _aten._to_copy.default  # noqa: SLF001 (the name that torch gives to `Tensor.to`)
_COMPOSITE = {
    _aten.to,
    _aten.narrow,
    _aten.chunk,
}  # come whole in inference mode only; elsewhere as what they are made of
_MADE_OF_PRODUCTS = (F.linear, torch.einsum, torch.tensordot, torch.inner, torch.linalg.multi_dot)
_INDEXING = {  # operation -> where its arguments name the dimension
    _aten.select.int: 1,
    _aten.slice.Tensor: 1,
    _aten.unbind.int: 1,
    _aten.index_select.default: 1,
    _aten.split.Tensor: 2,
    _aten.split_with_sizes.default: 2,
}


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

    def values_once(self) -> torch.Tensor:
        """Return `dequantize()`, or what it returned to this thread before within `widened_once`."""
        kept = _kept.values
        if kept is None:
            return self.dequantize()
        if self not in kept:
            kept[self] = self.dequantize()
        values: torch.Tensor = kept[self]
        return values

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not name its inner tensors")

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return the same kind of tensor around other inner ones; another `dtype` changes what it computes as."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not say how it is put together")

    def taken(self, parts: dict[str, torch.Tensor]) -> Self:
        """Return some of a stack (three dimensions or more), whose inner tensors were indexed by their first dimension."""
        raise UnsupportedTensorError(f"{type(self).__name__} does not say how it is indexed")

    def assign(self, source: torch.Tensor) -> bool:
        """Take the values of `source` over, for ``copy_``; tell if that could be done."""
        return False

    def refusal(self) -> str:
        """Say what an operation would write to, why it may not, and what to do instead."""
        return "a stored weight, and the change would be lost"

    def element_size(self) -> int:
        """Return the whole bytes that an element takes as it is stored, at least 1: what counts of memory multiply by."""
        return max(1, self.nbytes // max(1, self.numel()))

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch's stub has a variable
        """The bytes of the inner tensors."""
        return sum(part.nbytes for part in self.parts().values())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let products that are made of others see values; everything else is taken apart by torch first.

        In inference mode torch hands such a product on undivided, below autocast, which knows only what it is made of.
        """
        kwargs = kwargs or {}
        if func in _MADE_OF_PRODUCTS:
            return func(*map(_values, args), **{name: _values(value) for name, value in kwargs.items()})
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (torch's extension point)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function and the class
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep what only moves or copies the tensor as it is stored; dequantize it for everything else."""
        kwargs = dict(kwargs or {})
        if func in _COPYING:
            return _each(args[0], lambda part: func(part, *args[1:], **kwargs))
        if func.overloadpacket in _COMPOSITE:
            return func.decompose(*args, **kwargs)
        if func is _TO_COPY:
            return _to_copy(args[0], kwargs)
        if func is _aten.copy_.default and isinstance(args[0], WrapperTensor) and args[0].assign(args[1]):
            return args[0]
        if _takes_of_a_stack(func, args, kwargs):
            return _taken(func, args, kwargs)
        written = _written(func, args)
        if written is not None:
            raise UnsupportedTensorError(f"{func} would write to {written.refusal()}")
        return _run_on_values(func, args, kwargs)


class _Kept(threading.local):
    values: WeakIdKeyDictionary | None = None  # of stored weights that were multiplied by, as long as these exist


_kept = _Kept()


def widened_once(uses: int) -> AbstractContextManager[None]:
    """Within, what multiplies by a stored weight several times dequantizes it once: for loops over chunks of tokens.

    All values that a loop uses live until its end, so it is entered where there are two `uses` and more. A weight that is
    put in the place of another is another tensor; writing to one in the loop is not seen by it. Compilers order such work
    themselves.
    """
    return nullcontext() if uses < 2 or torch.compiler.is_compiling() else _keeping()


def widened_in_this_loop() -> object | None:
    """Return what tells the innermost `widened_once` that this thread is in from others, or None outside of all."""
    return _kept.values


@contextmanager
def _keeping() -> Iterator[None]:
    before, _kept.values = _kept.values, WeakIdKeyDictionary()
    try:
        yield
    finally:
        _kept.values = before


def _each(
    tensor: WrapperTensor, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
) -> WrapperTensor:
    return tensor.rebuilt({name: change(part) for name, part in tensor.parts().items()}, dtype)


def _takes_of_a_stack(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation picks matrices of a stack, which is done as they are stored: the others stay narrow."""
    place = _INDEXING.get(func)
    if place is None and func is not _aten.index.Tensor:
        return False
    tensor = args[0]
    if not isinstance(tensor, WrapperTensor) or tensor.ndim < 3:
        return False
    if place is None:
        return len(args[1]) == 1 and args[1][0].ndim < 2 and args[1][0].dtype != torch.bool
    dim = args[place] if len(args) > place else kwargs.get("dim", 0)
    return bool(dim % tensor.ndim == 0)


def _taken(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensor, *rest = args
    found = {name: func(part, *rest, **kwargs) for name, part in tensor.parts().items()}
    if any(isinstance(some, torch.Tensor) for some in found.values()):
        return tensor.taken(found)
    return [tensor.taken(dict(zip(found, each, strict=True))) for each in zip(*found.values(), strict=True)]


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
        return value.values_once()
    return [_values(each) for each in value] if isinstance(value, list | tuple) else value
