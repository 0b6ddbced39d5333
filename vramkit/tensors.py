"""Tensors taken apart and put together: the one place that knows tensor kinds.

Everything else in vramkit moves *leaves*: plain, dense, strided tensors. A plain tensor is its own leaf. A wrapper subclass
(quantized or scaled weights) names its inner tensors through ``__tensor_flatten__`` and is put together again, around other
leaves, by ``__tensor_unflatten__``; how often it nests does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vramkit.errors import UnsupportedTensorError

__all__ = [
    "as_owned",
    "byte_view",
    "copy_values",
    "dense_like",
    "is_dense",
    "is_plain",
    "leaves",
    "rebuild",
    "typed_view",
    "version",
]

_PACKED_FOR_A_DEVICE = ("TinyGemm", "Marlin", "AWQ")  # classes of optimum-quanto
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is its own leaf: no subclass with inner tensors."""
    return type(tensor) in _PLAIN


def leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that hold the bytes of `tensor`, in a fixed order.

    Raises:
        UnsupportedTensorError: for a subclass that cannot be taken apart, or a layout that is not strided.
    """
    if is_plain(tensor):
        if tensor.layout != torch.strided:
            raise UnsupportedTensorError(
                f"a tensor of layout {tensor.layout} cannot be streamed; only strided tensors can: call .to_dense() first"
            )
        return [tensor.detach()]
    names, _ = _flatten(tensor)
    return [leaf for name in names for leaf in leaves(getattr(tensor, name))]


def rebuild(like: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put a tensor of the same kind as `like` together around other leaves (in the order of `leaves`)."""
    remaining = iter(parts)
    tensor = _rebuild(like, remaining)
    if next(remaining, None) is not None:
        raise ValueError("more leaves were given than the tensor has")
    return tensor


def as_owned(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Wrap `tensor` so that a module can own it as it owns `like`: a frozen Parameter for a Parameter, else as it is."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write the bytes of `source`, a tensor of the same kind and shape on whatever device, into `target`."""
    with torch.no_grad():
        for old, new in zip(leaves(target), leaves(source), strict=True):
            old.copy_(new)


def version(tensor: torch.Tensor) -> int:
    """Return a number that changes when `tensor` is written in place (0 for inference tensors, which do not count)."""
    if is_plain(tensor):
        try:  # `is_inference` does not tell: it follows what is assigned to `.data`, and the count does not
            return tensor._version  # noqa: SLF001 (torch has no public reader)
        except RuntimeError:
            return 0
    names, _ = _flatten(tensor)
    return sum(version(getattr(tensor, name)) for name in names)


def is_dense(leaf: torch.Tensor) -> bool:
    """Tell whether the elements of `leaf` fill one span of memory without holes or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(leaf.stride(), leaf.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense_like(leaf: torch.Tensor) -> tuple[int, ...]:
    """Return the strides a copy of `leaf` gets: its own where it is dense (transposed weights stay so), else contiguous."""
    return tuple(leaf.stride()) if is_dense(leaf) else tuple(torch.empty(leaf.shape, device="meta").stride())


def byte_view(leaf: torch.Tensor, size_bytes: int | None = None) -> torch.Tensor:
    """Return the bytes of a dense `leaf` as a 1-D uint8 tensor over the same memory (`size_bytes` from its first on)."""
    count = leaf.nbytes if size_bytes is None else size_bytes
    offset = leaf.storage_offset() * leaf.element_size()
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(
            leaf.untyped_storage(), offset, (count,), (1,)
        )


def typed_view(
    memory: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """View bytes ``memory[offset:]`` (1-D uint8, `offset` a multiple of the item size) as a strided tensor of `dtype`."""
    start = memory.storage_offset() + offset
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), start // dtype.itemsize, tuple(shape), tuple(stride))


def _flatten(tensor: torch.Tensor) -> tuple[list[str], Any]:
    # A Parameter of a wrapper subclass keeps the class of the wrapper, so one attribute tells both.
    kind = type(tensor)
    if kind.__module__.startswith("bitsandbytes."):
        raise UnsupportedTensorError(
            f"a {kind.__name__} cannot be streamed: the layer that owns it changes it while it runs. Call "
            "vramkit.quant.adopt(module) first, which keeps the bytes and the numbers"
        )
    if kind.__module__.startswith("optimum.quanto.") and kind.__name__.startswith(_PACKED_FOR_A_DEVICE):
        raise UnsupportedTensorError(
            f"a {kind.__name__} cannot be streamed: its bytes are arranged for one kind of device. Quantize the original "
            "weights by vramkit.quant.QuantoConfig, or with optimized=False"
        )
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        raise UnsupportedTensorError(
            f"a tensor of class {type(tensor).__module__}.{type(tensor).__qualname__} cannot be streamed: it does not say "
            "which plain tensors it holds (__tensor_flatten__). Keep its module out of offloading, or load the model plain"
        )
    names, context = flatten()
    return list(names), context


def _rebuild(like: torch.Tensor, parts: Iterator[torch.Tensor]) -> torch.Tensor:
    if is_plain(like):
        return next(parts)
    names, context = _flatten(like)
    inner = {name: _rebuild(getattr(like, name), parts) for name in names}
    unflatten = type(like).__tensor_unflatten__  # type: ignore[attr-defined]
    tensor: torch.Tensor = unflatten(inner, context, like.size(), like.stride())
    return tensor
