"""fp8 with a scale per row: our own storage, widened at use, or multiplied as it is where the device can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vramkit.casting.narrow import STORAGE_DTYPES, NarrowTensor, narrowed
from vramkit.casting.weights import Role, shared_dims
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload.backend import accelerator_for
from vramkit.quant.config import Fp8Config
from vramkit.quant.handler import Handler as BaseHandler
from vramkit.quant.parts import Part, dtype_name, noted, noted_dtype, noted_shape
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
        return self._narrowed(weight, None)

    def stored(self, weight: torch.Tensor, role: Role) -> torch.Tensor:
        """Store a weight of any role; see `quantize`."""
        return self._narrowed(weight, shared_dims(role, weight.ndim))

    def _narrowed(self, weight: torch.Tensor, over: Sequence[int] | None) -> NarrowTensor:
        stored = narrowed(weight, getattr(torch, self.config.dtype), weight.dtype, over=over)
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
        notes: dict[str, Any] = {"dtype": dtype_name(weight.dtype), "stored": dtype_name(weight.stored.dtype)}
        notes["is_given"] = weight.is_given
        notes["scale"] = None if weight.scale is None else list(weight.scale.shape)
        return weight.parts(), notes

    def layout(self, shape: tuple[int, ...], notes: Mapping[str, Any]) -> dict[str, Part]:
        """A byte per weight; what scales there are, the notes say, for files of others have them in several ways."""
        parts = {"stored": Part(shape, noted_dtype(notes, "stored", STORAGE_DTYPES))}
        if "scale" in notes and notes["scale"] is None:
            return parts
        scale = noted_shape(notes, "scale")
        if len(scale) != len(shape) or any(size not in (1, whole) for size, whole in zip(scale, shape, strict=True)):
            raise CheckpointError(f"its notes say scale={list(scale)}, which no weight of {list(shape)} has")
        return {**parts, "scale": Part(scale, torch.float32)}

    def unpack(self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]) -> NarrowTensor:
        """The weight of its parts."""
        is_given = noted(notes, "is_given", bool)
        return NarrowTensor(parts["stored"], parts.get("scale"), noted_dtype(notes), is_given=is_given)


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
