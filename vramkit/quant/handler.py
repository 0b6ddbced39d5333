"""What a backend does with one weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from vramkit.quant.config import QuantConfig

__all__ = ["Handler"]


class Handler(ABC):
    """The work of one backend. Subclasses are named `Handler` and stand in the backend's file."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """Classes of layers whose ``weight`` is quantized."""

    def __init__(self, config: QuantConfig) -> None:
        self.config = config

    def accepts(self, layer: Any) -> bool:
        """Tell whether the backend can quantize the weight of `layer`; others stay as they are."""
        weight: Any = getattr(layer, "weight", None)
        return isinstance(layer, self.layers) and bool(weight.is_floating_point())

    def check(self, device: torch.device) -> None:
        """Refuse, by ConfigError, a device where the backend cannot work; called before anything is changed."""
        del device  # any will do

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a plain floating weight [out, in] as the backend's tensor, on the same device.

        The result is a wrapper subclass (``__tensor_flatten__``) that reports the dtype it computes in, so that the plain
        layer that owns it, offloading and adapters treat it as any weight.
        """

    def dequantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return an ordinary tensor [out, in] of the dtype that `weight` reports."""
        wide: torch.Tensor = weight.dequantize()
        return wide

    def finished(self, layer: nn.Module) -> nn.Module:
        """Return what stands in for a layer whose weight is quantized: the layer itself, where nothing else is needed."""
        return layer

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Take a quantized weight apart for a file: plain tensors by name, and what else is needed, as JSON keeps it."""

    @abstractmethod
    def unpack(self, parts: dict[str, torch.Tensor], notes: dict[str, Any]) -> torch.Tensor:
        """Put together what `pack` took apart; the parts may be views of a file."""
