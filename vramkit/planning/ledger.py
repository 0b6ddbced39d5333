"""Keeps book of the bytes that would be alive, and of the work, while tensors without memory are computed with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vramkit.planning.answers import Answers, Results, noted, tensors_of
from vramkit.planning.convolutions import workspace_bytes
from vramkit.planning.cpu_convolutions import workspace_bytes_on_cpu
from vramkit.planning.holes import Course, Lives, is_small
from vramkit.planning.operators import Operator, operator_of
from vramkit.wrapper import widened_in_this_loop

__all__ = ["Ledger", "Segment"]

# Convolutions of video autoencoders run at a quarter of the rate of a transformer's products (docs/architecture.md).
_OF_CONVOLUTIONS = 4
_GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default  # noqa: SLF001


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

        Convolutions have other workspaces on accelerators than on the CPU.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_accelerator = on_accelerator
        self._workspace_bytes = workspace_bytes if on_accelerator else workspace_bytes_on_cpu
        self.live_bytes = self.peak_bytes = self.flops = 0
        self.segments = [Segment("", 0)]
        self._owners = owners
        self._seen: set[int] = set()
        self._in_host_memory: set[int] = set()
        self._counted_flops: dict[Any, int] = {}
        self._tickets = itertools.count()
        self._living: dict[int, int] = {}  # bytes of large tensors by number
        self.numbers: dict[int, int] = {}  # of large tensors, by storage
        self._awaited: deque[int] = deque()  # numbers of those that are made next
        self._answers = Answers(results)
        self.used_in_loops: dict[str, int] = {}
        """Bytes of the weights that a loop over chunks uses, the most of each component."""
        self._loop: tuple[object, dict[int, int]] = None, {}  # the one that runs, and its weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator on what its arguments are, and enter what it made."""
        kwargs = kwargs or {}
        args = self._answers.arguments(func, args)
        operator, given = operator_of(func), tensors_of((args, *kwargs.values()))
        self._attribute(given)
        result = self._answers.result_of(func, operator, args, kwargs, given)
        self._count_flops(func, operator, args, kwargs, result)
        note = self.ignore if self._is_on_host(given) else self.enter
        for tensor in tensors_of((result,)):
            note(tensor)
        if operator.is_convolution:
            size_bytes = self._workspace_bytes(result, *args)
            self.raise_peak(size_bytes)
            self._dies(self._is_made(size_bytes))
        return result

    def enter(self, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor` from now until it dies, if it is new."""
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()  # noqa: SLF001 (its identity, as torch's own trackers take it)
        if key in self._owners or key in self._seen:
            return

        def forget() -> None:
            self._seen.discard(key)
            self.numbers.pop(key, None)
            self.live_bytes -= size_bytes
            self._dies(number)

        self._seen.add(key)
        self.raise_peak(size_bytes)
        self.live_bytes += size_bytes
        number = self._is_made(size_bytes)
        if number is not None:
            self.numbers[key] = number
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
        """Return a point in the book, for `lives_since`."""
        return len(self.segments), len(self.segments[-1].lives)

    def lives_since(self, mark: tuple[int, int]) -> Lives:
        """Return what large tensors were made and died since, where no other component computed meanwhile."""
        segments, lives = mark
        return self.segments[-1].lives[lives:] if segments == len(self.segments) else []

    @contextlib.contextmanager
    def repeating(self, course: Course, gone: Iterable[int | None]) -> Iterator[None]:
        """Enter what came and went in a call, while the caller lets go of what that took and makes what it made to stay.

        `gone` are the numbers of what is let go of, in the order of that call.
        """
        numbers = {number: next(self._tickets) for number in dict(course.lives)}
        for then, now in zip(course.gone, gone, strict=False):
            if then in numbers and now is not None:
                numbers[then] = now
                del self._living[now]
        self.segments[-1].lives += [(numbers[number], size_bytes) for number, size_bytes in course.lives]
        self._awaited.extend(numbers[number] for number in course.born)
        try:
            yield
        finally:
            self._awaited.clear()

    def _is_made(self, size_bytes: int) -> int | None:
        if not self._on_accelerator or is_small(size_bytes):
            return None
        if self._awaited:  # stands in the lives already
            number = self._awaited.popleft()
        else:
            number = next(self._tickets)
            self.segments[-1].lives.append((number, size_bytes))
        self._living[number] = size_bytes
        return number

    def _dies(self, number: int | None) -> None:
        if number is not None and number in self._living:
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
                self._note_loop(owner, given)
                return

    def _note_loop(self, owner: str, given: list[torch.Tensor]) -> None:
        loop = widened_in_this_loop()
        if loop is None:
            return
        if self._loop[0] is not loop:
            self._loop = loop, {}
        storages = (tensor.untyped_storage() for tensor in given)
        weights = self._loop[1]
        weights |= {each._cdata: each.nbytes() for each in storages if each._cdata in self._owners}  # noqa: SLF001
        self.used_in_loops[owner] = max(self.used_in_loops.get(owner, 0), sum(weights.values()))

    def _count_flops(self, func: Any, operator: Operator, args: Any, kwargs: Any, result: Any) -> None:
        if func is _GROUPED_PRODUCT:  # each row by one matrix
            self.add_flops(2 * args[0].numel() * args[1].shape[-1])
        if operator.count_flops is not None:
            key = func, noted(args), noted(tuple(kwargs.items()))
            if key not in self._counted_flops:
                times = _OF_CONVOLUTIONS if operator.is_convolution else 1
                self._counted_flops[key] = times * int(operator.count_flops(*args, **kwargs, out_val=result))
            self.add_flops(self._counted_flops[key])
