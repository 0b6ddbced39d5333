"""Allocations that are made anew: large requests, too, are served from freed memory of a heap, if one has so much."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch


class _Counts(ctypes.Structure):
    # What glibc's mallinfo() returns; the fourth counts the allocations that have a mapping of their own.
    _fields_ = tuple((name, ctypes.c_int) for name in ("_1", "_2", "_3", "mapped", "_5", "_6", "_7", "_8", "_9", "_10"))


def fresh(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the first of the tensors made by `make` that glibc gave a mapping of its own.

    The others, which lie in the heap of this or of another thread, use it up until then.
    """
    count = ctypes.CDLL(None).mallinfo
    count.restype = _Counts
    in_heaps: list[torch.Tensor] = []
    while len(in_heaps) < 1000:
        before = count().mapped
        tensor = make()
        if count().mapped > before:
            return tensor
        in_heaps.append(tensor)
    raise AssertionError("a thousand large allocations were all served from heaps")
