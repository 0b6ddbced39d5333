"""Weights in the formats of optimum-quanto, computed by its operations.

The values are those of ``optimum.quanto.quantize(model, weights=...)`` and ``freeze``. Its own weight classes repack
themselves for a device whenever they are moved, for example int4 in bfloat16, with other sums; a weight here has one format
everywhere, so that streamed and resident results are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from optimum import quanto

from vramkit.quant.config import QuantoConfig
from vramkit.quant.handler import Handler as BaseHandler
from vramkit.quant.parts import Part, dtype_name, noted_dtype, stacked
from vramkit.quant.tensor import QuantizedTensor

__all__ = ["Handler", "QuantoTensor"]

_QTYPES = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "float8": "qfloat8_e4m3fn"}
_GROUP = (
    128  # weights of a row that share a scale, below 8 bits; fewer where that does not divide a row, down to _LEAST
)
_LEAST_GROUP = 32
_GROUP_STEP = 32


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers of `bits` that bytes are packed from, uint8 [8 / bits * rows, columns].

    quanto's own operator does so, but on the CPU it is compiled when it is first called, for a minute and with a compiler.
    """
    if packed.device.type != "cpu":
        numbers: torch.Tensor = torch.ops.quanto.unpack(packed, bits)
        return numbers
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])


class QuantoTensor(QuantizedTensor):
    """Rows of int8 or fp8 with a scale each, or packed groups of 4 or 2 bits with scale and shift; notes: (bits,).

    All inner tensors of a stack have its dimension before.
    """

    inner_names: ClassVar[tuple[str, ...]] = ("stored", "scale", "shift")
    stored: torch.Tensor  # [out, in] int8 or fp8, or packed uint8
    scale: torch.Tensor  # [out, 1] or [groups, 1], in the compute dtype
    shift: torch.Tensor | None  # [groups, 1]

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype; below 8 bits matrix by matrix."""
        if self.shift is None:  # as the scales are, so that another compute dtype rounds the values and not the scales
            return self.stored.to(self.scale.dtype).mul_(self.scale).to(self.dtype)
        return super().dequantize()

    def widened(self) -> torch.Tensor:
        """Return the values of a packed matrix as an ordinary tensor of the compute dtype."""
        assert self.shift is not None
        values = _unpacked(self.stored, self.notes[0])[: len(self.scale)]  # packing may add rows
        wide: torch.Tensor = (self.scale * values).sub_(self.shift).view(self.shape)
        return wide.to(self.dtype)

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply by quanto's kernels where it has one for the device and the kind, else by the dequantized weight."""
        if self.shift is not None or not inputs.numel():
            out = inputs @ self.dequantize().to(inputs.dtype).t()
        else:
            rows = inputs.reshape(-1, inputs.shape[-1])
            out = torch.ops.quanto.qbytes_mm(rows, self.stored, self.scale.to(self.dtype))
            out = out.reshape(*inputs.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


class Handler(BaseHandler):
    """Quantizes with the optimizers that quanto uses by default."""

    config: QuantoConfig

    def accepts(self, rows: int) -> bool:
        """A single row has no axis that quanto could keep."""
        return rows > 1

    def quantize(self, weight: torch.Tensor) -> QuantoTensor:
        """Quantize rows (8 bits) or groups of a row (fewer)."""
        qtype = quanto.qtypes[_QTYPES[self.config.weights]]
        weight = weight.detach()
        if qtype.bits == 8:
            scale = quanto.AbsmaxOptimizer()(weight, qtype=qtype, axis=0)
            scale.masked_fill_(scale == 0, 1)  # a row of zeros stays one, where quanto would divide zero by zero
            quantized = quanto.quantize_weight(weight, qtype=qtype, axis=0, scale=scale, optimized=False)
            return self._tensor({"stored": quantized._data, "scale": quantized._scale}, weight.shape)  # noqa: SLF001
        group = _group_size(weight.shape[1])
        scale, shift = quanto.MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=group)
        quantized = quanto.quantize_weight(
            weight, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=group, optimized=False
        )
        stored = quantized._data._data  # noqa: SLF001 (the packed bytes have no public name)
        return self._tensor({"stored": stored, "scale": scale, "shift": shift}, weight.shape)

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The shape of packed weights is not in the parts; the dtype is that of the scales."""
        assert isinstance(weight, QuantoTensor)
        return weight.parts(), {"shape": list(weight.shape), "dtype": dtype_name(weight.scale.dtype)}

    def layout(self, shape: tuple[int, ...], notes: Mapping[str, Any]) -> dict[str, Part]:
        """Rows with a scale each, or packed groups of columns with scale and shift: several rows of them in one."""
        *ahead, rows, columns = shape
        qtype, dtype = quanto.qtypes[_QTYPES[self.config.weights]], noted_dtype(notes)
        if qtype.bits == 8:
            return stacked(ahead, {"stored": Part((rows, columns), qtype.dtype), "scale": Part((rows, 1), dtype)})
        size = _group_size(columns) or columns
        groups = rows * columns // size
        numbers = Part((groups, 1), dtype)
        packed = Part((-(-groups * qtype.bits // 8), size), torch.uint8)
        return stacked(ahead, {"stored": packed, "scale": numbers, "shift": numbers})

    def unpack(self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]) -> QuantoTensor:
        """Put the tensor together again."""
        return self._tensor(parts, shape)

    def _tensor(self, parts: dict[str, torch.Tensor], shape: Any) -> QuantoTensor:
        bits = quanto.qtypes[_QTYPES[self.config.weights]].bits
        return QuantoTensor(parts, tuple(shape), parts["scale"].dtype, (bits,))


def _group_size(columns: int) -> int | None:
    """Return quanto's choice: None is a whole row."""
    if columns <= _GROUP:
        return None
    fitting = range(_GROUP, _LEAST_GROUP - 1, -_GROUP_STEP)
    return next((size for size in fitting if columns % size == 0), None)
