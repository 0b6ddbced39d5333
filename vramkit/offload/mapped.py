"""Give a module its weights as views of mapped safetensors files: nothing is read until it is used, nothing is copied."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from vramkit.errors import CheckpointError
from vramkit.offload.checkpoint import TensorEntry, read_checkpoint

__all__ = ["load_mapped"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
KeyMap = Callable[[str], "str | None"] | Mapping[str, str]
Convert = Callable[[Sequence[str], torch.Tensor, "torch.dtype | None"], "torch.Tensor | None"]


def load_mapped(
    module: ModuleT,
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    dtype: torch.dtype | None = None,
    key_map: KeyMap | None = None,
    keep_fp32: Sequence[str] = (),
    strict: bool = True,
    convert: Convert | None = None,
    loaded: Collection[str] = (),
) -> ModuleT:
    """Give `module` (usually built under ``torch.device("meta")``) its parameters and buffers from safetensors files.

    Tensors already in the wanted dtype become views of the mapped file: opening 26 GiB takes milliseconds and no RAM of its
    own. Others are converted here, once. Views are copy-on-write, so changing one never changes the file.

    Args:
        module: any module; its parameters are replaced by frozen ones. Tied parameters stay tied.
        files: one ``.safetensors`` file, a sequence of them, or a ``.safetensors.index.json``.
        dtype: what floating-point tensors become (None: as in the file).
        key_map: checkpoint name -> module name, as a mapping (absent names stay) or a function (None drops the tensor).
        keep_fp32: name parts of parameters that are float32 whatever `dtype` says.
        strict: whether tensors that the module does not have are an error. Missing ones always are.
        convert: called with all names of a tensor, the tensor as a view of its file, and the dtype that it should get;
            returns what the module gets instead (quantized, say), or None for the usual. One tensor is converted at a
            time, and the file is read ahead by one.
        loaded: names of parameters that the module has already, and the files do not.

    Raises:
        CheckpointError: damaged or missing files, missing or unknown tensors, wrong shapes. `module` is unchanged then.
    """
    loaded = frozenset(loaded)
    entries = _renamed(read_checkpoint(files), key_map)
    owners = [owner for owner in _owners(module) if loaded.isdisjoint(owner.names)]
    if strict:
        known = {name for owner in owners for name in owner.names}
        _refuse(sorted(entries.keys() - known), "holds tensors that the module does not have", entries)
    _refuse([owner.names[0] for owner in owners if not owner.found(entries)], "lacks tensors of the module", entries)
    for owner in owners:
        owner.check(entries)
    for owner, following in zip(owners, [*owners[1:], None], strict=True):
        if convert is not None and following is not None:
            following.read_ahead(entries)
        owner.load(entries, dtype, keep_fp32, convert)
    return module


@dataclasses.dataclass(slots=True)
class _Owner:
    """One tensor of the module under all its names (more than one where weights are tied)."""

    tensor: torch.Tensor
    names: list[str]
    places: list[tuple[dict[str, torch.Tensor | None], str]]

    def found(self, entries: Mapping[str, TensorEntry]) -> str | None:
        return next((name for name in self.names if name in entries), None)

    def check(self, entries: Mapping[str, TensorEntry]) -> None:
        name = self.found(entries)
        assert name is not None
        entry = entries[name]
        if entry.shape != tuple(self.tensor.shape):
            raise CheckpointError(
                f"{entry.file.path}: tensor {name!r} has shape {list(entry.shape)}, the module expects "
                f"{list(self.tensor.shape)}; the checkpoint belongs to another configuration"
            )
        if entry.dtype.is_floating_point != self.tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{entry.file.path}: tensor {name!r} has dtype {entry.dtype}, the module expects {self.tensor.dtype}"
            )

    def read_ahead(self, entries: Mapping[str, TensorEntry]) -> None:
        name = self.found(entries)
        assert name is not None
        entries[name].file.read_ahead(entries[name].offset, entries[name].size_bytes)

    def load(
        self,
        entries: Mapping[str, TensorEntry],
        dtype: torch.dtype | None,
        keep_fp32: Sequence[str],
        convert: Convert | None,
    ) -> None:
        name = self.found(entries)
        assert name is not None
        wanted = torch.float32 if dtype and any(part in name for part in keep_fp32) else dtype
        loaded = entries[name].tensor()
        converted = None if convert is None else convert(self.names, loaded, wanted)
        if converted is not None:
            loaded = converted
        elif wanted is not None and loaded.dtype.is_floating_point:
            loaded = loaded.to(wanted)
        if isinstance(self.tensor, nn.Parameter):
            loaded = nn.Parameter(loaded, requires_grad=False)
        for place, key in self.places:
            place[key] = loaded


def _owners(module: nn.Module) -> list[_Owner]:
    """List parameters and persistent buffers, each with all its names."""
    owners: dict[int, _Owner] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        persistent = {k: b for k, b in child._buffers.items() if k not in child._non_persistent_buffers_set}  # noqa: SLF001
        for place, held in ((child._parameters, child._parameters), (child._buffers, persistent)):  # noqa: SLF001
            for key, tensor in held.items():
                if tensor is not None:
                    owner = owners.setdefault(id(tensor), _Owner(tensor, [], []))
                    owner.names.append(f"{prefix}.{key}" if prefix else key)
                    owner.places.append((place, key))
    return list(owners.values())


def _renamed(entries: dict[str, TensorEntry], key_map: KeyMap | None) -> dict[str, TensorEntry]:
    if key_map is None:
        return entries
    rename = key_map if callable(key_map) else lambda name: key_map.get(name, name)
    renamed: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        new = rename(name)
        if new in renamed:
            raise CheckpointError(f"{entry.file.path}: key_map gives {name!r} and another tensor the same name {new!r}")
        if new is not None:
            renamed[new] = entry
    return renamed


def _refuse(names: Sequence[str], problem: str, entries: Mapping[str, TensorEntry]) -> None:
    if names:
        files = ", ".join(sorted({str(entry.file.path) for entry in entries.values()})) or "the checkpoint"
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise CheckpointError(
            f"{files} {problem}: {', '.join(names[:4])}{more}; the checkpoint belongs to another model or configuration"
        )
