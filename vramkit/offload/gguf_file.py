"""GGUF files read with suspicion: every count, size and offset is checked before a byte of a weight is served.

Format: magic, version, counts, then metadata (key, type, value), then for each tensor its name, dimensions (the one that
lies closest together first), type and offset, then the data, each tensor aligned
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Blocks of a quantized tensor follow one another along a row.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from vramkit.errors import CheckpointError
from vramkit.offload.checkpoint import StoredEntry, TensorEntry
from vramkit.offload.disk import MappedFile
from vramkit.offload.stand_ins import stand_in

__all__ = ["GgufEntry", "read_gguf"]

_PLAIN = {0: ("F32", 4), 1: ("F16", 2), 24: ("I8", 1), 25: ("I16", 2), 26: ("I32", 4), 27: ("I64", 8), 28: ("F64", 8)}
_PLAIN[30] = ("BF16", 2)
_BLOCKS = {  # number in the file -> name, weights and bytes of a block
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
_MAX_HEADER_BYTES = 100_000_000
_SHAPE_KEY = "comfy.gguf.orig_shape."  # of tensors that were flattened: their writer knew four dimensions


@dataclasses.dataclass(frozen=True)
class GgufEntry(StoredEntry):
    """A tensor of a GGUF file that is kept in blocks; `dtype_name` is their format."""

    @property
    def is_floating_point(self) -> bool:
        """It is real numbers to a module."""
        return True

    def tensor(self) -> torch.Tensor:
        """Return the blocks of each row as bytes [rows, bytes of a row], a view of the file."""
        rows = math.prod(self.shape[:-1])
        shape = (rows, self.size_bytes // rows)
        if not self.pieces:
            return self.file.tensor(self.offset, torch.uint8, shape)
        return torch.cat([self.file.tensor(offset, torch.uint8, (size,)) for offset, size in self.pieces]).view(shape)

    def stored(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a matrix as its blocks, and anything else widened."""
        from vramkit.quant.gguf import GgufTensor, widened  # noqa: PLC0415 - most files have none

        if len(self.shape) != 2:
            return widened(self.tensor(), self.dtype_name, dtype).view(self.shape)
        return GgufTensor({"blocks": self.tensor()}, self.shape, dtype, (self.dtype_name,))


def read_gguf(path: Path) -> dict[str, TensorEntry]:
    """List the tensors of a GGUF file by name, their dimensions in torch's order.

    Raises:
        CheckpointError: the file is truncated or damaged, tensors overlap, or their format is not known; names the tensor.
    """
    file = MappedFile(path)
    with path.open("rb") as stream:
        header = _Header(path, stream, file.size_bytes)
        tensors, metadata = header.read()
    entries: dict[str, TensorEntry] = {}
    end = 0
    for name, dims, kind, begin in sorted(tensors, key=lambda tensor: tensor[3]):
        shape = tuple(reversed(dims))
        original = metadata.get(_SHAPE_KEY + name)
        if isinstance(original, tuple) and math.prod(original) == math.prod(shape):
            shape = original
        entry = _entry(TensorEntry(file, name, header.data_start + begin, 0, "", shape), kind, dims)
        if begin < end or begin % header.alignment:
            what = "overlaps the tensor before it" if begin < end else f"is not aligned to {header.alignment} bytes"
            raise CheckpointError(f"{path}: tensor {name!r} {what}; the file is damaged")
        if entry.offset + entry.size_bytes > file.size_bytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} ends at byte {entry.offset + entry.size_bytes} of {file.size_bytes}; the file is "
                "truncated"
            )
        if name in entries:
            raise CheckpointError(f"{path}: tensor {name!r} stands there twice; the file is damaged")
        entries[name] = entry
        end = begin + entry.size_bytes
    return entries


def _entry(tensor: TensorEntry, kind: int, dims: tuple[int, ...]) -> TensorEntry:
    """Say of a tensor what it is, by the number that the file gives to its type."""
    count = math.prod(dims)
    if kind in _PLAIN:
        dtype_name, item_bytes = _PLAIN[kind]
        return dataclasses.replace(tensor, dtype_name=dtype_name, size_bytes=count * item_bytes)
    known = (*_PLAIN.values(), *_BLOCKS.values())
    if kind not in _BLOCKS:
        problem = f"of GGUF type {kind}, which is not known; known are {', '.join(str(each[0]) for each in known)}"
    elif not dims or not count or dims[0] % _BLOCKS[kind][1]:
        problem = (
            f"of {_BLOCKS[kind][0]}, whose blocks of {_BLOCKS[kind][1]} do not fill rows of shape {list(dims[::-1])}"
        )
    else:
        dtype_name, weights, block_bytes = _BLOCKS[kind]
        size_bytes = count // weights * block_bytes
        return GgufEntry(tensor.file, tensor.name, tensor.offset, size_bytes, dtype_name, tensor.shape)
    raise CheckpointError(f"{tensor.file.path}: tensor {tensor.name!r} is {problem}")


class _Header:
    """What stands before the data, read piece by piece."""

    def __init__(self, path: Path, stream: BufferedReader, size_bytes: int) -> None:
        self._path = path
        self._stream = stream
        self._left = min(size_bytes, _MAX_HEADER_BYTES)
        self._at = 0
        self.alignment = 32
        self.data_start = 0

    def read(self) -> tuple[list[tuple[str, tuple[int, ...], int, int]], dict[str, Any]]:
        """Return name, dimensions, type and offset of the tensors, and the metadata."""
        if not self._stream.peek(4).startswith(b"GGUF") and (what := stand_in(self._path)) is not None:
            raise CheckpointError(f"{self._path} {what}")
        if self._bytes(4) != b"GGUF":
            raise self._error("no GGUF header; it is another kind of file, or truncated")
        version, tensor_count, key_count = self._unpack("IQQ")
        if version not in (2, 3):
            raise self._error(f"GGUF of version {version}, expected 2 or 3")
        metadata = {}
        for _ in range(self._count(key_count, 12)):
            key = self._text()
            metadata[key] = self._value(self._unpack("I")[0])
        tensors = [self._tensor() for _ in range(self._count(tensor_count, 24))]
        self.alignment = metadata.get("general.alignment", 32)
        if not isinstance(self.alignment, int) or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise self._error(f"general.alignment is {self.alignment!r}, expected a power of two")
        self.data_start = -(-self._at // self.alignment) * self.alignment
        return tensors, metadata

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dimensions,) = self._unpack("I")
        if not 0 <= dimensions <= _MOST_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {dimensions} dimensions, expected {_MOST_DIMENSIONS} at most")
        dims = self._unpack("Q" * dimensions)
        kind, offset = self._unpack("IQ")
        if math.prod(dims) >= 2**63:
            raise self._error(f"tensor {name!r} has shape {list(reversed(dims))}, which no file could hold")
        return name, dims, kind, offset

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._error(f"metadata of type {kind}, which is not known; it is damaged")
        inner, count = self._unpack("IQ")
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            raw = self._bytes(self._count(count, size) * size)
            # Longer ones are of tokenizers, and not needed.
            return struct.unpack(f"<{count}{_SCALARS[inner]}", raw) if count <= _MOST_DIMENSIONS else None
        if inner != _STRING:  # arrays of arrays are allowed, and nobody writes them
            raise self._error(f"metadata is an array of type {inner}, which is not known; it is damaged")
        for _ in range(self._count(count, 8)):
            self._text()
        return None

    def _text(self) -> str:
        raw = self._bytes(self._count(self._unpack("Q")[0], 1))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"a name is not UTF-8 ({error}); it is damaged") from error

    def _count(self, count: int, least_bytes: int) -> int:
        """Return `count` if so many things, of at least so many bytes each, may still come."""
        if count * least_bytes > self._left:
            raise self._error(f"its header speaks of {count} things at byte {self._at}; it is truncated or damaged")
        return count

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))

    def _bytes(self, count: int) -> bytes:
        raw = self._stream.read(count)
        if len(raw) < count:
            raise self._error(f"its header ends at byte {self._at + len(raw)}; it is truncated")
        self._at += count
        self._left -= count
        return raw

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem}")
