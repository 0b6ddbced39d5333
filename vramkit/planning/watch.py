"""Sees parts of components being called in a rehearsal, and runs each kind of call once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from vramkit.offload.arguments import with_tensors
from vramkit.planning.deeds import Deed, Known, Outline
from vramkit.planning.holes import Course
from vramkit.planning.keepers import Kept, is_keeper
from vramkit.planning.ledger import Ledger

__all__ = ["Watch"]

# How often tensors that come and go in the same way are played: more of it makes no other holes, unless some stay each time.
_REPEATS = 8


class Watch:
    """Sees components being called, and runs each kind of call once: the same shapes do the same."""

    def __init__(self, ledger: Ledger, known: Known) -> None:
        self._ledger = ledger
        self._known = known
        self._seen: set[Any] = set()
        self._repeated: Counter[Any] = Counter()
        self._is_inside = False

    @property
    def has_repeated(self) -> bool:
        """Whether calls were not run because others had done the same."""
        return bool(self._repeated)

    def watching_component(self, name: str, module: nn.Module, method: str) -> AbstractContextManager[None]:
        """See calls of a component from outside."""
        inner = getattr(module, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return inner(*args, **kwargs)
            self._ledger.turn_to(name).calls += 1
            self._is_inside = True
            try:
                call = _Call(inner, args, kwargs)
                return self._once((name, method, call.signature()), call)
            finally:
                self._is_inside = False

        return _replaced(module, method, outer)

    def watching_block(self, name: str, block: nn.Module, *, is_alone: bool = False) -> AbstractContextManager[None]:
        """See calls of one of several blocks that are alike; of one that `is_alone` those that are given keepers."""
        inner = block.forward
        kind = type(block), tuple((tuple(p.shape), p.dtype) for p in block.parameters())
        layers = list(block.modules())

        def outer(*args: Any, **kwargs: Any) -> Any:
            call = _Call(inner, args, kwargs, layers)
            if not call.is_simple or (is_alone and not call.keepers):  # something may be written to
                return inner(*args, **kwargs)
            self._ledger.turn_to(name)
            return self._once((name, kind, call.signature(with_strides=bool(call.keepers))), call)

        return _replaced(block, "forward", outer)

    def watching_layer(self, name: str, layer: nn.Module) -> AbstractContextManager[None]:
        """See calls of a layer, which does the same with tensors that lie in the same way."""
        inner = layer.forward

        def outer(*args: Any, **kwargs: Any) -> Any:
            call = _Call(inner, args, kwargs, [layer])
            if not call.is_simple:
                return inner(*args, **kwargs)
            self._ledger.turn_to(name)
            return self._once((name, id(layer), call.signature(with_strides=True)), call)

        return _replaced(layer, "forward", outer)

    def _once(self, key: Any, call: _Call) -> Any:
        """Run a call, unless one of its kind has run already: then enter what that did."""
        key = *key, self._known.settings.get(key[0])
        kept = call.kept()
        deeds = self._known.deeds.setdefault(key, [])
        deed = next((deed for deed in deeds if kept.begins_with(deed.taken)), None)
        if deed is not None and deed.output is not None and self._known.is_repeated:
            return self._entered(key, deed, deed.output, call, kept)
        output, done = self._recorded(call, kept)
        self._seen.add(key)
        if deed is not None:
            deeds.remove(deed)
        deeds.append(done)
        return output

    def _recorded(self, call: _Call, kept: Kept) -> tuple[Any, Deed]:
        """Run a call, and return what it returned and what it did."""
        ledger = self._ledger
        references, lists = call.references(), call.lists()
        before = [[_reference(item) for item in each] for each in lists]
        listed, changed, numbers = _storages(lists), kept.watch(), dict(ledger.numbers)
        mark = ledger.mark()
        base_bytes, peak_bytes, flops = ledger.live_bytes, ledger.peak_bytes, ledger.flops
        ledger.peak_bytes = base_bytes
        try:
            output = call.run()
        finally:
            grown_bytes, ledger.peak_bytes = ledger.peak_bytes - base_bytes, max(peak_bytes, ledger.peak_bytes)
        given, change = [reference() for reference in references], changed()
        written = {at: list(each) for at, each in enumerate(lists) if not _holds(each, before[at])}
        result = output, written, change.put
        new, known = _storages(_new(result, given)), _storages(given) | change.left_storages
        kept_bytes = ledger.live_bytes - base_bytes - sum(new[storage] for storage in new.keys() - known.keys())
        is_told = _is_plain(output) and new.keys().isdisjoint(known)
        if written or change.is_one:  # which tells all, if nothing else was kept or let go of
            gone_bytes = sum(listed[storage] for storage in listed.keys() - known.keys() - new.keys())
            is_all = kept_bytes == -gone_bytes - change.gone_bytes
            is_told = is_told and is_all and _are_flat(written) and len(new) == len(_new(result, given))
        deed = Deed(
            output=Outline(result, given) if is_told else None,
            taken=change.taken,
            grown_bytes=grown_bytes,
            kept_bytes=max(0, kept_bytes),
            flops=ledger.flops - flops,
            course=Course.of(
                ledger.lives_since(mark),
                gone=[numbers.get(storage) for storage in change.taken_storages],
                born=[ledger.numbers[storage] for storage in new if storage in ledger.numbers],
            ),
        )
        return output, deed

    def _entered(self, key: Any, deed: Deed, told: Outline, call: _Call, kept: Kept) -> Any:
        """Enter what a call of that kind did, and return what it returned."""
        ledger = self._ledger
        if key not in self._seen:
            self._seen.add(key)
            ledger.live_bytes += deed.kept_bytes
        ledger.raise_peak(deed.grown_bytes - deed.kept_bytes)
        ledger.add_flops(deed.flops)
        self._repeated[key] += 1
        is_played = call.keepers or self._repeated[key] <= _REPEATS
        gone = [ledger.numbers.get(storage) for storage in kept.storages(deed.taken)]
        with ledger.repeating(deed.course, gone) if is_played else contextlib.nullcontext():
            kept.take(deed.taken)
            output, written, put = told.filled([reference() for reference in call.references()], ledger.enter)
        kept.put(put)
        lists = call.lists()
        for at, items in written.items():
            lists[at][:] = items
        return output


class _Call:
    """A call that is about to be made, of something with these `layers`."""

    def __init__(
        self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], layers: Sequence[nn.Module] = ()
    ) -> None:
        self._inner, self._args, self._kwargs, self._layers = inner, args, kwargs, layers
        self.keepers = [value for value in (*args, *kwargs.values()) if is_keeper(value)] if layers else []

    @property
    def is_simple(self) -> bool:
        """Whether arguments are nothing that a block could write anything but numbers to, or tell what it wrote."""
        return all(is_keeper(value) or _is_simple(value) for value in (*self._args, *self._kwargs.values()))

    def signature(self, *, with_strides: bool = False) -> Any:
        """Return what decides how much it does, where that depends on how tensors lie too `with_strides`."""
        given = self._args, self._kwargs
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - a look that is not of the call
            return _signature(given), tuple(tensor.stride() for tensor in _tensors_of(given)) if with_strides else ()

    def references(self) -> list[weakref.ref[torch.Tensor]]:
        """Return its tensors, not held: a list may be how a caller hands a tensor over, to be let go of inside."""
        return [weakref.ref(tensor) for tensor in _tensors_of((self._args, self._kwargs))]

    def lists(self) -> list[list[Any]]:
        """Return the lists among its arguments, which it may write to."""
        return list(_lists((self._args, self._kwargs)))

    def kept(self) -> Kept:
        """Return what keepers among its arguments keep for it."""
        return Kept(self.keepers, self._layers)

    def run(self) -> Any:
        """Make it."""
        return self._inner(*self._args, **self._kwargs)


@contextlib.contextmanager
def _replaced(module: nn.Module, method: str, outer: Any) -> Iterator[None]:
    outer.__signature__ = inspect.signature(getattr(module, method))  # pipelines ask what a model takes
    vars(module)[method] = outer
    try:
        yield
    finally:
        del vars(module)[method]


def _tensors_of(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, note)
    return found


def _storages(value: Any) -> dict[int, int]:
    with torch._C.DisableTorchFunction():  # noqa: SLF001 - a look that is not of the call
        held = [tensor.untyped_storage() for tensor in _tensors_of(value)]
    return {storage._cdata: storage.nbytes() for storage in held}  # noqa: SLF001


def _new(result: Any, given: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the tensors in a result that are none of those that were `given`."""
    objects = {id(tensor) for tensor in given}
    return [tensor for tensor in _tensors_of(result) if id(tensor) not in objects]


def _are_flat(written: Mapping[int, list[Any]]) -> bool:
    """Whether lists hold nothing that somebody else may hold and write to."""
    items = (item for each in written.values() for item in each)
    return all(item is None or isinstance(item, torch.Tensor | int | float | str) for item in items)


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
    if is_keeper(value):
        return type(value), value.way()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value), tuple(_signature(getattr(value, field.name, None)) for field in fields)
    return value if value is None or isinstance(value, bool | int | float | str) else id(value)
