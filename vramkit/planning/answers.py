"""What operators make of tensors without memory, and as much as there can be where sizes are values.

What is small and known (token ids, masks, timesteps, sizes) is computed as ever, so that code which asks for values gets
them. Whatever meets a weight, or is large, has no memory: it lies on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from vramkit.planning.convolutions import laid_out
from vramkit.planning.operators import Operator

__all__ = ["Answers", "Results", "any_number", "bare", "noted", "tensors_of"]

Made: TypeAlias = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
# What operators made of such arguments: shape, strides and dtype of each result.
Results: TypeAlias = dict[Any, Made]
_KNOWN_BYTES = 2**18  # what is computed for real is at most this large


class Answers:
    """Runs operators on tensors of which some have no memory."""

    def __init__(self, results: Results) -> None:
        """Take what operators made before, which gets what they make from now on."""
        self._results = results
        self._choices: dict[int, int] = {}
        self._special = {**_ANSWERS, torch.ops.aten.bincount: self._counted}

    @staticmethod
    def arguments(func: Any, args: Any) -> Any:
        """Return arguments of an operator as they can be answered."""
        return (args[0], _without_masks(args[1])) if func is _INDEX else args

    def result_of(self, func: Any, operator: Operator, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> Any:
        """Run one operator; `given` are the tensors among its `arguments`."""
        if any(tensor.is_meta for tensor in given):
            result = self._without_memory(func, operator, args, kwargs)
        elif given:
            result = self._of_values(func, operator, args, kwargs, given)
        else:
            result = _made(func, args, kwargs)
        if func is _TOPK:
            self._note_choices(result[1])
        return result

    def _of_values(self, func: Any, operator: Operator, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> Any:
        """Run an operator on values, unless it makes much of views that repeat few: a mask of all pairs has gigabytes."""
        repeats = any(tensor.numel() > _KNOWN_BYTES for tensor in given)
        if repeats and operator.packet not in self._special and operator.makes_new:
            result = self._without_memory(func, operator, args, kwargs)
            if sum(tensor.nbytes for tensor in tensors_of((result,))) > _KNOWN_BYTES:
                return result
        return _forgotten(func(*args, **kwargs))

    def _without_memory(self, func: Any, operator: Operator, args: Any, kwargs: Any) -> Any:
        if func is _TO_COPY and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            return torch.ops.aten.alias(args[0])  # it is there already
        answer = self._special.get(operator.packet)
        if answer is not None:
            return answer(*args, **kwargs)
        if operator.writes_to_first and isinstance(args[0], torch.Tensor):
            return args[0]  # written to in place: the very object, also where that is known and stays so
        out = kwargs.get("out")
        if isinstance(out, torch.Tensor) and out.numel():
            return out  # has its size already
        return (self._anew if operator.makes_new else self._on_meta)(func, operator, args, kwargs)

    def _anew(self, func: Any, operator: Operator, args: Any, kwargs: Any) -> Any:
        """Run an operator that makes something new, or make what it made of such arguments before."""
        key = func, noted(args), noted(tuple(kwargs.items()))
        known = self._results.get(key)
        if known is None:
            result = self._on_meta(func, operator, args, kwargs)
            made = _shapes_of(result)
            if made and not _share_memory(tensors_of((result,)), tensors_of((*args, *kwargs.values()))):
                self._results[key] = made
            return result
        new = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in known]
        return new[0] if operator.returns == 1 else tuple(new)

    def _note_choices(self, chosen: torch.Tensor) -> None:
        """Remember of how many different choices each row of `chosen` [..., choices] consists, for what is a view of it."""
        storage = chosen.untyped_storage()
        self._choices[storage._cdata] = chosen.shape[-1] if chosen.ndim else 1  # noqa: SLF001
        weakref.finalize(storage, self._choices.pop, storage._cdata)  # noqa: SLF001

    def _counted(self, chosen: torch.Tensor, weights: Any = None, minlength: int = 0) -> torch.Tensor:
        """Count as if all rows chose the same: no bin can hold more, and all together hold as many as there are."""
        choices = self._choices.get(chosen.untyped_storage()._cdata, 1)  # noqa: SLF001
        counts = torch.zeros(max(minlength, choices), dtype=torch.int64 if weights is None else torch.float64)
        counts[:choices] = chosen.numel() // choices
        return counts

    def _on_meta(self, func: Any, operator: Operator, args: Any, kwargs: Any) -> Any:
        if not kwargs and not operator.is_convolution and _are_bare(args):
            return func(*args)
        flat, spec = tree_flatten((args, kwargs))
        flat_bare = [bare(value) if isinstance(value, torch.Tensor) else _placed(value) for value in flat]
        bare_args, bare_kwargs = tree_unflatten(flat_bare, spec)
        result = func(*bare_args, **bare_kwargs)
        if operator.is_convolution:
            result = laid_out(result, bare_args[:2])
        originals = {id(new): old for new, old in zip(flat_bare, flat, strict=True) if isinstance(old, torch.Tensor)}
        if isinstance(result, torch.Tensor):
            return originals.get(id(result), result)
        return tree_map_only(torch.Tensor, lambda tensor: originals.get(id(tensor), tensor), result)


def noted(value: Any) -> Any:
    """Return what tells calls of an operator apart."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([noted(item) for item in value])
    return value


def tensors_of(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among arguments or results of an operator."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(value)
    return found


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """Return one that lies in the same way, without memory."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def any_number(tensor: torch.Tensor) -> Any:
    """Return what stands for a number in a tensor that nobody knows."""
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def _are_bare(values: Iterable[Any]) -> bool:
    """Whether `values` are as an operator without memory takes them: tensors have none, and places are not named."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if not value.is_meta:
                return False
        elif isinstance(value, list | tuple):
            if not _are_bare(value):
                return False
        elif type(value) in (torch.device, torch.Generator):
            return False
    return True


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that takes no tensor: for real where the result is small, else without memory.

    The meta device is named by operators alone that make something beside a tensor without memory: so it is made there.
    """
    if kwargs.get("device", _META) == _META:
        return func(*args, **kwargs)
    bare = {name: None if isinstance(value, torch.Generator) else value for name, value in kwargs.items()}
    result = func(*args, **{**bare, "device": torch.device("meta")})
    if sum(tensor.nbytes for tensor in tensors_of((result,))) > _KNOWN_BYTES:
        return result
    return func(*args, **{**kwargs, "device": torch.device("cpu")})


def _forgotten(result: Any) -> Any:
    """Take the memory of results that have become large."""

    def shed(tensor: torch.Tensor) -> torch.Tensor:
        return bare(tensor) if tensor.untyped_storage().nbytes() > _KNOWN_BYTES else tensor

    return shed(result) if isinstance(result, torch.Tensor) else tree_map_only(torch.Tensor, shed, result)


def _placed(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return None if isinstance(value, torch.Generator) else value


def _shapes_of(result: Any) -> Made:
    """Return what the results of an operator are; nothing where they are not all tensors."""
    results = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(each, torch.Tensor) for each in results):
        return ()
    return tuple((each.shape, each.stride(), each.dtype) for each in results)


def _share_memory(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Tell whether tensors lie in the memory of others: some operators return views and do not say so."""
    storages = {tensor.untyped_storage()._cdata for tensor in others}  # noqa: SLF001
    return any(tensor.untyped_storage()._cdata in storages for tensor in some)  # noqa: SLF001


def _all_of(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Return the indices of every number, for no more can be different from zero."""
    return torch.zeros(tensor.numel(), max(1, tensor.ndim), dtype=torch.int64, device="meta")


def _named_by(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices [n, dims] of what a mask takes: all where it is not known."""
    return _all_of(mask) if mask.is_meta else mask.nonzero()


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Put indices in the place of masks: they have a size, also where nobody knows what they are."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8) and index.ndim:
            found.extend(_named_by(index).unbind(1))
        else:
            found.append(index)
    return found


def _selected(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    mask = mask.expand(torch.broadcast_shapes(tensor.shape, mask.shape))  # type: ignore[no-untyped-call]
    return torch.empty(len(_named_by(mask)), dtype=tensor.dtype, device="meta")


def _all_different(tensor: torch.Tensor, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values, the place of each among them, and how often each is there, as if none were there twice."""
    values = tensor.new_empty(tensor.numel()) if dim is None else torch.empty_like(tensor)
    places = torch.empty(tensor.shape if dim is None else tensor.shape[dim], dtype=torch.int64, device="meta")
    return values, places, torch.empty_like(places.flatten())


def _grouped_product(rows: torch.Tensor, matrices: torch.Tensor, offs: Any = None, *_: Any, **kwargs: Any) -> Any:
    """Multiply by several matrices, in any dtype: the meta device insists on the one that one kernel takes."""
    groups = {4: (0 if offs is None else len(offs),), 6: rows.shape[:1]}.get(rows.ndim + matrices.ndim, ())
    shape = (*groups, rows.shape[-2], matrices.shape[-1])
    return torch.empty(shape, dtype=kwargs.get("out_dtype") or rows.dtype, device="meta")


_META = torch.device("meta")
_TO_COPY = torch.ops.aten._to_copy.default  # noqa: SLF001
_INDEX = torch.ops.aten.index.Tensor
_TOPK = torch.ops.aten.topk.default
_ANSWERS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.nonzero: _all_of,
    torch.ops.aten.masked_select: _selected,
    torch.ops.aten._local_scalar_dense: any_number,  # noqa: SLF001
    torch.ops.aten.equal: lambda *_: False,
    torch.ops.aten.allclose: lambda *_: False,
    torch.ops.aten._is_all_true: lambda _: torch.ones((), dtype=torch.bool),  # noqa: SLF001 - what is checked holds
    torch.ops.aten._unique2: lambda tensor, *_: _all_different(tensor),  # noqa: SLF001
    torch.ops.aten.unique_dim: lambda tensor, dim, *_: _all_different(tensor, dim),
    torch.ops.aten.unique_consecutive: lambda tensor, _places=0, _counts=0, dim=None: _all_different(tensor, dim),
    torch.ops.aten._grouped_mm: _grouped_product,  # noqa: SLF001
}
