"""Run a call once on twins without memory: which component computes when, at what peak, with how much work."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from vramkit.offload.arguments import with_tensors
from vramkit.planning.holes import Lives
from vramkit.planning.ledger import Device, Ledger, Results, Segment

__all__ = ["Deed", "Known", "Outline", "Rehearsal", "rehearse"]

_REPEATS = 8  # how often tensors that come and go in the same way are played: more of it makes no other holes


class Outline:
    """A value whose tensors are known by shape and dtype alone, or as one of those that were `given`."""

    def __init__(self, value: Any, given: Sequence[torch.Tensor | None] = ()) -> None:
        """Take `value`; its tensors are not kept alive."""
        self._places = {id(tensor): place for place, tensor in enumerate(given) if tensor is not None}
        self._strides: dict[int, tuple[int, ...]] = {}
        self._given: dict[int, int] = {}
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # noqa: SLF001 - notes take no memory
            self._value = with_tensors(value, self._note)

    def filled(self, given: Sequence[torch.Tensor | None] = ()) -> Any:
        """Return the value with new tensors, without memory, in the place of its own."""
        return with_tensors(self._value, lambda bare: self._make(bare, given))

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        bare = torch.empty((), dtype=tensor.dtype, device="meta").expand(tensor.shape)
        self._strides[id(bare)] = tensor.stride()
        if id(tensor) in self._places:
            self._given[id(bare)] = self._places[id(tensor)]
        return bare

    def _make(self, bare: torch.Tensor, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
        known = given[self._given[id(bare)]] if id(bare) in self._given else None
        if known is not None:
            return known
        return torch.empty_strided(bare.shape, self._strides[id(bare)], dtype=bare.dtype, device="meta")


@dataclasses.dataclass(slots=True)
class Rehearsal:
    """What one call would do."""

    segments: list[Segment]
    peak_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Deed:
    """What a call of one kind did."""

    output: Outline | None
    """What it returned, and what the lists hold then that it wrote to, by their place among those that it was given.

    None where it holds or writes to what may keep state: such a call is run again.
    """
    grown_bytes: int  # peak over what was alive when it began
    kept_bytes: int  # tables that the first call made for all that follow
    flops: int
    passed: Lives
    """Large tensors that it made and let go of."""


@dataclasses.dataclass(slots=True)
class Known:
    """What rehearsals have seen: calls by component, what of it was called, and shapes of the arguments; operators."""

    deeds: dict[Any, Deed] = dataclasses.field(default_factory=dict)
    results: Results = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How each component computes now: what it did otherwise does not count."""


def rehearse(
    shadows: Mapping[str, nn.Module],
    entry_points: Mapping[str, tuple[str, ...]],
    call: Callable[[], object],
    *,
    device: torch.device,
    known: Known | None = None,
) -> Rehearsal:
    """Run `call`, which uses `shadows`, as if they were on `device`.

    Args:
        shadows: the twins by name.
        entry_points: the methods of each that run it.
        call: what to run.
        device: where the computation will be.
        known: what calls of components did in rehearsals before, and gets what they do in this one.
    """
    # Kept until the end: a call may put others in their place, which would else be taken for them.
    held = [(tensor, name) for name, module in reversed(list(shadows.items())) for tensor in _held(module)]
    owners = {tensor.untyped_storage()._cdata: name for tensor, name in held}  # noqa: SLF001 (see Ledger)
    known = Known() if known is None else known
    ledger = Ledger(owners, known.results, on_accelerator=device.type != "cpu")
    watch = _Watch(ledger, known)
    with contextlib.ExitStack() as stack:
        for name, module in shadows.items():
            for method in entry_points[name]:
                stack.enter_context(watch.watching_component(name, module, method))
            for block in _alike(module):
                stack.enter_context(watch.watching_block(name, block))
            for layer in _layers_of_their_own(module):
                stack.enter_context(watch.watching_layer(name, layer))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to say is said when the call is made
        stack.enter_context(torch.random.fork_rng(devices=()))  # the call that follows draws what it would have drawn
        stack.enter_context(torch.no_grad())
        stack.enter_context(ledger)
        stack.enter_context(Device(device, ledger))
        call()
    return Rehearsal(ledger.segments, ledger.peak_bytes)


def _held(module: nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):  # noqa: SLF001
            yield from (tensor for tensor in held.values() if isinstance(tensor, torch.Tensor))


class _Watch:
    """Sees components being called, and runs each kind of call once: the same shapes do the same."""

    def __init__(self, ledger: Ledger, known: Known) -> None:
        self._ledger = ledger
        self._known = known
        self._seen: set[Any] = set()
        self._repeated: Counter[Any] = Counter()
        self._is_inside = False

    def watching_component(self, name: str, module: nn.Module, method: str) -> AbstractContextManager[None]:
        """See calls of a component from outside."""
        inner = getattr(module, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return inner(*args, **kwargs)
            self._ledger.turn_to(name).calls += 1
            self._is_inside = True
            try:
                return self._once((name, method, _signature((args, kwargs))), inner, args, kwargs)
            finally:
                self._is_inside = False

        return _replaced(module, method, outer)

    def watching_block(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """See calls of one of several blocks that are alike."""
        inner = block.forward
        kind = type(block), tuple((tuple(p.shape), p.dtype) for p in block.parameters())

        def outer(*args: Any, **kwargs: Any) -> Any:
            if not _is_simple((args, kwargs)):  # something may be written to
                return inner(*args, **kwargs)
            self._ledger.turn_to(name)
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - a look that is not of the call
                key = name, kind, _signature((args, kwargs))
            return self._once(key, inner, args, kwargs)

        return _replaced(block, "forward", outer)

    def watching_layer(self, name: str, layer: nn.Module) -> AbstractContextManager[None]:
        """See calls of a layer, which does the same with tensors that lie in the same way."""
        inner = layer.forward

        def outer(*args: Any, **kwargs: Any) -> Any:
            if not _is_simple((args, kwargs)):
                return inner(*args, **kwargs)
            self._ledger.turn_to(name)
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - a look that is not of the call
                key = name, id(layer), _strides((args, kwargs)), _signature((args, kwargs))
            return self._once(key, inner, args, kwargs)

        return _replaced(layer, "forward", outer)

    def _once(self, key: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call, unless one of its kind has run already: then enter what that did."""
        ledger = self._ledger
        key = *key, self._known.settings.get(key[0])
        # Not held meanwhile: a list may be how a caller hands a tensor over, to be let go of inside.
        references = [weakref.ref(tensor) for tensor in _tensors_of((args, kwargs))]
        lists = list(_lists((args, kwargs)))
        deed = self._known.deeds.get(key)
        if deed is not None and deed.output is not None:
            return self._entered(key, deed, deed.output, [reference() for reference in references], lists)
        before = [[_reference(item) for item in each] for each in lists]
        listed = _storages(lists)
        mark = ledger.mark()
        base_bytes, peak_bytes, flops = ledger.live_bytes, ledger.peak_bytes, ledger.flops
        ledger.peak_bytes = base_bytes
        try:
            output = inner(*args, **kwargs)
        finally:
            grown_bytes, ledger.peak_bytes = ledger.peak_bytes - base_bytes, max(peak_bytes, ledger.peak_bytes)
        given = [reference() for reference in references]
        written = {at: list(each) for at, each in enumerate(lists) if not _holds(each, before[at])}
        result = output, written
        held, known = _storages(result), _storages(given)
        kept_bytes = ledger.live_bytes - base_bytes - sum(held[storage] for storage in held.keys() - known.keys())
        self._seen.add(key)
        is_told = _is_plain(output) and not _has_views(result, given)
        if written:  # which tells all, if nothing else was kept or let go of
            gone_bytes = sum(listed[storage] for storage in listed.keys() - known.keys() - held.keys())
            is_told = is_told and kept_bytes == -gone_bytes and _are_flat(written) and not _overlap(result, given)
        self._known.deeds[key] = Deed(
            output=Outline(result, given) if is_told else None,
            grown_bytes=grown_bytes,
            kept_bytes=max(0, kept_bytes),
            flops=ledger.flops - flops,
            passed=ledger.passed_since(mark),
        )
        return output

    def _entered(
        self, key: Any, deed: Deed, told: Outline, given: list[torch.Tensor | None], lists: list[list[Any]]
    ) -> Any:
        """Enter what a call of that kind did, and return what it returned."""
        ledger = self._ledger
        if key not in self._seen:
            self._seen.add(key)
            ledger.live_bytes += deed.kept_bytes
        ledger.raise_peak(deed.grown_bytes - deed.kept_bytes)
        self._repeated[key] += 1
        if self._repeated[key] <= _REPEATS:
            ledger.repeat(deed.passed)
        ledger.add_flops(deed.flops)
        output, written = told.filled(given)
        for at, items in written.items():
            lists[at][:] = items
        return output


@contextlib.contextmanager
def _replaced(module: nn.Module, method: str, outer: Any) -> Iterator[None]:
    outer.__signature__ = inspect.signature(getattr(module, method))  # pipelines ask what a model takes
    vars(module)[method] = outer
    try:
        yield
    finally:
        del vars(module)[method]


def _alike(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of lists that hold several of one class."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            blocks = [block for block in part if isinstance(block, nn.Module)]  # a list may hold None
            kinds = Counter(map(type, blocks))
            for block in blocks:
                # What is called before it may keep things for each block, as weight norms keep weights.
                is_own = "forward" in vars(block) or any(inner._forward_pre_hooks for inner in block.modules())  # noqa: SLF001
                if kinds[type(block)] > 1 and not is_own:
                    yield block


def _layers_of_their_own(module: nn.Module) -> Iterator[nn.Module]:
    """Yield layers that are no operators of torch, as norms: autoencoders call each for every frame, tile or stripe."""
    for part in module.modules():
        is_leaf = part._parameters and not part._modules  # noqa: SLF001
        is_own = "forward" in vars(part) or part._forward_pre_hooks  # noqa: SLF001
        if is_leaf and not is_own and not type(part).__module__.startswith("torch."):
            yield part


def _tensors_of(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, note)
    return found


def _strides(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in _tensors_of(value))


def _storages(value: Any) -> dict[int, int]:
    with torch._C.DisableTorchFunction():  # noqa: SLF001 - a look that is not of the call
        held = [tensor.untyped_storage() for tensor in _tensors_of(value)]
    return {storage._cdata: storage.nbytes() for storage in held}  # noqa: SLF001


def _has_views(output: Any, given: Sequence[torch.Tensor | None]) -> bool:
    """Whether an output lies in the memory of an argument, and is not that argument."""
    objects = {id(tensor) for tensor in given}
    new = [tensor for tensor in _tensors_of(output) if id(tensor) not in objects]
    return not _storages(new).keys().isdisjoint(_storages(given))


def _are_flat(written: Mapping[int, list[Any]]) -> bool:
    """Whether lists hold nothing that somebody else may hold and write to."""
    items = (item for each in written.values() for item in each)
    return all(item is None or isinstance(item, torch.Tensor | int | float | str) for item in items)


def _overlap(result: Any, given: Sequence[torch.Tensor | None]) -> bool:
    """Whether several tensors in a result lie in the same memory, beside those that were `given`."""
    known = {id(tensor) for tensor in given}
    new = [tensor for tensor in _tensors_of(result) if id(tensor) not in known]
    return len(_storages(new)) < len(new)


def _lists(value: Any) -> Iterator[list[Any]]:
    """Yield the lists in arguments, which a call may write to."""
    if isinstance(value, list):
        yield value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _lists(item)


def _reference(item: Any) -> Callable[[], Any]:
    """Return what gives `item` back, without keeping a tensor alive."""
    return weakref.ref(item) if isinstance(item, torch.Tensor) else lambda: item


def _holds(items: list[Any], references: list[Callable[[], Any]]) -> bool:
    """Whether a list still holds those very items."""
    return len(items) == len(references) and all(
        item is reference() for item, reference in zip(items, references, strict=True)
    )


def _is_simple(value: Any) -> bool:
    """Whether arguments are nothing that a block could write anything but numbers to."""
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    if isinstance(value, list):  # `_once` sees whether it is written to
        return all(map(_is_simple, value))
    if isinstance(value, Mapping):
        return all(map(_is_simple, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bool(getattr(value, "__dataclass_params__").frozen)  # noqa: B009 - typeshed does not know it
    return value is None or callable(value) or isinstance(value, torch.Tensor | int | float | str | torch.dtype)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name, None)) for field in dataclasses.fields(value))
    return value is None or isinstance(value, torch.Tensor | int | float | str)


def _signature(value: Any) -> Any:
    """Return what decides how much a call does: shapes, and everything else by value or by identity."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value), tuple(_signature(getattr(value, field.name, None)) for field in fields)
    return value if value is None or isinstance(value, bool | int | float | str) else id(value)
