"""fp8 with a scale per row: our own storage, widened at use, or multiplied as it is where the device can."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vramkit.casting.narrow import NarrowTensor, narrowed
from vramkit.errors import ConfigError
from vramkit.offload.backend import accelerator_for
from vramkit.quant.config import Fp8Config
from vramkit.quant.handler import Handler as BaseHandler
from vramkit.quant.scaled_linear import MULTIPLE, ScaledLinear, scaled_mm_problem

__all__ = ["Handler"]


class Handler(BaseHandler):
    """Stores weights as `NarrowTensor`; layers that are to multiply in fp8 become `ScaledLinear`."""

    config: Fp8Config

    def __init__(self, config: Fp8Config) -> None:
        super().__init__(config)
        self._multiplies_on: str | None = None

    def check(self, device: torch.device) -> None:
        """Refuse a device that cannot multiply in fp8, if it is asked to.

        Raises:
            ConfigError: says why, and what to use instead.
        """
        if self.config.compute == "scaled_mm" and self._multiplies_on is None:
            self._multiplies_on = _able_device(device)

    def quantize(self, weight: torch.Tensor) -> NarrowTensor:
        """Store a weight with a scale per row; it computes as its own dtype.

        Raises:
            ConfigError: it holds infinities or NaN.
        """
        stored = narrowed(weight, getattr(torch, self.config.dtype), weight.dtype)
        if stored.scale is not None and not stored.scale.isfinite().all():
            raise ConfigError(
                f"a weight of shape {list(weight.shape)} holds infinities or NaN, which fp8 with scales cannot store; name "
                "its layer in skip_modules"
            )
        return stored

    def finished(self, layer: nn.Module) -> nn.Module:
        """Return the layer, or one that multiplies in fp8 where that is asked for and the sizes are multiples of 16."""
        if isinstance(layer, ScaledLinear):  # of an earlier quantization that was taken back
            layer = layer.plain()
        if self.config.compute == "storage" or type(layer) is not nn.Linear:
            return layer
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            return layer
        self.check(layer.weight.device)
        assert self._multiplies_on is not None
        return ScaledLinear.of(layer, self._multiplies_on)

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The fp8 values and their scales, and the dtype they compute as."""
        assert isinstance(weight, NarrowTensor)
        parts = {"stored": weight.stored}
        if weight.scale is not None:
            parts["scale"] = weight.scale
        return parts, {"dtype": str(weight.dtype).removeprefix("torch.")}

    def unpack(self, parts: dict[str, torch.Tensor], notes: dict[str, Any]) -> NarrowTensor:
        """The weight of its parts."""
        return NarrowTensor(parts["stored"], parts.get("scale"), getattr(torch, notes["dtype"]))


def _able_device(rests_on: torch.device) -> str:
    """The type of the device that multiplies: where the weights are, or, for weights in host memory, the accelerator."""
    device = accelerator_for(torch.device("cpu") if rests_on.type == "meta" else rests_on)
    problem = scaled_mm_problem(device)
    if problem is not None:
        raise ConfigError(
            f"compute='scaled_mm' on {str(device)!r}: {problem}; use compute='storage', which stores the same weights and "
            "widens them at use"
        )
    return device.type
