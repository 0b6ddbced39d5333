"""Bytes that torch's allocator of the CPU gave out, whoever asked: operators for results, and kernels for their own work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def is_planned_well(planned_bytes: float, taken_bytes: float, *, least: float, most: float) -> bool:
    """Tell whether a plan is `least` to `most` times what was taken.

    Plans count kernels as they are on x86 with AVX-512 and products in bf16. Other processors lay tensors out otherwise and
    compute bf16 in fp32: within a factor of three there.
    """
    is_measured = torch.cpu._is_avx512_bf16_supported()  # type: ignore[no-untyped-call]
    least, most = (least, most) if is_measured else (least / 3, most * 3)
    return least * taken_bytes <= planned_bytes <= most * taken_bytes


class AllocatedBytes:
    """Counts what is allocated on the CPU while it is entered; what was there before, and dies, is not counted."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> AllocatedBytes:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        profiler: Any = self._profile.profiler
        events = sorted(_allocations(profiler.kineto_results.experimental_event_tree()), key=lambda each: each[0])
        alive: dict[int, int] = {}
        live_bytes = 0
        for _, address, size_bytes in events:
            if size_bytes > 0:
                alive[address] = size_bytes
            live_bytes += size_bytes if size_bytes > 0 else -alive.pop(address, 0)
            self.peak_bytes = max(self.peak_bytes, live_bytes)


def _allocations(events: Iterable[Any]) -> list[tuple[int, int, int]]:
    """Return when, where and how much: below zero where it was given back."""
    found: list[tuple[int, int, int]] = []
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return found
