"""Tensors taken apart and put together: the one place that knows tensor kinds.

Everything else in vramkit moves *leaves*: plain, dense, strided tensors. A plain tensor is its own leaf. A wrapper subclass
(quantized or scaled weights) names its inner tensors through ``__tensor_flatten__`` and is put together again, around other
leaves, by ``__tensor_unflatten__``; how often it nests does not matter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from vramkit.errors import UnsupportedTensorError

__all__ = [
    "as_owned",
    "byte_view",
    "copy_values",
    "dense_like",
    "is_dense",
    "is_expanded",
    "is_inference_made",
    "is_plain",
    "kind_of",
    "leaves",
    "like_owned",
    "materialize",
    "materializes",
    "rebuild",
    "sparse_parts",
    "typed_view",
    "version",
    "write_count",
]

_PACKED_FOR_A_DEVICE = ("TinyGemm", "Marlin", "AWQ")  # classes of optimum-quanto
# What a subclass makes of operations is not asked for, here where its attributes are read: that takes longer than the rest.
_reading = torch._C.DisableTorchFunctionSubclass  # noqa: SLF001 (torch's extension point)
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_DISABLED = torch._C._disabled_torch_dispatch_impl  # noqa: SLF001 (what classes without one have)


def kind_of(tensor: torch.Tensor) -> type[torch.Tensor]:
    """Return the class that `tensor` was made with: a watched tensor (`vramkit.offload.watch`) has a class of its own."""
    kind: type[torch.Tensor] = getattr(type(tensor), "watched_kind", type(tensor))
    return kind


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is its own leaf: no subclass with inner tensors.

    A Parameter of a class that others derived (to mark it, or to hang attributes on it) is plain too, unless the class
    takes part in how operations are carried out.
    """
    kind = kind_of(tensor)
    return kind in _PLAIN or (
        issubclass(kind, nn.Parameter)
        and not isinstance(tensor, UninitializedParameter | UninitializedBuffer)
        and not hasattr(kind, "__tensor_flatten__")
        and kind.__torch_dispatch__ is _DISABLED
        and not kind.__module__.startswith("bitsandbytes.")
    )


def leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that hold the bytes of `tensor`, in a fixed order.

    Raises:
        UnsupportedTensorError: for a subclass that cannot be taken apart, or a layout that is not strided.
    """
    if is_plain(tensor):
        with _reading():
            if tensor.layout != torch.strided:
                raise UnsupportedTensorError(
                    f"a tensor of layout {tensor.layout} cannot be streamed; only strided tensors can: call .to_dense() "
                    "first"
                )
            return [tensor.detach()]
    names, _ = _flatten(tensor)
    return [leaf for name in names for leaf in leaves(getattr(tensor, name))]


def rebuild(like: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put a tensor of the same kind as `like` together around other leaves (in the order of `leaves`)."""
    remaining = iter(parts)
    with _reading():
        tensor = _rebuild(like, remaining)
    if next(remaining, None) is not None:
        raise ValueError("more leaves were given than the tensor has")
    return tensor


def as_owned(tensor: torch.Tensor, like: torch.Tensor, kind: type[torch.Tensor] | None = None) -> torch.Tensor:
    """Wrap `tensor` so that a module can own it as it owns `like`: a frozen Parameter for a Parameter, else as it is.

    A Parameter is of the class of `like` (or of `kind`, a class derived from it) and has its attributes.
    """
    if not isinstance(like, nn.Parameter):
        return tensor
    if is_plain(like) and is_plain(tensor):
        owned = torch.Tensor._make_subclass(kind or kind_of(like), tensor, False)  # noqa: SLF001
        owned.__dict__.update(vars(like))
        return owned
    with _reading():
        return nn.Parameter(tensor, requires_grad=False)


def like_owned(rest: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return an ordinary tensor as modules own them, where and of the class that `rest` is, with the values of `values`.

    It shares the memory of `rest` where `values` is `rest`.
    """
    parts = leaves(rest)
    if values is not rest and not materializes(rest):  # what is made of others cannot have been written to
        parts = [new.to(old.device, copy=True) for old, new in zip(parts, leaves(values), strict=True)]
    return as_owned(rebuild(rest, parts), like=rest).requires_grad_(rest.requires_grad)


def materializes(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is made where it is used: its kind writes its values into its first leaf (`materialize_`)."""
    return hasattr(kind_of(tensor), "materialize_")


def materialize(like: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make a tensor of the kind of `like` of other leaves, in the first of them, which is returned."""
    made: torch.Tensor = rebuild(like, parts).materialize_()  # type: ignore[attr-defined]
    return made


def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write the bytes of `source`, a tensor of the same kind and shape on whatever device, into `target`.

    Raises:
        UnsupportedTensorError: `target` is made of others where it is used, so that it cannot take values.
    """
    with torch.no_grad():
        if materializes(source) and not materializes(target):
            first, *others = leaves(source)
            source = materialize(source, [first.clone(), *others])
        elif materializes(target) and not materializes(source):
            raise UnsupportedTensorError(
                f"a weight was written to that is kept as a {kind_of(target).__name__} and made at each use: the change "
                "would be lost"
            )
        for old, new in zip(leaves(target), leaves(source), strict=True):
            old.copy_(new)


write_count: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""Returns how often a plain tensor was written in place. One that was made in inference mode does not count that."""


def version(tensor: torch.Tensor) -> int:
    """Return a number that changes when `tensor` is written in place (0 for inference tensors, which do not count)."""
    if is_plain(tensor):
        return 0 if is_inference_made(tensor) else tensor._version  # noqa: SLF001 (torch has no public reader)
    names, _ = _flatten(tensor)
    return sum(version(getattr(tensor, name)) for name in names)


def sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors inside a sparse one, which is no leaf and not taken apart; none for a strided tensor."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]  # noqa: SLF001 (the public ones ask for sorted indices)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def is_inference_made(tensor: torch.Tensor) -> bool:
    """Tell whether a plain `tensor` was made in inference mode: it counts no writes, and takes no other ``.data``."""
    try:  # `is_inference` does not tell: it follows what is assigned to `.data`, and the count does not
        tensor._version  # noqa: B018, SLF001 (torch has no public reader)
    except RuntimeError:
        return True
    return False


def is_dense(leaf: torch.Tensor) -> bool:
    """Tell whether one span of memory holds the elements of `leaf`, as they are, without holes or overlaps, in any order."""
    if (
        leaf.is_conj() or leaf.is_neg()
    ):  # conjugated or negated when they are read: a bit of the tensor and not its bytes
        return False
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(leaf.stride(), leaf.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_expanded(leaf: torch.Tensor) -> bool:
    """Tell whether elements of a strided `leaf` share memory (``expand``), so that it cannot be written to."""
    return any(stride == 0 and size > 1 for stride, size in zip(leaf.stride(), leaf.shape, strict=True))


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
    with _reading():
        names, context = flatten()
    return list(names), context


def _rebuild(like: torch.Tensor, parts: Iterator[torch.Tensor]) -> torch.Tensor:
    if is_plain(like):
        return next(parts)
    names, context = _flatten(like)
    inner = {name: _rebuild(getattr(like, name), parts) for name in names}
    unflatten = kind_of(like).__tensor_unflatten__  # type: ignore[attr-defined]
    tensor: torch.Tensor = unflatten(inner, context, like.size(), like.stride())
    return tensor
