"""What the inner tensors of a stored weight must be, said once per format and checked before a kernel sees one.

Kernels take pointers: where a scale is missing or a row short they read what lies behind it. So a handler describes the
parts of a weight from its shape, and what a file holds is compared with that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vramkit.errors import CheckpointError

__all__ = ["Part", "check_parts", "dtype_name", "noted", "noted_dtype", "noted_shape", "stacked"]

_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Shape and dtype of one inner tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


def stacked(ahead: Sequence[int], parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts of a stack of matrices, whose dimensions stand before those of the parts of one."""
    return {name: Part((*ahead, *part.shape), part.dtype) for name, part in parts.items()}


def check_parts(parts: Mapping[str, torch.Tensor], expected: Mapping[str, Part]) -> None:
    """Compare parts with their description.

    Raises:
        CheckpointError: one is missing, unknown, or of another shape or dtype; names it.
    """
    for name in sorted(parts.keys() | expected.keys()):
        found = Part(tuple(parts[name].shape), parts[name].dtype) if name in parts else None
        if found != expected.get(name):
            raise CheckpointError(
                f"part {name!r} is {found or 'missing'}, expected {expected.get(name) or 'none of that name'}; the file is "
                "damaged, or of another quantization: save the model again"
            )


def noted(notes: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return what the notes of a weight say.

    Raises:
        CheckpointError: nothing, or a value of another kind.
    """
    if type(notes.get(key)) is not kind:
        raise CheckpointError(
            f"its notes say {key}={notes.get(key)!r}, expected {kind.__name__}; config.json is damaged"
        )
    return notes[key]


def noted_shape(notes: Mapping[str, Any], key: str = "shape") -> tuple[int, ...]:
    """Return a shape of the notes; CheckpointError where it is none."""
    shape: list[Any] = noted(notes, key, list)
    if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape[:8]) >= 2**63 or len(shape) > 8:
        raise CheckpointError(f"its notes say {key}={shape!r}, expected the sizes of a weight; config.json is damaged")
    return tuple(shape)


def noted_dtype(
    notes: Mapping[str, Any], key: str = "dtype", among: Sequence[torch.dtype] = _COMPUTE_DTYPES
) -> torch.dtype:
    """Return a dtype of the notes, one that weights compute in unless others are named; CheckpointError where it is none."""
    choices = {dtype_name(dtype): dtype for dtype in among}
    name = noted(notes, key, str)
    if name not in choices:
        raise CheckpointError(
            f"its notes say {key}={name!r}, expected one of {', '.join(choices)}; config.json is damaged"
        )
    return choices[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as notes keep it."""
    return str(dtype).removeprefix("torch.")
