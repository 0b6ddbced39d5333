"""What a call really took on its device."""

from __future__ import annotations

from vramkit.device_memory import DeviceMemory

__all__ = ["PeakMeter"]


class PeakMeter:
    """The most that tensors took while something ran, read from statistics that are others' as well, and so never reset."""

    def __init__(self, memory: DeviceMemory) -> None:
        """Take the memory of an accelerator; torch keeps no such statistics of the CPU."""
        self._memory = memory

    def begin(self, held_bytes: int) -> tuple[int, int, int]:
        """Return what `end` wants, if `held_bytes` of what is allocated now are not of others."""
        others = max(0, self._memory.allocated_bytes - held_bytes)
        return others, self._memory.peak_bytes, self._memory.failures

    def end(self, begun: tuple[int, int, int]) -> tuple[int | None, bool]:
        """Return the peak since then, less what others had, and whether memory ran out meanwhile and somebody did without.

        The peak is in bytes; None where there was a higher one before.
        """
        others, before, failures = begun
        peak = self._memory.peak_bytes
        return (None if peak <= before else peak - others), self._memory.failures > failures
