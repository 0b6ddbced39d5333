"""What a case is given in its process: the device, the scale, a folder for checkpoints, how often to repeat."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.measure import Measurement, measure
from vramkit.memory import probe_link_gbps

__all__ = ["Bench"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One per process. `scale` is ``"full"`` or ``"smoke"``: tiny shapes, one repeat, the CPU."""

    folder: Path
    scale: str = "full"
    repeats: int = 3
    warm_up_s: float = 1.5
    device_name: str = ""
    """Other than the scale says: ``"cpu"`` for published shapes without a GPU."""

    @property
    def is_smoke(self) -> bool:
        """Whether shapes are tiny."""
        return self.scale == "smoke"

    @functools.cached_property
    def device(self) -> torch.device:
        """Where models compute."""
        return torch.device(self.device_name or ("cpu" if self.is_smoke else "cuda:0"))

    @functools.cached_property
    def link_gbps(self) -> float | None:
        """The measured rate from page-locked memory to the device; None on the CPU, which has no link."""
        return probe_link_gbps(self.device) if self.device.type == "cuda" else None

    def measure(self, call: Callable[[], T], *, repeats: int | None = None) -> tuple[Measurement, T]:
        """Time a call; see `benchmarks.measure`."""
        if self.is_smoke:
            return measure(call, self.device, repeats=1, warm_up_s=0.0)
        return measure(call, self.device, repeats=repeats or self.repeats, warm_up_s=self.warm_up_s)

    def to_json(self) -> dict[str, Any]:
        """Return what another process needs to have the same."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Bench:
        """Read what `to_json` returned."""
        return cls(**found | {"folder": Path(found["folder"])})
