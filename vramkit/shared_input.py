"""One input of several products that follow each other: what they multiply is made of it once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

__all__ = ["made_once", "shared_input"]

_Made = TypeVar("_Made")


@dataclasses.dataclass(slots=True, eq=False)
class _Shared:
    tensor: torch.Tensor
    uses: int  # that are still to come
    made_for: object = None  # for whom something was made of it, and of which version of it
    made: Any = None


class _Innermost(threading.local):
    shared: _Shared | None = None


_innermost = _Innermost()


def shared_input(tensor: torch.Tensor, uses: int) -> AbstractContextManager[None]:
    """Within, what `made_once` is asked for is made of `tensor` once for so many `uses` by this thread, then let go of.

    So products that follow each other take no more memory than one by one, and neither does what is done with the result of
    the last. Compilers find out by themselves what is made twice.
    """
    return nullcontext() if torch.compiler.is_compiling() else _sharing(_Shared(tensor, uses))


def made_once(tensor: torch.Tensor, key: object, make: Callable[[], _Made]) -> _Made:
    """Return ``make()``, or what it returned before for the same `key`, within `shared_input` of this very tensor.

    Tensors that count no writes (inference mode) are never shared, and what was written to since is made again.
    """
    if torch.compiler.is_compiling():
        return make()
    shared = _innermost.shared
    if shared is None or shared.tensor is not tensor or not shared.uses or tensor.is_inference():
        return make()
    made_for = key, tensor._version  # noqa: SLF001 (torch has no public reader)
    made = shared.made if shared.made_for == made_for else None
    shared.made_for = shared.made = None  # goes before another is made
    if made is None:
        made = make()
    shared.uses -= 1
    if shared.uses:
        shared.made_for, shared.made = made_for, made
    return made


@contextmanager
def _sharing(shared: _Shared) -> Iterator[None]:
    before, _innermost.shared = _innermost.shared, shared
    try:
        yield
    finally:
        _innermost.shared = before
