"""4-bit weights in the format of bitsandbytes, computed by its kernels.

A layer gives the numbers of ``bitsandbytes.nn.Linear4bit`` without that module: its weight is a tensor that names its
parts, so that it can be streamed, compiled and saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import bitsandbytes
import torch
from torch.nn import functional as F

from vramkit.errors import ConfigError
from vramkit.quant.config import BitsAndBytes4bitConfig
from vramkit.quant.handler import Handler as BaseHandler
from vramkit.quant.parts import Part, dtype_name, noted_dtype, stacked
from vramkit.quant.tensor import QuantizedTensor

__all__ = ["Bits4Tensor", "Handler"]

_NESTED_BLOCK = 256  # scales that share a scale of their own; the kernels know no other number


class Bits4Tensor(QuantizedTensor):
    """Two weights per byte and a scale per block; notes: (type, weights per block, compute dtype or None for `dtype`)."""

    inner_names: ClassVar[tuple[str, ...]] = ("packed", "absmax", "code", "offset", "scales")
    packed: torch.Tensor  # [numel / 2, 1] uint8; all in a stack have its dimension before
    absmax: torch.Tensor  # [blocks] fp32; of the blocks of `scales` where these are quantized too
    code: torch.Tensor | None  # [256] fp32: what the bytes of `scales` mean
    offset: torch.Tensor | None  # [] fp32
    scales: torch.Tensor | None  # [blocks] uint8

    def block_scales(self) -> torch.Tensor:
        """Return a scale for each block of the weights of a matrix, [blocks] fp32."""
        if self.scales is None:
            return self.absmax
        assert self.code is not None
        assert self.offset is not None
        scales: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.scales, self.absmax, self.code, _NESTED_BLOCK, torch.float32
        )
        return scales + self.offset

    def widened(self) -> torch.Tensor:
        """Return the values of a matrix as an ordinary tensor of the compute dtype."""
        return self._widened_to(self.dtype)

    def _widened_to(self, dtype: torch.dtype) -> torch.Tensor:
        kind, block, _ = self.notes
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return self._widened_to(torch.float32).to(dtype)
        # Blocks run on from row to row; where they do not divide a row, the kernel for CPUs takes scales of other blocks.
        shape = list(self.shape) if self.shape[-1] % block == 0 else [self.numel()]
        wide: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.packed, self.block_scales(), block, kind, shape, dtype
        )
        return wide.view(self.shape)

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply in the compute dtype; few rows without ever widening the weight, many by widening it once."""
        kind, block, compute = self.notes
        given, compute = inputs.dtype, compute or inputs.dtype
        inputs, bias = inputs.to(compute), None if bias is None else bias.to(compute)
        if not inputs.numel() or not hasattr(torch.ops.bitsandbytes, "gemm_4bit") or inputs.shape[-1] % block:
            return F.linear(inputs, self._widened_to(compute), bias).to(given)
        nested = {"absmax_8bit": self.scales, "absmax_code": self.code, "absmax_offset": self.offset}
        out: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            inputs, self.packed, list(self.shape), self.absmax, block, kind, bias=bias, **nested
        )
        return out.to(given)


def adopted(layer: Any, dtype: torch.dtype) -> Bits4Tensor:
    """Return the weight of a ``bitsandbytes.nn.Linear4bit`` as a tensor of ours, around the same bytes.

    Raises:
        ConfigError: it is not quantized yet.
    """
    del dtype  # bitsandbytes notes it
    if not getattr(layer.weight, "bnb_quantized", False):
        raise ConfigError(
            "a Linear4bit is quantized when it is moved to a device first; call .to(device) on the module"
        )
    layer.state_dict()  # puts weights that a forward on the CPU has repacked back into the common format
    weight = layer.weight
    state = weight.quant_state
    parts = {"packed": weight.data.view(torch.uint8).as_subclass(torch.Tensor), "absmax": state.absmax}
    if state.nested:
        parts |= {"absmax": state.state2.absmax, "code": state.state2.code, "offset": state.offset}
        parts["scales"] = state.absmax
    parts = {name: part.detach() for name, part in parts.items()}
    return Bits4Tensor(parts, tuple(state.shape), state.dtype, (state.quant_type, state.blocksize, layer.compute_dtype))


class Handler(BaseHandler):
    """Quantizes by ``bitsandbytes.functional.quantize_4bit``."""

    config: BitsAndBytes4bitConfig

    def quantize(self, weight: torch.Tensor) -> Bits4Tensor:
        """Quantize blocks of consecutive weights of one row after the other."""
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.detach().contiguous(),
            blocksize=self.config.block_size,
            compress_statistics=self.config.double_quant,
            quant_type=self.config.quant_type,
        )
        parts = {"packed": packed, "absmax": state.absmax}
        if state.nested:
            parts |= {"absmax": state.state2.absmax, "code": state.state2.code, "offset": state.offset}
            parts["scales"] = state.absmax
        return self._tensor(parts, tuple(weight.shape), weight.dtype)

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Shape and dtype are not in the parts, so they go into the notes."""
        assert isinstance(weight, Bits4Tensor)
        return weight.parts(), {"shape": list(weight.shape), "dtype": dtype_name(weight.dtype)}

    def layout(self, shape: tuple[int, ...], notes: Mapping[str, Any]) -> dict[str, Part]:
        """Two weights per byte; a scale per block, and where these are bytes too, what they mean."""
        *ahead, rows, columns = shape
        blocks = -(-rows * columns // self.config.block_size)
        parts = {"packed": Part((-(-rows * columns // 2), 1), torch.uint8), "absmax": Part((blocks,), torch.float32)}
        if self.config.double_quant:
            parts |= {
                "absmax": Part((-(-blocks // _NESTED_BLOCK),), torch.float32),
                "code": Part((256,), torch.float32),
                "offset": Part((), torch.float32),
                "scales": Part((blocks,), torch.uint8),
            }
        return stacked(ahead, parts)

    def unpack(self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]) -> Bits4Tensor:
        """Put the tensor together again."""
        return self._tensor(parts, shape, noted_dtype(notes))

    def _tensor(self, parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Bits4Tensor:
        notes = (self.config.quant_type, self.config.block_size, self.config.torch_compute_dtype)
        return Bits4Tensor(parts, shape, dtype, notes)
