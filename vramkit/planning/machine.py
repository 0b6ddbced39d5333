"""What is known of the device that will compute: how fast weights come to it, and how fast it multiplies."""

from __future__ import annotations

import dataclasses
import time

import torch

from vramkit.memory import GIB, MIB, probe_link_gbps
from vramkit.offload.config import device_count, known_device

__all__ = ["Machine", "device_of"]

# Of a device that is not there to be measured: PCIe 4 with 16 lanes, and what consumer cards of 2022 reach in bf16.
_ASSUMED_LINK_GBPS, _ASSUMED_TFLOPS = 25.0, 60.0
# The CPU tier: files that are read into RAM, and a few cores.
_CPU_LINK_GBPS, _CPU_TFLOPS = 2.0, 0.1
# Beside what tensors take: workspaces of the matrix libraries, and what the caching allocator rounds up.
_ACCELERATOR_MARGIN_BYTES = 64 * MIB
# Of that, what cuBLAS keeps, as torch asks for it: two pieces of 4 MiB and eight of 16 KiB, and more on newer cards.
_WORKSPACE_BYTES, _WORKSPACE_BYTES_SINCE_9 = 8 * MIB + 128 * 1024, 32 * MIB
# What is only faster on the device leaves as much again: the allocator's holes grow with the number of weights that stay.
_ACCELERATOR_SLACK_BYTES = 64 * MIB
# Of activations: what lies unused between those that live, in segments that grow (docs/architecture.md).
_ACCELERATOR_HOLES = 1 / 32
# Of the rate of large square products, what transformers reach: 0.48 to 0.66 on an H100 (docs/architecture.md).
_REACHED = 0.6
_PROBE_SIZE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device of a plan. Rates are GB/s (10^9 bytes) and TFLOP/s (10^12)."""

    device: str
    link_gbps: float
    tflops: float
    is_measured: bool
    card_bytes: int | None = None  # memory of the device, None where none was asked
    margin_bytes: int = 0
    slack_bytes: int = 0
    """Of the budget, left free beside the margin by weights that stay although they could travel."""
    workspace_bytes: int = 0
    """What the matrix library keeps from its first product on; a part of the margin."""
    holes_share: float = 0.0
    """Of activations, what has to be free beside them for holes between them."""
    ranks: int = 1
    """How many devices share links and work, of which the rates are those of all."""

    @classmethod
    def of(cls, device: torch.device | str) -> Machine:
        """Measure `device` (a quarter of a second), or assume figures for the CPU and for a device that is not there."""
        device = torch.device(device)
        if device.type == "cpu":
            return cls(device="cpu", link_gbps=_CPU_LINK_GBPS, tflops=_CPU_TFLOPS, is_measured=False)
        if (device.index or 0) >= device_count(device):
            return cls(
                device=str(device),
                link_gbps=_ASSUMED_LINK_GBPS,
                tflops=_ASSUMED_TFLOPS,
                is_measured=False,
                margin_bytes=_ACCELERATOR_MARGIN_BYTES,
                slack_bytes=_ACCELERATOR_SLACK_BYTES,
                workspace_bytes=_WORKSPACE_BYTES if device.type == "cuda" else 0,
                holes_share=_ACCELERATOR_HOLES,
            )
        return cls(
            device=str(device),
            link_gbps=probe_link_gbps(device),
            tflops=_probe_tflops(device) * _REACHED,
            is_measured=True,
            card_bytes=getattr(torch, device.type).get_device_properties(device).total_memory,
            margin_bytes=_ACCELERATOR_MARGIN_BYTES,
            slack_bytes=_ACCELERATOR_SLACK_BYTES,
            workspace_bytes=_kept_by_cublas(device),
            holes_share=_ACCELERATOR_HOLES,
        )

    def times(self, ranks: int) -> Machine:
        """Return so many of these that share links and work; each has the memory of one."""
        return dataclasses.replace(self, link_gbps=self.link_gbps * ranks, tflops=self.tflops * ranks, ranks=ranks)

    def link_seconds(self, size_bytes: float) -> float:
        """How long `size_bytes` are on their way."""
        return size_bytes / (self.link_gbps * 1e9)

    def compute_seconds(self, flops: float) -> float:
        """How long `flops` take."""
        return flops / (self.tflops * 1e12)

    def describe(self) -> str:
        """Name the figures and where they come from."""
        source = "measured" if self.is_measured else "assumed"
        card = "" if self.card_bytes is None else f", {self.card_bytes / GIB:.3g} GiB"
        return f"{self.device}{card}: link {self.link_gbps:.3g} GB/s, {self.tflops:.3g} TFLOP/s ({source})"


def device_of(given: torch.device | str | None) -> torch.device:
    """Return the device that was given, or the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: what was given is no device.
    """
    if given is not None:
        return known_device(given, "device")
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _kept_by_cublas(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return _WORKSPACE_BYTES_SINCE_9 if torch.cuda.get_device_capability(device) >= (9, 0) else _WORKSPACE_BYTES


def _probe_tflops(device: torch.device) -> float:
    """Multiply square matrices in bf16 for a moment."""
    one = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(one)
    torch.mm(one, one, out=out)
    torch.accelerator.synchronize(device)
    start, repeats = time.perf_counter(), 10
    for _ in range(repeats):
        torch.mm(one, one, out=out)
    torch.accelerator.synchronize(device)
    return 2 * _PROBE_SIZE**3 * repeats / (time.perf_counter() - start) / 1e12
