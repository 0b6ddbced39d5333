"""What a call really took on its device."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["PeakMeter"]


class PeakMeter:
    """The most that tensors took while something ran, read from statistics that are others' as well, and so never reset."""

    def __init__(self, device: torch.device) -> None:
        """Take an accelerator; torch keeps no such statistics of the CPU."""
        self._device = device
        self._statistics: Any = getattr(torch, device.type)

    def begin(self, held_bytes: int) -> tuple[int, int, int]:
        """Return what `end` wants, if `held_bytes` of what is allocated now are not of others."""
        now, peak, failures = self._read()
        return max(0, now - held_bytes), peak, failures

    def end(self, begun: tuple[int, int, int]) -> tuple[int | None, bool]:
        """Return the peak since then, less what others had, and whether memory ran out meanwhile and somebody did without.

        The peak is in bytes; None where there was a higher one before.
        """
        others, before, failures_before = begun
        _, peak, failures = self._read()
        return (None if peak <= before else peak - others), failures > failures_before

    def _read(self) -> tuple[int, int, int]:
        """Return the bytes of tensors now, the most there ever were, and how often an allocation failed."""
        found = self._statistics.memory_stats_as_nested_dict(self._device)
        of_tensors = found.get("allocated_bytes", {}).get("all", {})  # nothing where nothing was allocated yet
        return of_tensors.get("current", 0), of_tensors.get("peak", 0), found.get("num_ooms", 0)
