"""Weights that files keep in fp8: plain, or with scales under one of the names that are in circulation.

`with_scales` joins each weight with its scale before anything is mapped to a module, so that a scale can neither be taken
for a tensor of the module nor be left out as one that it does not have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from vramkit.errors import CheckpointError
from vramkit.offload.checkpoint import StoredEntry, TensorEntry

__all__ = ["Fp8Entry", "computes_as", "with_scales"]

_FP8 = ("F8_E4M3", "F8_E5M2")
_MARKER = "scaled_fp8"  # of a whole file, by ComfyUI
# Scales of inputs, for products in fp8; what a layer is stored as, by ComfyUI.
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
_MOST_WORDS = 4096  # bytes of what is said of a layer
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_WIDE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Fp8Entry(StoredEntry):
    """An fp8 tensor of a file, and the numbers that its rows are multiplied by (None: by none)."""

    scale: TensorEntry | None = None
    lacks_scale: bool = False  # the file says that its weights have scales, and this one has none

    def rows(self, *parts: tuple[int, int]) -> Fp8Entry:
        """Return some of the rows, with their scales."""
        part = super().rows(*parts)
        assert isinstance(part, Fp8Entry)
        if self.scale is None or math.prod(self.scale.shape) == 1:
            return part
        return dataclasses.replace(part, scale=self.scale.rows(*parts))

    def stored(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the fp8 values of the file with their scales; vectors are widened."""
        from vramkit.casting.narrow import NarrowTensor  # noqa: PLC0415 - most files have none

        values, scale = self.tensor(), None
        if self.scale is not None:
            numbers = self.scale.tensor().float().reshape(-1)
            scale = numbers.reshape(-1, *(1 for _ in values.shape[1:])) if values.ndim else numbers.reshape(())
            if values.ndim > 2:  # stacks are indexed together with their scales
                scale = scale.expand(len(values), *scale.shape[1:]).contiguous()
        narrow = NarrowTensor(values, scale, dtype, is_given=True)
        return narrow if values.ndim > 1 else narrow.dequantize()

    def problem(self, owners: Sequence[nn.Module]) -> str | None:
        """Say why it cannot be the weight of `owners`: tables alone have no scales in files whose weights have them."""
        if not self.lacks_scale or len(self.shape) < 2 or all(isinstance(owner, nn.Embedding) for owner in owners):
            return None
        return f"is fp8 without a scale, in a file that has scales ({_MARKER})"


def with_scales(entries: Mapping[str, TensorEntry], is_own: Callable[[str], bool]) -> dict[str, TensorEntry]:
    """Join fp8 weights with their scales, and leave out what else says how they are stored.

    Args:
        entries: the tensors of files, by name.
        is_own: whether a name is one of the module's, whose layers may know scales themselves; those stay.

    Raises:
        CheckpointError: scales that do not fit, or that belong to weights of other dtypes; another format than fp8.
    """
    if all(entry.dtype_name not in _FP8 for entry in entries.values()):
        return dict(entries)
    is_marked = any(_last(name) == _MARKER for name in entries)
    joined: dict[str, TensorEntry] = {}
    scales: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        if is_own(name):
            joined[name] = entry
        elif _last(name) == _MARKER or name.endswith(_BESIDE):
            _check_format(entry)
        elif (weight := _scaled_by(name)) is not None and weight in entries:
            if weight in scales:
                raise _error(entry, f"and {scales[weight].name!r} both scale {weight!r}")
            scales[weight] = entry
        else:
            joined[name] = entry
    for name, entry in joined.items():
        if entry.dtype_name in _FP8:
            found = scales.pop(name, None)
            _check_scale(entry, found)
            parts = {field.name: getattr(entry, field.name) for field in dataclasses.fields(TensorEntry)}
            joined[name] = Fp8Entry(**parts, scale=found, lacks_scale=is_marked and found is None)
    for weight, entry in scales.items():
        if not (entry.size_bytes and bool((entry.tensor() == 1).all())):  # which says nothing
            raise _error(entry, f"scales {weight!r}, which is {entries[weight].dtype_name} and not fp8")
    return joined


def computes_as(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """Return what stored weights compute as unless it is chosen: the dtype of most biases beside them, or of most of all."""
    beside = [f"{name.removesuffix('weight')}bias" for name, entry in entries.items() if isinstance(entry, StoredEntry)]
    for names in (beside, list(entries)):
        found = Counter(entries[name].dtype_name for name in names if name in entries)
        wide = [(count, name) for name, count in found.items() if name in _WIDE]
        if wide:
            return _WIDE[max(wide)[1]]
    return torch.bfloat16


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _scaled_by(name: str) -> str | None:
    """Return the weight that a tensor is the scale of by its name: ComfyUI's, that of most other tools, DeepSeek's."""
    if _last(name) == "scale_weight":
        return f"{name.removesuffix('scale_weight')}weight"
    return next((name.removesuffix(end) for end in ("_scale", "_scale_inv") if name.endswith(end)), None)


def _check_scale(weight: TensorEntry, scale: TensorEntry | None) -> None:
    if scale is None:
        return
    counts = [size for size in scale.shape if size != 1]
    if scale.dtype_name not in _WIDE:
        problem = f"is {scale.dtype_name}, expected one of {', '.join(_WIDE)}"
    elif counts and (counts != list(weight.shape[:1]) or scale.shape[0] == 1):
        problem = f"has shape {list(scale.shape)}, expected one number, or one for each row of {list(weight.shape)}"
    elif not scale.size_bytes or not bool(scale.tensor().isfinite().all()):
        problem = "is empty, or holds infinities or NaN"
    else:
        return
    raise _error(scale, f"is the scale of {weight.name!r}, and {problem}")


def _check_format(entry: TensorEntry) -> None:
    """Refuse what ComfyUI says of a layer if it is not fp8: JSON, as bytes."""
    if not entry.name.endswith(".comfy_quant"):
        return
    if entry.size_bytes > _MOST_WORDS:
        raise _error(entry, f"should say how its layer is stored, and has {entry.size_bytes} bytes")
    try:
        kept_as = json.loads(bytes(entry.tensor().tolist())).get("format")
    except (ValueError, TypeError, AttributeError, CheckpointError) as error:
        raise _error(entry, f"does not say how its layer is stored ({error})") from error
    if kept_as not in _FORMATS:
        raise _error(entry, f"says that its layer is stored as {kept_as!r}; expected one of {', '.join(_FORMATS)}")


def _error(entry: TensorEntry, problem: str) -> CheckpointError:
    return CheckpointError(f"{entry.file.path}: tensor {entry.name!r} {problem}")
