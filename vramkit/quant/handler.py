"""What a backend does with one weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vramkit.casting.weights import Role
from vramkit.errors import CheckpointError
from vramkit.quant.config import QuantConfig
from vramkit.quant.parts import Part, check_parts, noted, noted_shape
from vramkit.quant.tensor import QuantizedTensor, TurnedTensor
from vramkit.wrapper import WrapperTensor

__all__ = ["Handler"]


class Handler(ABC):
    """The work of one backend. Subclasses are named `Handler` and stand in the backend's file."""

    roles: ClassVar[frozenset[Role]] = frozenset((Role.MATRIX, Role.TURNED, Role.STACK))
    """What weights may be to their layers to be quantized."""

    def __init__(self, config: QuantConfig) -> None:
        self.config = config

    def accepts(self, rows: int) -> bool:
        """Tell whether the backend can quantize a matrix of so many rows; others stay as they are."""
        del rows  # any will do
        return True

    def check(self, device: torch.device) -> None:
        """Refuse, by ConfigError, a device where the backend cannot work; called before anything is changed."""
        del device  # any will do

    def stored(self, weight: torch.Tensor, role: Role) -> torch.Tensor:
        """Quantize a weight by what it is to its layer: stacks matrix by matrix, transposed ones as they are multiplied."""
        if role is Role.STACK:
            return self.stack([self.quantize(matrix) for matrix in weight])
        if role is Role.TURNED:
            turned = self.quantize(weight.t().contiguous())
            assert isinstance(turned, WrapperTensor)
            return TurnedTensor(turned)
        return self.quantize(weight)

    def stack(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """Put quantized matrices of one shape together."""
        same = [matrix for matrix in matrices if isinstance(matrix, QuantizedTensor)]
        return type(same[0]).stacked(same)

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a plain floating weight [out, in] as the backend's tensor, on the same device.

        The result is a wrapper subclass (``__tensor_flatten__``) that reports the dtype it computes in, so that the plain
        layer that owns it, offloading and adapters treat it as any weight.
        """

    def finished(self, layer: nn.Module) -> nn.Module:
        """Return what stands in for a layer whose weight is quantized: the layer itself, where nothing else is needed."""
        return layer

    def take_apart(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """`pack` a weight of any role."""
        if not isinstance(weight, TurnedTensor):
            return self.pack(weight)
        parts, notes = self.pack(weight.base)
        return parts, {**notes, "turned": True}

    def put_together(
        self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]
    ) -> WrapperTensor:
        """Undo `take_apart` for a weight of `shape`; what a file holds is checked before anything is made of it.

        Raises:
            CheckpointError: parts or notes that are missing or do not fit.
        """
        is_turned = "turned" in notes and noted(notes, "turned", bool)
        shape = shape[::-1] if is_turned else shape
        if len(shape) < 2:
            raise CheckpointError(f"the module's has shape {list(shape)}, and only matrices are quantized")
        if "shape" in notes and noted_shape(notes) != shape:
            raise CheckpointError(f"it has shape {notes['shape']}, the module expects {list(shape)}")
        check_parts(parts, self.layout(shape, notes))
        weight = self.unpack(parts, notes, shape)
        assert isinstance(weight, WrapperTensor)
        return TurnedTensor(weight) if is_turned else weight

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Take a quantized weight apart for a file: plain tensors by name, and what else is needed, as JSON keeps it."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...], notes: Mapping[str, Any]) -> dict[str, Part]:
        """Describe the parts that `pack` makes of a weight of `shape`; CheckpointError where `notes` say too little."""

    @abstractmethod
    def unpack(self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
        """Put together what `pack` took apart, by now known to fit `layout`; the parts may be views of a file."""
