"""Run a computation on tensors without memory, and keep book of the bytes that would be alive and of the work.

What is small and known (token ids, masks, timesteps, sizes) is computed as ever, so that code which asks for values gets
them. Whatever meets a weight, or is large, has no memory: it lies on the meta device and says that it is where the
computation will be.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from vramkit.planning.holes import Lives, is_small, passed
from vramkit.planning.operators import Operator, operator_of

__all__ = ["Device", "Ledger", "Results", "Segment"]

Made: TypeAlias = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
# What operators made of such arguments: shape, strides and dtype of each result.
Results: TypeAlias = dict[Any, Made]
_KNOWN_BYTES = 2**18  # what is computed for real is at most this large
# Convolutions of video autoencoders run at a quarter of the rate of a transformer's products (docs/architecture.md).
_OF_CONVOLUTIONS = 4
_CHANNELS_INNERMOST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclasses.dataclass(slots=True)
class Segment:
    """What happened while one component computed, until another one did."""

    component: str  # "" before the first one
    peak_bytes: int
    flops: int = 0
    calls: int = 0
    lives: Lives = dataclasses.field(default_factory=list)
    """Large tensors that were there when it began, and what came and went since; on an accelerator only."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages that operators make: how many bytes live, the peak for each component, and its flops.

    A component computes from when a weight of it is read until one of another component is; weights are not counted.
    """

    def __init__(self, owners: Mapping[int, str], results: Results, *, on_accelerator: bool = False) -> None:
        """Take the component that each storage (by its address in C) of a weight belongs to, and what was made before.

        Convolutions of accelerators have workspaces.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_accelerator = on_accelerator
        self.live_bytes = self.peak_bytes = self.flops = 0
        self.segments = [Segment("", 0)]
        self._owners = owners
        self._results = results
        self._seen: set[int] = set()
        self._in_host_memory: set[int] = set()
        self._choices: dict[int, int] = {}
        self._counted_flops: dict[Any, int] = {}
        self._numbers = itertools.count()
        self._living: dict[int, int] = {}  # bytes of large tensors by number
        self._answers = {**_ANSWERS, torch.ops.aten.bincount: self._counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator on what its arguments are, and enter what it made."""
        kwargs = kwargs or {}
        if func is _INDEX:
            args = args[0], _without_masks(args[1])
        operator, given = operator_of(func), _given(args, [])
        if kwargs:
            _given(kwargs.values(), given)
        self._attribute(given)
        if any(tensor.is_meta for tensor in given):
            result = self._without_memory(func, operator, args, kwargs)
        elif given:
            result = self._of_values(func, operator, args, kwargs, given)
        else:
            result = _made(func, args, kwargs)
        self._count_flops(func, operator, args, kwargs, result)
        if func is _TOPK:
            self._note_choices(result[1])
        note = self.ignore if self._is_on_host(given) else self.enter
        for tensor in _tensors(result):
            note(tensor)
        if self._on_accelerator and operator.is_convolution:
            workspace_bytes = _workspace_bytes(result, *args)
            self.raise_peak(workspace_bytes)
            self._dies(self._is_made(workspace_bytes))
        return result

    def enter(self, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor` from now until it dies, if it is new."""
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()  # noqa: SLF001 (its identity, as torch's own trackers take it)
        if key in self._owners or key in self._seen:
            return

        def forget() -> None:
            self._seen.discard(key)
            self.live_bytes -= size_bytes
            self._dies(number)

        self._seen.add(key)
        self.raise_peak(size_bytes)
        self.live_bytes += size_bytes
        number = self._is_made(size_bytes)
        weakref.finalize(storage, forget)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count `tensor`, which lies in host memory, nor views of it, nor what is made of such tensors alone."""
        key = tensor.untyped_storage()._cdata  # noqa: SLF001
        if key in self._owners or key in self._seen:
            return
        for keys in (self._seen, self._in_host_memory):
            keys.add(key)
            weakref.finalize(tensor.untyped_storage(), keys.discard, key)

    def raise_peak(self, more_bytes: int) -> None:
        """Note that `more_bytes` beside what lives are alive for a moment."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + more_bytes)
        segment = self.segments[-1]
        segment.peak_bytes = max(segment.peak_bytes, self.live_bytes + more_bytes)

    def turn_to(self, component: str) -> Segment:
        """Begin a segment of `component` unless the current one is its own; return it."""
        if self.segments[-1].component != component:
            self.segments.append(Segment(component, self.live_bytes, lives=list(self._living.items())))
        return self.segments[-1]

    def add_flops(self, flops: int) -> None:
        """Add work to the current segment."""
        self.flops += flops
        self.segments[-1].flops += flops

    def mark(self) -> tuple[int, int]:
        """Return a point in the book, for `passed_since`."""
        return len(self.segments), len(self.segments[-1].lives)

    def passed_since(self, mark: tuple[int, int]) -> Lives:
        """Return the large tensors that were made and died since, where no other component computed meanwhile."""
        segments, lives = mark
        return passed(self.segments[-1].lives[lives:]) if segments == len(self.segments) else []

    def repeat(self, passed: Lives) -> None:
        """Enter that tensors came and went as some did before."""
        numbers = {number: next(self._numbers) for number in dict(passed)}
        self.segments[-1].lives += [(numbers[number], size_bytes) for number, size_bytes in passed]

    def _is_made(self, size_bytes: int) -> int | None:
        if not self._on_accelerator or is_small(size_bytes):
            return None
        number = next(self._numbers)
        self._living[number] = size_bytes
        self.segments[-1].lives.append((number, size_bytes))
        return number

    def _dies(self, number: int | None) -> None:
        if number is not None:
            self.segments[-1].lives.append((number, -self._living.pop(number)))

    def _is_on_host(self, given: list[torch.Tensor]) -> bool:
        if not self._in_host_memory:
            return False
        large = [tensor.untyped_storage()._cdata for tensor in given if tensor.is_meta]  # noqa: SLF001
        return bool(large) and all(key in self._in_host_memory for key in large)

    def _attribute(self, given: list[torch.Tensor]) -> None:
        for tensor in given:
            owner = self._owners.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
            if owner is not None:
                self.turn_to(owner)
                return

    def _of_values(self, func: Any, operator: Operator, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        """Run an operator on values, unless it makes much of views that repeat few: a mask of all pairs has gigabytes."""
        repeats = any(tensor.numel() > _KNOWN_BYTES for tensor in given)
        if repeats and operator.packet not in self._answers and operator.makes_new:
            result = self._without_memory(func, operator, args, kwargs)
            if sum(tensor.nbytes for tensor in _tensors(result)) > _KNOWN_BYTES:
                return result
        return _forgotten(func(*args, **kwargs))

    def _without_memory(self, func: Any, operator: Operator, args: Any, kwargs: Any) -> Any:
        if func is _TO_COPY and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            return torch.ops.aten.alias(args[0])  # it is there already
        answer = self._answers.get(operator.packet)
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
        key = func, _noted(args), _noted(tuple(kwargs.items()))
        known = self._results.get(key)
        if known is None:
            result = self._on_meta(func, operator, args, kwargs)
            if made := _shapes_of(result):
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
        bare = [_bare(value) if isinstance(value, torch.Tensor) else _placed(value) for value in flat]
        bare_args, bare_kwargs = tree_unflatten(bare, spec)
        result = func(*bare_args, **bare_kwargs)
        if operator.is_convolution and any(map(_has_channels_innermost, bare_args[:2])):
            result = result.contiguous(memory_format=_CHANNELS_INNERMOST.get(result.ndim, torch.contiguous_format))
        originals = {id(new): old for new, old in zip(bare, flat, strict=True) if isinstance(old, torch.Tensor)}
        if isinstance(result, torch.Tensor):
            return originals.get(id(result), result)
        return tree_map_only(torch.Tensor, lambda tensor: originals.get(id(tensor), tensor), result)

    def _count_flops(self, func: Any, operator: Operator, args: Any, kwargs: Any, result: Any) -> None:
        if func is _GROUPED_PRODUCT:  # each row by one matrix
            self.add_flops(2 * args[0].numel() * args[1].shape[-1])
        if operator.count_flops is not None:
            key = func, _noted(args), _noted(tuple(kwargs.items()))
            if key not in self._counted_flops:
                times = _OF_CONVOLUTIONS if operator.is_convolution else 1
                self._counted_flops[key] = times * int(operator.count_flops(*args, **kwargs, out_val=result))
            self.add_flops(self._counted_flops[key])


def _workspace_bytes(result: torch.Tensor, given: torch.Tensor, weight: torch.Tensor, *_: Any) -> int:
    """What a convolution takes beside its result: what lies otherwise than with its channels innermost, once more.

    So cuDNN did on an H100 for pictures and for clips, in 16 and in 32 bits; from clips to few channels in 32 bits it copies
    its input however that lies. A product for each position (a kernel of one), or each channel by itself, copies nothing.
    Weights lie as checkpoints have them.
    """
    layout = _CHANNELS_INNERMOST.get(given.ndim)
    is_by_position, is_by_channel = max(weight.shape[2:]) == 1, weight.shape[1] == 1 < given.shape[1]
    if layout is None or not given.is_floating_point() or is_by_position or is_by_channel:
        return 0
    is_narrowed = given.ndim == 5 and given.element_size() == 4 and result.shape[1] < 4
    if is_narrowed or not _has_channels_innermost(given):
        return given.nbytes + result.nbytes + weight.nbytes
    return weight.nbytes + (0 if given.is_contiguous(memory_format=layout) else given.nbytes)


def _has_channels_innermost(tensor: torch.Tensor) -> bool:
    """Whether kernels take `tensor` [B, C, ...] as lying with its channels innermost, rows outside of columns and so on."""
    least = 1
    for dim in (1, *reversed(range(2, tensor.ndim)), 0):
        if tensor.stride(dim) < least:
            return False
        least = tensor.stride(dim) * tensor.shape[dim]
    return True


class Device(TorchFunctionMode):
    """Lets tensors without memory say that they are on `device`, and answers what only values could answer."""

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__()
        self._device = device
        self._ledger = ledger

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
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if name in _RECURRENT:  # these compare devices before the ledger sees them
            with _disable_current_modes():
                args = tree_map_only(torch.Tensor, _bare, args)
        if name in _VALUES and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return _VALUES[name](args[0])
        is_remote = self._device.type != "cpu"
        to_host = is_remote and _asks_for_host(name, args, kwargs)
        if is_remote and (any(map(_is_place, args)) or any(map(_is_place, kwargs.values()))):
            args, kwargs = tree_map_only(_PLACES, self._inner, (args, kwargs))
        result = func(*args, **kwargs)
        return self._on_host(result) if to_host and isinstance(result, torch.Tensor) else result

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


_PLACES = (torch.device, str)
_DEVICE = torch.Tensor.device
_IS_CUDA = torch.Tensor.is_cuda


def _given(values: Iterable[Any], found: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add the tensors among `values` to `found`, and return it."""
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _given(value, found)
    return found


def _noted(value: Any) -> Any:
    """Return what tells calls of an operator apart."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([_noted(item) for item in value])
    return value


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


def _is_place(value: Any) -> bool:
    return type(value) in _PLACES  # torch's devices have no subclasses, and to be asked for them takes them long


def _asks_for_host(name: str, args: Any, kwargs: Any) -> bool:
    if name != "to":
        return bool(name == "cpu")
    named = [*args[1:], kwargs.get("device")]
    return any(isinstance(value, torch.device | str) and str(value) == "cpu" for value in named)


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that takes no tensor: for real where the result is small, else without memory."""
    if "device" not in kwargs:
        return func(*args, **kwargs)
    bare = {name: None if isinstance(value, torch.Generator) else value for name, value in kwargs.items()}
    result = func(*args, **{**bare, "device": torch.device("meta")})
    if sum(tensor.nbytes for tensor in _tensors(result)) > _KNOWN_BYTES:
        return result
    return func(*args, **{**kwargs, "device": torch.device("cpu")})


def _forgotten(result: Any) -> Any:
    """Take the memory of results that have become large."""

    def shed(tensor: torch.Tensor) -> torch.Tensor:
        return _bare(tensor) if tensor.untyped_storage().nbytes() > _KNOWN_BYTES else tensor

    return shed(result) if isinstance(result, torch.Tensor) else tree_map_only(torch.Tensor, shed, result)


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


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


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)


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


def _scalar(tensor: torch.Tensor) -> Any:
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def _listed(tensor: torch.Tensor) -> Any:
    return np.full(tuple(tensor.shape), _scalar(tensor)).tolist()


def _array(tensor: torch.Tensor) -> Any:
    return np.broadcast_to(np.zeros((), dtype=torch.empty(0, dtype=tensor.dtype).numpy().dtype), tuple(tensor.shape))


_TO_COPY = torch.ops.aten._to_copy.default  # noqa: SLF001
_INDEX = torch.ops.aten.index.Tensor
_TOPK = torch.ops.aten.topk.default
_GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default  # noqa: SLF001
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_ANSWERS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.nonzero: _all_of,
    torch.ops.aten.masked_select: _selected,
    torch.ops.aten._local_scalar_dense: _scalar,  # noqa: SLF001
    torch.ops.aten.equal: lambda *_: False,
    torch.ops.aten.allclose: lambda *_: False,
    torch.ops.aten._is_all_true: lambda _: torch.ones((), dtype=torch.bool),  # noqa: SLF001 - what is checked holds
    torch.ops.aten._unique2: lambda tensor, *_: _all_different(tensor),  # noqa: SLF001
    torch.ops.aten.unique_dim: lambda tensor, dim, *_: _all_different(tensor, dim),
    torch.ops.aten.unique_consecutive: lambda tensor, _places=0, _counts=0, dim=None: _all_different(tensor, dim),
    torch.ops.aten._grouped_mm: _grouped_product,  # noqa: SLF001
}
_VALUES: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "item": _scalar,
    "tolist": _listed,
    "numpy": _array,
    "__bool__": lambda tensor: bool(_scalar(tensor)),
    "__int__": lambda tensor: int(_scalar(tensor)),
    "__index__": lambda tensor: int(_scalar(tensor)),
    "__float__": lambda tensor: float(_scalar(tensor)),
    "__array__": _array,
}
