"""Tensors without memory that say where the computation will be."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from vramkit.planning.answers import any_number, bare
from vramkit.planning.ledger import Ledger
from vramkit.planning.recurrent import recurrent_kernels

__all__ = ["Device"]


class Device(TorchFunctionMode):
    """Lets tensors without memory say that they are on `device`, and answers what only values could answer."""

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__()
        self._device = device
        self._ledger = ledger
        self._kernels: Mapping[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention,
            F.rms_norm: self._rms_norm,
            torch.rms_norm: self._rms_norm,
            F.multi_head_attention_forward: self._multi_head_attention,
            **(recurrent_kernels(self._run) if device.type == "cpu" else {}),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what has no answer on the meta device; run everything else."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            asked = getattr(func, "__self__", None)
            if asked is _DEVICE:
                return self._device
            if asked is _IS_CUDA:
                return self._device.type == "cuda"
            return func(*args, **kwargs)
        kernel = self._kernels.get(func)
        if kernel is not None:
            return kernel(*args, **kwargs)
        if name in _VALUES and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return _VALUES[name](args[0])
        is_remote = self._device.type != "cpu"
        to_host = is_remote and _asks_for_host(name, args, kwargs)
        if is_remote and (any(map(_is_place, args)) or any(map(_is_place, kwargs.values()))):
            args, kwargs = tree_map_only(_PLACES, self._inner, (args, kwargs))
        result = self._run(func, args, kwargs)
        return self._on_host(result) if to_host and isinstance(result, torch.Tensor) else result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function, of values and tensors without memory together also where it compares devices by itself."""
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "device" not in str(error):
                raise
        with _disable_current_modes():
            args, kwargs = tree_map_only(torch.Tensor, bare, (args, kwargs))
        return func(*args, **kwargs)

    def _on_host(self, result: torch.Tensor) -> torch.Tensor:
        """Return a tensor like `result` that the ledger does not know: it lies in host memory."""
        if not result.is_meta:
            return result  # small, and known
        with _disable_current_modes():
            copied = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
        self._ledger.ignore(copied)
        return copied

    def _inner(self, value: Any) -> Any:
        is_here = str(value).partition(":")[0] == self._device.type
        return torch.device("cpu") if is_here else value

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Make what the kernels that keep no scores make: a result [B, H, S, D] that lies as [B, S, H, D], and [B, H, S]."""
        if not any(tensor.is_meta for tensor in (query, key, value)):
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        mask = args[0] if args else kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -1.0).to(query.dtype)  # the kernels want numbers
        *batch, heads, tokens, _ = query.shape
        width = value.shape[-1]
        result = query.new_empty(*batch, tokens, heads, width).transpose(-2, -3)
        query.new_empty(*batch, heads, tokens, dtype=torch.float32)
        self._ledger.add_flops(2 * query.numel() * key.shape[-2] + 2 * result.numel() * key.shape[-2])
        return result

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        """Run torch's own function with this mode on, which would else not be asked for the kernel that is called in it."""
        with self:
            return _MULTI_HEAD_ATTENTION(*args, **kwargs)

    def _rms_norm(
        self,
        input: torch.Tensor,  # noqa: A002 (torch's name for it)
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        """Make what a fused kernel makes, a result and a number per row; without memory torch takes its steps one by one."""
        is_mixed = weight is not None and weight.dtype != input.dtype  # for which there is no such kernel
        if not input.is_meta or is_mixed or self._device.type != "cuda" or not _is_fused():
            return F.rms_norm(input, list(normalized_shape), weight, eps)
        numbers = input.new_empty(input.shape[: input.ndim - len(normalized_shape)], dtype=torch.float32)
        result = torch.empty_like(input, memory_format=torch.contiguous_format)
        del numbers  # not before: both are there at once
        return result


def _unasked(function: Any) -> Any:
    """Return a copy of a function of ``torch.nn.functional`` that asks no mode before it begins."""
    told = {**function.__globals__, "has_torch_function": lambda _: False}
    copied = types.FunctionType(function.__code__, told, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _is_fused() -> bool:
    """Whether this torch normalizes by the root mean square in one kernel on CUDA: then that returns two tensors."""
    fused = getattr(torch.ops.aten, "_fused_rms_norm", None)
    return fused is not None and len(fused.default._schema.returns) == 2  # noqa: SLF001 (torch has no public reader)


_MULTI_HEAD_ATTENTION = _unasked(F.multi_head_attention_forward)
_PLACES = (torch.device, str)
_DEVICE = torch.Tensor.device
_IS_CUDA = torch.Tensor.is_cuda


def _is_place(value: Any) -> bool:
    return type(value) in _PLACES  # torch's devices have no subclasses, and to be asked for them takes them long


def _asks_for_host(name: str, args: Any, kwargs: Any) -> bool:
    if name != "to":
        return bool(name == "cpu")
    named = [*args[1:], kwargs.get("device")]
    return any(isinstance(value, torch.device | str) and str(value) == "cpu" for value in named)


def _listed(tensor: torch.Tensor) -> Any:
    return np.full(tuple(tensor.shape), any_number(tensor)).tolist()


def _array(tensor: torch.Tensor) -> Any:
    return np.broadcast_to(np.zeros((), dtype=torch.empty(0, dtype=tensor.dtype).numpy().dtype), tuple(tensor.shape))


_VALUES: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "item": any_number,
    "tolist": _listed,
    "numpy": _array,
    "__bool__": lambda tensor: bool(any_number(tensor)),
    "__int__": lambda tensor: int(any_number(tensor)),
    "__index__": lambda tensor: int(any_number(tensor)),
    "__float__": lambda tensor: float(any_number(tensor)),
    "__array__": _array,
}
