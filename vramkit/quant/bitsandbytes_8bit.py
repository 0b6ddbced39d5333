"""8-bit weights and inputs as in LLM.int8 (arXiv:2208.07339), by the kernels of bitsandbytes.

A layer gives the numbers of ``bitsandbytes.nn.Linear8bitLt(has_fp16_weights=False)`` in evaluation use, without that module,
whose forward rewrites its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import bitsandbytes
import torch
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.quant.config import BitsAndBytes8bitConfig
from vramkit.quant.handler import Handler as BaseHandler
from vramkit.quant.parts import Part, dtype_name, noted_dtype
from vramkit.quant.tensor import QuantizedTensor

__all__ = ["Bits8Tensor", "Handler"]


@torch.library.custom_op("vramkit::int8_linear", mutates_args=())
def _multiply(
    inputs: torch.Tensor, stored: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """Multiply in int8. One operation, because a compiler does not know the number of outliers."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    half = rows.to(torch.float16)  # what the kernels take
    narrow, row_absmax, outliers = bitsandbytes.functional.int8_vectorwise_quant(half, threshold=threshold)
    ops = torch.ops.bitsandbytes
    if threshold > 0:
        out, _ = ops.int8_mixed_scaled_mm.default(rows, narrow, stored, row_absmax, absmax, outliers, bias)
    else:
        out = ops.int8_scaled_mm.default(narrow, stored, row_absmax, absmax, bias=bias, dtype=rows.dtype)
    result: torch.Tensor = out.reshape(*inputs.shape[:-1], stored.shape[0])
    return result


@_multiply.register_fake
def _(inputs: torch.Tensor, stored: torch.Tensor, *_options: Any) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], stored.shape[0])


class Bits8Tensor(QuantizedTensor):
    """int8 weights and the largest magnitude of each row; notes: (outlier threshold,)."""

    inner_names: ClassVar[tuple[str, ...]] = ("stored", "absmax")
    stored: torch.Tensor  # [out, in] int8; both in a stack have its dimension before
    absmax: torch.Tensor  # [out] fp32

    def dequantize(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        wide = self.stored.to(self.dtype) if self.dtype == torch.float32 else self.stored.to(torch.float32)
        return wide.mul_(self.absmax[..., None] / 127).to(self.dtype)

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply in int8."""
        if not inputs.numel():
            return F.linear(inputs, self.dequantize().to(inputs.dtype), bias)
        bias = None if bias is None else bias.to(inputs.dtype)
        out: torch.Tensor = _multiply(inputs, self.stored, self.absmax, bias, self.notes[0])
        return out


def adopted(layer: Any, dtype: torch.dtype) -> Bits8Tensor:
    """Return the weight of a ``bitsandbytes.nn.Linear8bitLt`` as a tensor of ours, around the same bytes.

    It computes as its bias does, or, where it has none, as `dtype`: bitsandbytes does not note it.

    Raises:
        ConfigError: it is not quantized yet, or keeps wide weights.
    """
    absmax = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else layer.state.SCB
    if layer.state.has_fp16_weights or layer.weight.dtype != torch.int8 or absmax is None:
        raise ConfigError(
            "a Linear8bitLt with has_fp16_weights=False is quantized when it is moved to a device first; call "
            ".to(device) on the module (with has_fp16_weights=True it never is: use nn.Linear)"
        )
    parts = {"stored": layer.weight.data.as_subclass(torch.Tensor).detach(), "absmax": absmax.detach()}
    dtype = dtype if layer.bias is None else layer.bias.dtype
    return Bits8Tensor(parts, parts["stored"].shape, dtype, (float(layer.state.threshold),))


class Handler(BaseHandler):
    """Quantizes by ``bitsandbytes.functional.int8_vectorwise_quant``."""

    config: BitsAndBytes8bitConfig

    def quantize(self, weight: torch.Tensor) -> Bits8Tensor:
        """Quantize rows; the kernels take them in fp16."""
        stored, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(
            weight.detach().contiguous().to(torch.float16)
        )
        return self._tensor({"stored": stored, "absmax": absmax}, weight.dtype)

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Only the dtype is not in the parts."""
        assert isinstance(weight, Bits8Tensor)
        return weight.parts(), {"dtype": dtype_name(weight.dtype)}

    def layout(self, shape: tuple[int, ...], notes: Mapping[str, Any]) -> dict[str, Part]:
        """A byte per weight and a number per row."""
        return {"stored": Part(shape, torch.int8), "absmax": Part(shape[:-1], torch.float32)}

    def unpack(self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]) -> Bits8Tensor:
        """Put the tensor together again."""
        return self._tensor(parts, noted_dtype(notes))

    def _tensor(self, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> Bits8Tensor:
        return Bits8Tensor(parts, parts["stored"].shape, dtype, (self.config.threshold,))
