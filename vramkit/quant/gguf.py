"""Weights in the block formats of GGUF: as a file has them, and widened where they are used.

A block holds 32 or 256 neighbours of a row: small whole numbers, and scales (and, in some formats, least values) for
groups of them. All numbers are made in float32, as ``gguf.quants.dequantize`` makes them, and rounded once to the compute
dtype.
Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from vramkit.errors import CheckpointError, ConfigError
from vramkit.quant.config import GgufConfig
from vramkit.quant.handler import Handler as BaseHandler
from vramkit.quant.parts import Part, dtype_name, noted, noted_dtype
from vramkit.quant.tensor import QuantizedTensor

__all__ = ["GgufTensor", "Handler", "widened"]

_AT_ONCE = 2**23  # weights that are widened in one go: they take some times as many bytes as in the end


class GgufTensor(QuantizedTensor):
    """A matrix [out, in] as rows of blocks; notes: (format,)."""

    inner_names: ClassVar[tuple[str, ...]] = ("blocks",)
    blocks: torch.Tensor  # [out, bytes of a row] uint8

    def widened(self) -> torch.Tensor:
        """Return the values as an ordinary tensor of the compute dtype."""
        return widened(self.blocks, self.notes[0], self.dtype)


class Handler(BaseHandler):
    """Keeps what files hold; nothing is quantized into these formats here."""

    config: GgufConfig

    def check(self, device: torch.device) -> None:
        """Refuse to quantize.

        Raises:
            ConfigError: always; says what to do instead.
        """
        raise ConfigError(
            "weights are not quantized into GGUF formats here, only read: load a .gguf file by from_single_file, or use "
            "another config of vramkit.quant"
        )

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Never called: `check` refuses before."""
        raise NotImplementedError

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The blocks; their format and the dtype they compute as are notes."""
        assert isinstance(weight, GgufTensor)
        notes = {"format": weight.notes[0], "shape": list(weight.shape)}
        return weight.parts(), {**notes, "dtype": dtype_name(weight.dtype)}

    def layout(self, shape: tuple[int, ...], notes: Mapping[str, Any]) -> dict[str, Part]:
        """Rows of whole blocks."""
        form = noted(notes, "format", str)
        if form not in FORMATS or shape[-1] % FORMATS[form].weights:
            raise CheckpointError(f"its notes say format={form!r}, which no weight of {list(shape)} has")
        row_bytes = shape[-1] // FORMATS[form].weights * FORMATS[form].size_bytes
        return {"blocks": Part((*shape[:-1], row_bytes), torch.uint8)}

    def unpack(self, parts: dict[str, torch.Tensor], notes: Mapping[str, Any], shape: tuple[int, ...]) -> GgufTensor:
        """Put the tensor together again."""
        return GgufTensor(parts, shape, noted_dtype(notes), (notes["format"],))


def widened(blocks: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of blocks [rows, bytes of a row] uint8 of a format, as [rows, values] of `dtype`."""
    size_bytes, per_block, values = FORMATS[form]
    whole = blocks.reshape(-1, size_bytes)
    if torch.compiler.is_compiling():  # which orders the work itself
        return values(whole).to(dtype).view(len(blocks), -1)
    wide = torch.empty(len(whole), per_block, dtype=dtype, device=blocks.device)
    step = max(1, _AT_ONCE // per_block)
    for start in range(0, len(whole), step):
        wide[start : start + step] = values(whole[start : start + step])
    return wide.view(len(blocks), -1)


# n blocks [n, bytes] -> values [n, 32 or 256]. B bytes, G groups of a block.


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number at a byte of each block: [n, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _bits(packed: torch.Tensor, width: int, *, run: int) -> torch.Tensor:
    """Take bytes apart into numbers of `width` bits: of each run of bytes first all lowest bits, then all next ones.

    [n, B] -> [n, B / run, 8 / width, run] uint8.
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    return torch.bitwise_and(packed.reshape(len(packed), -1, 1, run) >> shifts, 2**width - 1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[n, 16] -> [n, 32]: the lower halves of all bytes, then the upper."""
    return _bits(packed, 4, run=16).reshape(len(packed), 32)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """[n, 4] -> [n, 32]: bit after bit."""
    return _bits(packed, 1, run=1).reshape(len(packed), 32)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]) << 4).float() - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]) << 4).float() + _half(b, 2)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales = b[:, :16]
    step = (_half(b, 80) * (scales & 15).float()).unsqueeze(-1)  # [n, 16, 1]
    least = (_half(b, 82) * (scales >> 4).float()).unsqueeze(-1)
    numbers = _bits(b[:, 16:80], 2, run=32).reshape(len(b), 16, 16)
    return (step * numbers.float() - least).view(len(b), 256)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    low = _bits(b[:, 96:104], 4, run=8).reshape(len(b), 16)
    high = _bits(b[:, 104:108], 2, run=4).reshape(len(b), 16)
    step = (_half(b, 108) * ((low | high << 4).float() - 32)).unsqueeze(-1)  # [n, 16, 1]
    numbers = _bits(b[:, 32:96], 2, run=32).reshape(len(b), 16, 16).float()
    third = _bits(b[:, :32], 1, run=32).reshape(len(b), 16, 16).float()  # 0 takes four off
    return (step * (numbers - 4 * (1 - third))).view(len(b), 256)


def _steps_and_leasts(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and least values of 8 groups [n, 8, 1], of 6 bits each in 12 bytes (Q4_K, Q5_K)."""
    first, second, upper = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, (upper & 15) | ((first >> 2) & 48)], dim=1)
    leasts = torch.cat([second & 63, (upper >> 4) | ((second >> 2) & 48)], dim=1)
    return (_half(b, 0) * scales.float()).unsqueeze(-1), (_half(b, 2) * leasts.float()).unsqueeze(-1)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    step, least = _steps_and_leasts(b)
    numbers = _bits(b[:, 16:], 4, run=32).reshape(len(b), 8, 32)
    return (step * numbers.float() - least).view(len(b), 256)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    step, least = _steps_and_leasts(b)
    numbers = _bits(b[:, 48:], 4, run=32).reshape(len(b), 8, 32)
    fifth = _bits(b[:, 16:48], 1, run=32).reshape(len(b), 8, 32)
    return (step * (numbers | fifth << 4).float() - least).view(len(b), 256)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    step = (_half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()).unsqueeze(-1)  # [n, 16, 1]
    low = _bits(b[:, :128], 4, run=64).reshape(len(b), 16, 16)
    high = _bits(b[:, 128:192], 2, run=32).reshape(len(b), 16, 16)
    return (step * ((low | high << 4).float() - 32)).view(len(b), 256)


def _uneven(numbers: torch.Tensor) -> torch.Tensor:
    """What 4 bits stand for where steps are not even."""
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return torch.tensor(values, dtype=torch.float32, device=numbers.device)[numbers.int()]


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * _uneven(_nibbles(b[:, 2:]))


def _iq4_xs(b: torch.Tensor) -> torch.Tensor:
    high = _bits(b[:, 2:4], 2, run=1).reshape(len(b), 8)
    low = _bits(b[:, 4:8], 4, run=1).reshape(len(b), 8)
    step = (_half(b, 0) * ((low | high << 4).float() - 32)).unsqueeze(-1)  # [n, 8, 1]
    numbers = _bits(b[:, 8:], 4, run=16).reshape(len(b), 8, 32)
    return (step * _uneven(numbers)).view(len(b), 256)


class Format(NamedTuple):
    """A kind of block."""

    size_bytes: int
    weights: int
    values: Callable[[torch.Tensor], torch.Tensor]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "Q4_0": Format(18, 32, _q4_0),
        "Q4_1": Format(20, 32, _q4_1),
        "Q5_0": Format(22, 32, _q5_0),
        "Q5_1": Format(24, 32, _q5_1),
        "Q8_0": Format(34, 32, _q8_0),
        "Q2_K": Format(84, 256, _q2_k),
        "Q3_K": Format(110, 256, _q3_k),
        "Q4_K": Format(144, 256, _q4_k),
        "Q5_K": Format(176, 256, _q5_k),
        "Q6_K": Format(210, 256, _q6_k),
        "IQ4_NL": Format(18, 32, _iq4_nl),
        "IQ4_XS": Format(136, 256, _iq4_xs),
    }
)
"""Formats by their names in files."""
