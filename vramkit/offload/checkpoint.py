"""Safetensors checkpoints read with suspicion: every size, offset and name is checked before a byte is served.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data without
holes (https://huggingface.co/docs/safetensors). A sharded checkpoint is an index ``{"weight_map": {name: shard file}}``.
Pickled checkpoints are refused: reading one runs whatever code it carries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vramkit import tensors
from vramkit.errors import CheckpointError, ConfigError
from vramkit.memory import parse_bytes
from vramkit.offload.disk import MappedFile, atomic_write, check_files_of
from vramkit.offload.header import Span, parse_header
from vramkit.offload.stand_ins import stand_in

__all__ = [
    "StoredEntry",
    "TensorEntry",
    "distinct_weights",
    "index_beside",
    "index_name",
    "name_of",
    "read_checkpoint",
    "write_checkpoint",
    "write_weights",
]

_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "BOOL": "bool",
        "U8": "uint8",
        "U16": "uint16",
        "U32": "uint32",
        "U64": "uint64",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
        "F4": "float4_e2m1fn_x2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
    }.items()
    if hasattr(torch, dtype)  # some came with later versions
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "F4"}  # whose shapes are not those of torch


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: where it lies and what it is, of whatever dtype, known here or not."""

    file: MappedFile
    name: str  # in the file
    offset: int  # from the start of the file
    size_bytes: int
    dtype_name: str
    shape: tuple[int, ...]  # as torch counts: pairs of 4-bit numbers are one element
    pieces: tuple[tuple[int, int], ...] = ()  # offset and size of its parts, where it does not lie in one piece

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in torch.

        Raises:
            CheckpointError: torch has none.
        """
        if self.dtype_name not in _DTYPES:
            raise CheckpointError(
                f"{self.file.path}: tensor {self.name!r} has dtype {self.dtype_name!r}, and torch {torch.__version__} has "
                f"none for it; known are {', '.join(_DTYPES)}. load_mapped leaves it out if key_map gives None for it"
            )
        return _DTYPES[self.dtype_name]

    @property
    def is_floating_point(self) -> bool:
        """Whether it is real numbers to a module."""
        return self.dtype.is_floating_point

    def tensor(self) -> torch.Tensor:
        """Return the tensor as a view of the mapped file; CheckpointError where its dtype is unknown."""
        if not self.pieces:
            return self.file.tensor(self.offset, self.dtype, self.shape)
        parts = [self.file.tensor(offset, torch.uint8, (size,)) for offset, size in self.pieces]
        return torch.cat(parts).view(self.dtype).view(self.shape)

    def rows(self, *parts: tuple[int, int]) -> TensorEntry:
        """Return some rows, from one number up to another: a view of the file if it is one part, else those in turn."""
        row_bytes = self.size_bytes // self.shape[0]
        spans = tuple((self.offset + start * row_bytes, (stop - start) * row_bytes) for start, stop in parts)
        return dataclasses.replace(
            self,
            offset=spans[0][0],
            size_bytes=sum(size for _, size in spans),
            shape=(sum(stop - start for start, stop in parts), *self.shape[1:]),
            pieces=spans if len(spans) > 1 else (),
        )


class StoredEntry(TensorEntry):
    """One that is kept in fewer bits than it computes in."""

    __slots__ = ()

    def stored(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as the file keeps it, a tensor that computes as `dtype`; ordinary where that saves nothing."""
        raise NotImplementedError

    def problem(self, owners: Sequence[nn.Module]) -> str | None:
        """Say why it cannot be the weight of `owners`, or None."""
        del owners  # any will do
        return None


def read_checkpoint(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, TensorEntry]:
    """List the tensors of one safetensors or GGUF file, of several, or of a sharded checkpoint's index.

    A dtype that torch does not have is an error of the entry, when it is used.

    Raises:
        ConfigError: something else than paths was given.
        CheckpointError: a file is missing, pickled, truncated, damaged or points outside its folder; names file and tensor.
    """
    given = [files] if isinstance(files, str | os.PathLike | bytes) or not isinstance(files, Iterable) else [*files]
    for file in given:
        if not isinstance(file, str | os.PathLike):
            raise ConfigError(
                f"{file!r} was given for a file; expected a path, a sequence of them, or that of an index"
            )
    paths = list(map(Path, given))
    if not paths:
        raise CheckpointError("no checkpoint file was given; expected a .safetensors file or a .safetensors.index.json")
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        found = _read_index(path) if _INDEX.search(path.name) else _read_any(path)
        for name in found.keys() & entries.keys():
            raise CheckpointError(
                f"{path}: tensor {name!r} is also in {entries[name].file.path}; give each tensor once"
            )
        entries |= found
    return entries


def write_checkpoint(
    path: str | os.PathLike[str], leaves: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write plain tensors, wherever they are, as one safetensors file, whole or not at all.

    Raises:
        StoreError: the disk is full, the folder cannot be written, or a file that tensors are views of has changed.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, leaf in leaves.items():
        size_bytes = leaf.nbytes
        header[name] = {"dtype": _NAMES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for leaf in leaves.values():
            check_files_of([leaf])
            on_host = leaf.detach().cpu().contiguous().resolve_conj().resolve_neg()
            file.write(tensors.byte_view(on_host).numpy().data)


def write_weights(
    folder: Path,
    leaves: Mapping[str, torch.Tensor],
    *,
    stem: str,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write the tensors of a model as ``<stem>.safetensors``, or as shards and their index, as the peers do.

    Args:
        folder: exists.
        leaves: plain tensors by name.
        stem: of the file names.
        variant: between the stem and what follows it, and before the ending of the index, as in `index_name`.
        max_shard_size: bytes, or text such as "10GB"; a single larger tensor is a shard of its own.

    Raises:
        ConfigError: `max_shard_size` is no size, or `variant` no part of a name.
        StoreError: the disk is full or the folder cannot be written.
    """
    limit = parse_bytes(max_shard_size)
    index_path, stem = folder / index_name(stem, variant), name_of(stem, variant)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = limit
    for name, leaf in leaves.items():
        if shards[-1] and leaf.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = leaf
        room -= leaf.nbytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
        total_size = sum(leaf.nbytes for shard in shards for leaf in shard.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        with atomic_write(index_path) as file:
            file.write(f"{json.dumps(index, indent=2, sort_keys=True)}\n".encode())
    for name, shard in zip(names, shards, strict=True):
        wide_first = dict(sorted(shard.items(), key=lambda pair: -pair[1].element_size()))  # so that all are aligned
        write_checkpoint(folder / name, wide_first, metadata={"format": "pt"})


def name_of(stem: str, variant: str | None) -> str:
    """Return what files of weights are called without what follows: the stem, or ``<stem>.<variant>``.

    Raises:
        ConfigError: `variant` is no part of a name.
    """
    if variant is None:
        return stem
    if not isinstance(variant, str) or not re.fullmatch(r"\w[\w-]*", variant):
        raise ConfigError(f'variant is {variant!r}; expected letters and digits, such as "fp16"')
    return f"{stem}.{variant}"


def index_name(stem: str, variant: str | None) -> str:
    """Return what the index of shards is called: ``<stem>.safetensors.index.json``, or ``...index.<variant>.json``."""
    return f"{stem}.safetensors.index{'' if variant is None else f'.{variant}'}.json"


def distinct_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a state dict of `module` holds, tied tensors under their first name alone."""
    distinct = {id(tensor): name for name, tensor in reversed(module.state_dict(keep_vars=True).items())}
    kept = set(distinct.values())
    return {name: tensor for name, tensor in module.state_dict().items() if name in kept}


def _read_index(path: Path) -> dict[str, TensorEntry]:
    index = _parse_json(_existing(path).read_bytes(), path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{path}: expected {{"weight_map": {{tensor: shard file}}}}; download the index again')
    if not weight_map:
        raise CheckpointError(f"{path}: its weight_map lists no tensors; {_instead_of(path)}")
    shards = {shard: _read_file(_shard_path(path, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{path}: tensor {name!r} is listed in shard {shard}, which does not hold it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _shard_path(index: Path, shard: str) -> Path:
    if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
        raise CheckpointError(f"{index}: shard {shard!r} lies outside the folder of the index; it is not opened")
    path = index.parent / shard
    try:
        is_there = path.is_file()
    except OSError:  # a name that no file can have
        is_there = False
    if not is_there:
        raise CheckpointError(f"{index}: shard {shard} is missing from {index.parent}; {_instead_of(index)}")
    return path


def _instead_of(index: Path) -> str:
    """Say what to do about an index whose tensors are not there."""
    stem, _, variant = index.name.removesuffix(".json").partition(".safetensors.index")
    single = index.with_name(f"{stem}{variant}.safetensors")
    if single.is_file():
        return f"it may be left of an earlier save: delete it, and {single.name} beside it is read"
    return "download it again"


def index_beside(files: Collection[Path]) -> Path | None:
    """Return an index beside `files` that lists more shards than these, or None."""
    given = {file.name for file in files}
    for index in sorted(index for folder in {file.parent for file in files} for index in folder.glob("*.index*.json")):
        with contextlib.suppress(OSError, CheckpointError):
            weight_map = _parse_json(index.read_bytes(), index).get("weight_map")
            shards = [*weight_map.values()] if isinstance(weight_map, dict) else []
            is_sound = all(isinstance(shard, str) for shard in shards) and _INDEX.search(index.name)
            if is_sound and given.intersection(shards) and not given.issuperset(shards):
                return index
    return None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file or a .safetensors.index.json")
    return path


def _read_any(path: Path) -> dict[str, TensorEntry]:
    if path.suffix == ".gguf" and path.is_file():
        from vramkit.offload.gguf_file import read_gguf  # noqa: PLC0415 - most checkpoints are safetensors

        return read_gguf(path)
    return _read_file(path)


def _read_file(path: Path) -> dict[str, TensorEntry]:
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; give a .safetensors or .gguf file, or a .safetensors.index.json")
    if path.suffix not in (".safetensors", ".sft"):
        raise CheckpointError(
            f"{path}: only .safetensors files are read, and .gguf (a pickled checkpoint can run code); convert it first"
        )
    file = MappedFile(_existing(path))
    text = _header_text(file)
    data_start = 8 + len(text)
    spans = parse_header(text, path, file.size_bytes - data_start)
    return {
        name: TensorEntry(
            file, name, data_start + span.begin, span.stop - span.begin, span.dtype_name, _torch_shape(span)
        )
        for name, span in spans.items()
    }


def _header_text(file: MappedFile) -> bytes:
    with file.path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
            what = stand_in(file.path)
            raise CheckpointError(
                f"{file.path} {what}"
                if what
                else f"{file.path}: no safetensors header ({file.size_bytes} bytes in all); it is truncated"
            )
        return stream.read(length)


def _torch_shape(span: Span) -> tuple[int, ...]:
    """Return a shape as torch counts, to which two numbers of 4 bits are one element."""
    return (*span.shape[:-1], span.shape[-1] // 2) if span.dtype_name == "F4" else span.shape


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a name stands there twice")
        return keys

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        what = stand_in(path, is_text=True)
        raise CheckpointError(
            f"{path} {what}" if what else f"{path}: its JSON cannot be read ({error}); download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; download the file again")
    return value
