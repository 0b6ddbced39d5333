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
        taken = self._memory.look()
        return max(0, taken.allocated_bytes - held_bytes), taken.peak_bytes, taken.failures

    def end(self, begun: tuple[int, int, int]) -> tuple[int | None, bool]:
        """Return the peak since then, less what others had, and whether memory ran out meanwhile and somebody did without.

        The peak is in bytes; None where there was a higher one before.
        """
        (others, before, failures), taken = begun, self._memory.look()
        return (None if taken.peak_bytes <= before else taken.peak_bytes - others), taken.failures > failures
