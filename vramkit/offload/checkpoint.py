"""Safetensors checkpoints read with suspicion: every size, offset and name is checked before a byte is served.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data without
holes (https://huggingface.co/docs/safetensors). A sharded checkpoint is an index ``{"weight_map": {name: shard file}}``.
Pickled checkpoints are refused: reading one runs whatever code it carries.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vramkit import tensors
from vramkit.errors import CheckpointError
from vramkit.offload.disk import MappedFile, atomic_write

__all__ = ["TensorEntry", "read_checkpoint", "write_checkpoint"]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: where it lies and what it is. `offset` counts from the start of the file."""

    file: MappedFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """Return the tensor as a view of the mapped file."""
        return self.file.tensor(self.offset, self.dtype, self.shape)


def read_checkpoint(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, TensorEntry]:
    """List the tensors of one safetensors file, of several, or of a sharded checkpoint's index.

    Raises:
        CheckpointError: a file is missing, pickled, truncated, damaged or points outside its folder; names file and tensor.
    """
    paths = [Path(files)] if isinstance(files, str | os.PathLike) else [Path(file) for file in files]
    if not paths:
        raise CheckpointError("no checkpoint file was given; expected a .safetensors file or a .safetensors.index.json")
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        found = _read_index(path) if path.name.endswith(".index.json") else _read_file(path)
        for name in found.keys() & entries.keys():
            raise CheckpointError(
                f"{path}: tensor {name!r} is also in {entries[name].file.path}; give each tensor once"
            )
        entries |= found
    return entries


def write_checkpoint(path: str | os.PathLike[str], leaves: Mapping[str, torch.Tensor]) -> None:
    """Write dense host tensors as one safetensors file, whole or not at all.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    header, end = {}, 0
    for name, leaf in leaves.items():
        size_bytes = leaf.nbytes
        header[name] = {"dtype": _NAMES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for leaf in leaves.values():
            file.write(tensors.byte_view(leaf).numpy().data)


def _read_index(path: Path) -> dict[str, TensorEntry]:
    index = _parse_json(_existing(path).read_bytes(), path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{path}: expected {{"weight_map": {{tensor: shard file}}}}; download the index again')
    shards = {shard: _read_file(_shard_path(path, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{path}: tensor {name!r} is listed in shard {shard}, which does not hold it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _shard_path(index: Path, shard: str) -> Path:
    if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
        raise CheckpointError(f"{index}: shard {shard!r} lies outside the folder of the index; it is not opened")
    path = index.parent / shard
    if not path.is_file():
        raise CheckpointError(f"{index}: shard {shard} is missing from {index.parent}; download it again")
    return path


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file or a .safetensors.index.json")
    return path


def _read_file(path: Path) -> dict[str, TensorEntry]:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: only .safetensors files are read (a pickled checkpoint can run code); convert it first"
        )
    file = MappedFile(_existing(path))
    header, data_start = _read_header(file)
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, (begin, stop, dtype, shape) in _sorted_spans(path, header, file.size_bytes - data_start):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end} bytes before it"
            raise CheckpointError(f"{path}: tensor {name!r} {what}; the file is damaged")
        entries[name] = TensorEntry(file, data_start + begin, dtype, shape)
        end = stop
    if data_start + end != file.size_bytes:
        raise CheckpointError(
            f"{path}: {file.size_bytes - data_start - end} bytes follow the last tensor; it is damaged"
        )
    return entries


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    with file.path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
            raise CheckpointError(
                f"{file.path}: no safetensors header ({file.size_bytes} bytes in all); it is truncated"
            )
        return _parse_json(stream.read(length), file.path), 8 + length


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a name stands there twice")
        return keys

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; download the file again")
    return value


_Span = tuple[int, int, torch.dtype, tuple[int, ...]]


def _sorted_spans(path: Path, header: dict[str, Any], data_bytes: int) -> Iterable[tuple[str, _Span]]:
    spans = {name: _parse_entry(path, name, entry, data_bytes) for name, entry in header.items()}
    return sorted(spans.items(), key=lambda item: item[1][:2])


def _parse_entry(path: Path, name: str, entry: Any, data_bytes: int) -> _Span:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets; the file is damaged")
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(_DTYPES)}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {shape!r} at {offsets!r}; expected whole numbers >= 0"
        )
    begin, stop = offsets
    if begin > stop or stop > data_bytes:
        raise CheckpointError(f"{path}: tensor {name!r} ends at byte {stop} of {data_bytes}; the file is truncated")
    if math.prod(shape) * dtype.itemsize != stop - begin:
        raise CheckpointError(f"{path}: tensor {name!r} of {dtype} {shape} does not fit its {stop - begin} bytes")
    return begin, stop, dtype, tuple(shape)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
