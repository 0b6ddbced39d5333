"""The JSON header of a safetensors file: what the reference reader accepts is accepted, and nothing else.

The reference (https://github.com/huggingface/safetensors, safetensors/src/tensor.rs) parses by serde_json, which is stricter
than Python's json (numbers, escapes, depth) and looser (of names that stand there twice the last counts). Two readers that
take one file in two ways serve two models, so its rules are kept here to the letter, with two exceptions. Shapes that it
takes and can make no tensor of are refused at once. And a tensor may be of a dtype that is not known yet, as the next
version may know one: what wants that tensor refuses it, and what leaves it out need not mind.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vramkit.errors import CheckpointError

__all__ = ["Span", "parse_header"]

_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_MOST_COUNT = 2**64  # sizes and offsets are 64-bit numbers there
_MOST_SIZE = 2**63  # and signed ones in torch
_MOST_DEPTH = 127  # lists and objects inside one another


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A tensor by its header: bytes from `begin` up to `stop` of the data, and the shape that the file gives it."""

    begin: int
    stop: int
    dtype_name: str
    shape: tuple[int, ...]


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order, for names may stand there twice."""


def parse_header(text: bytes, path: Path, data_bytes: int) -> dict[str, Span]:
    """Return the tensors of a header in the order of their bytes.

    Args:
        text: the header as it stands in the file.
        path: of the file, for messages.
        data_bytes: how many bytes follow the header.

    Raises:
        CheckpointError: the reference reader would refuse it: no such JSON, fields that are missing or of other kinds, holes
            and overlaps, sizes that do not fit. Names the tensor.
    """
    tensors = _read(_json(text, path), path)
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].stop)))
    end = 0
    for name, span in ordered.items():
        _check(name, span, path, end, data_bytes)
        end = span.stop
    if end != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - end} bytes follow the last tensor; it is damaged")
    return ordered


def _json(text: bytes, path: Path) -> _Object:
    try:
        decoded = text.decode("utf-8")
        header = json.loads(
            decoded, object_pairs_hook=_Object, parse_int=_whole, parse_float=_real, parse_constant=_no_number
        )
        if "\\u" in decoded:  # halves of a pair of escapes are no text
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read ({error}); download the file again") from error
    if not isinstance(header, _Object):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(header).__name__}; download the file again")
    return header


def _whole(text: str) -> int | float:
    """A whole number; what does not fit 64 bits, and minus zero, is none."""
    if text != "-0" and len(text) <= 20 and -_MOST_SIZE <= (number := int(text)) < _MOST_COUNT:
        return number
    return _real(text)


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _read(header: _Object, path: Path) -> dict[str, Span]:
    """Return the tensors; what else the file says of itself is checked as well."""
    tensors: dict[str, Span] = {}
    has_metadata = False
    for name, value in header:
        if name != _METADATA:
            tensors[name] = _span(name, value, path)
        elif has_metadata:
            raise CheckpointError(f"{path}: {_METADATA} stands there twice; the file is damaged")
        elif value is None or (isinstance(value, _Object) and all(isinstance(each, str) for _, each in value)):
            has_metadata = True
        else:
            raise CheckpointError(f"{path}: expected texts by name in {_METADATA}; the file is damaged")
    return tensors


def _span(name: str, entry: Any, path: Path) -> Span:
    fields = _fields(name, entry, path)
    dtype_name, shape, offsets = (fields[field] for field in _FIELDS)
    if isinstance(dtype_name, _Object) and len(dtype_name) == 1 and dtype_name[0][1] is None:
        dtype_name = dtype_name[0][0]  # another way to write a choice without more to it
    if not isinstance(dtype_name, str):
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype_name!r}; expected the name of one")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {shape!r} at {offsets!r}; expected whole numbers >= 0"
        )
    begin, stop = offsets
    return Span(begin, stop, dtype_name, tuple(shape))


def _fields(name: str, entry: Any, path: Path) -> dict[str, Any]:
    """The three fields of an entry, which may also stand in a list without their names."""
    if type(entry) is list and len(entry) == len(_FIELDS):
        return dict(zip(_FIELDS, entry, strict=True))
    pairs = entry if isinstance(entry, _Object) else []
    known = [(key, value) for key, value in pairs if key in _FIELDS]
    if len(known) != len(_FIELDS) or len(dict(known)) != len(_FIELDS):
        raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets; the file is damaged")
    if any(_is_deeper(value, _MOST_DEPTH - 2) for key, value in pairs if key not in _FIELDS):
        raise CheckpointError(f"{path}: tensor {name!r} holds more than {_MOST_DEPTH} things inside one another")
    return dict(known)


def _is_deeper(value: Any, most: int) -> bool:
    if not isinstance(value, list):
        return False
    inner = (pair[1] for pair in value) if isinstance(value, _Object) else iter(value)
    return most == 0 or any(_is_deeper(each, most - 1) for each in inner)


def _is_counts(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and item >= 0 for item in value)


def _check(name: str, span: Span, path: Path, end: int, data_bytes: int) -> None:
    """Refuse a tensor that does not begin where the one before it ended, or whose size is not that of its shape."""
    shape, size_bytes = list(span.shape), span.stop - span.begin
    problem = None
    if span.begin > span.stop or span.stop > data_bytes:
        problem = f"ends at byte {span.stop} of {data_bytes}; the file is truncated"
    elif span.begin < end:
        problem = "overlaps the tensor before it; the file is damaged"
    elif span.begin > end:
        problem = f"leaves a hole of {span.begin - end} bytes before it; the file is damaged"
    elif span.dtype_name == "F4" and (not shape or shape[-1] % 2):
        problem = f"of {span.dtype_name} {shape} does not fit whole bytes, row by row"
    elif span.dtype_name not in _BITS:
        pass
    elif _bits(span) != size_bytes * 8 or max(shape, default=0) >= _MOST_SIZE:
        problem = f"of {span.dtype_name} {shape} does not fit its {size_bytes} bytes"
    if problem is not None:
        raise CheckpointError(f"{path}: tensor {name!r} {problem}")


def _bits(span: Span) -> int | None:
    """How many bits a tensor takes, None if a product on the way to that does not fit 64 bits, as there."""
    count = 1
    for size in span.shape:
        count *= size
        if count >= _MOST_COUNT:
            return None
    bits = count * _BITS[span.dtype_name]
    return None if bits >= _MOST_COUNT else bits
