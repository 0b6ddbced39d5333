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

    def begin(self, held_bytes: int) -> tuple[int, int]:
        """Return what `end` wants, if `held_bytes` of what is allocated now are not of others."""
        others = self._statistics.memory_allocated(self._device) - held_bytes
        return max(0, others), self._statistics.max_memory_allocated(self._device)

    def end(self, begun: tuple[int, int]) -> int | None:
        """Return the peak since then in bytes, less what others had; None where there was a higher one before."""
        others, before = begun
        peak = self._statistics.max_memory_allocated(self._device)
        return None if peak <= before else int(peak - others)
