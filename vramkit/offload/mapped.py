"""Give a module its weights as views of mapped safetensors files: nothing is read until it is used, nothing is copied."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from vramkit import tensors
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload.checkpoint import StoredEntry, TensorEntry, index_beside, read_checkpoint
from vramkit.offload.config import refuse_no_module
from vramkit.offload.places import Place, places_of
from vramkit.offload.scaled import computes_as, with_scales

__all__ = ["KeyMap", "Renamed", "Rows", "load_mapped"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Convert = Callable[[Sequence[str], torch.Tensor, "torch.dtype | None"], "torch.Tensor | None"]


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """What a key map gives for a tensor that is made of some of the `of` equal parts, along rows, of one of a file."""

    name: str
    parts: tuple[int, ...]
    of: int


Renamed = str | Rows | tuple[str, ...] | tuple[Rows, ...] | None
KeyMap = Callable[[str], Renamed] | Mapping[str, Renamed]


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
    """Give `module` (usually built inside `parameters_on_meta`) its parameters and buffers from safetensors files.

    Tensors already in the wanted dtype become views of the mapped file: opening 26 GiB takes milliseconds and no RAM of its
    own. Others are converted here, once. Views are copy-on-write, so changing one never changes the file. What no file
    holds stays as the constructor made it, which must have given it values.

    Weights that files keep in fewer bits stay as they are, and compute as `dtype`: fp8 with or without scales (of the names
    that ComfyUI and others give them) and blocks of GGUF. Their vectors are widened. Without a `dtype` they compute as their
    biases do in the file, or else as most of it. Tensors that are fp8 in the module itself are taken as they are.

    Args:
        module: any module; its parameters are replaced by frozen ones of the same class. Tied parameters stay tied.
        files: one ``.safetensors`` or ``.gguf`` file, a sequence of them, or a ``.safetensors.index.json``.
        dtype: what floating-point tensors of the files become (None: as they are there).
        key_map: checkpoint name -> module name, as a mapping (absent names stay) or a function (None drops the tensor). A
            tuple of module names is a tensor whose rows are those of several, each of which is a view of its part; `Rows`
            are parts in whatever order.
        keep_fp32: name parts of parameters that are float32 whatever `dtype` says.
        strict: whether tensors that the module does not have are an error. Missing ones always are.
        convert: called with all names of a tensor, the tensor as a view of its file, and the dtype that it should get;
            returns what the module gets instead (quantized, say), or None for the usual. One tensor is converted at a
            time, and the file is read ahead by one.
        loaded: names of tensors that the files need not hold: the module has them already, or makes them when it runs.

    Raises:
        ConfigError: `module` is none, or another argument cannot be used.
        CheckpointError: damaged or missing files, missing or unknown tensors, wrong shapes, scales that do not fit, and
            whatever else would stay on the meta device: buffers that are not saved, tensors in attributes. `module` is
            unchanged then.
    """
    refuse_no_module(module)
    if not (key_map is None or callable(key_map) or isinstance(key_map, Mapping)):
        raise ConfigError(f"key_map={key_map!r}; expected a mapping of names, a function of a name, or None")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r}; expected a floating-point dtype such as torch.bfloat16, or None")
    if isinstance(keep_fp32, str):
        raise ConfigError(f"keep_fp32={keep_fp32!r}; expected a list of parts of names such as [{keep_fp32!r}]")
    loaded = frozenset(loaded)
    places = list(places_of(module))
    entries = _entries(files, key_map, {place.name: place.tensor for place in places if place.is_saved})
    owners = [owner for owner in _owners(places) if loaded.isdisjoint(owner.names)]
    if strict:
        known = {name for owner in owners for name in owner.names}
        _refuse(sorted(entries.keys() - known), "holds tensors that the module does not have", entries)
    _refuse([owner.names[0] for owner in owners if not owner.found(entries)], "lacks tensors of the module", entries)
    for owner in owners:
        owner.check(entries, module)
    computing = dtype or computes_as(entries)
    _refuse_leftovers([place for place in places if place.name not in loaded], owners)
    for owner, following in itertools.zip_longest(owners, owners[1:]):
        if convert is not None and following is not None:
            following.read_ahead(entries)
        owner.load(entries, dtype, keep_fp32, convert, computing)
    return module


@dataclasses.dataclass(slots=True)
class _Owner:
    """One tensor of the module with all its places (more than one where weights are tied), and the names that files use."""

    tensor: torch.Tensor
    names: list[str]
    places: list[Place]

    def found(self, entries: Mapping[str, TensorEntry]) -> str | None:
        return next((name for name in self.names if name in entries), None)

    def check(self, entries: Mapping[str, TensorEntry], module: nn.Module) -> None:
        name = self.found(entries)
        assert name is not None
        entry = entries[name]
        if entry.shape != tuple(self.tensor.shape):
            raise CheckpointError(
                f"{entry.file.path}: tensor {name!r} has shape {list(entry.shape)}, the module expects "
                f"{list(self.tensor.shape)}; the checkpoint belongs to another configuration"
            )
        problem = None
        if isinstance(entry, StoredEntry):
            problem = entry.problem([module.get_submodule(each.rpartition(".")[0]) for each in self.names])
        if problem is None and _kind(entry) != (self.tensor.is_floating_point(), self.tensor.is_complex()):
            problem = f"has dtype {entry.dtype}, the module expects {self.tensor.dtype}"
        if problem is not None:
            raise CheckpointError(f"{entry.file.path}: tensor {name!r} {problem}")

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
        computing: torch.dtype,
    ) -> None:
        name = self.found(entries)
        assert name is not None
        entry = entries[name]
        wanted = torch.float32 if dtype and any(part in name for part in keep_fp32) else dtype
        if isinstance(entry, StoredEntry) and self.tensor.dtype not in _FP8:
            loaded = entry.stored(wanted or computing)
        else:
            loaded = entry.tensor()
        converted = None if convert is None else convert(self.names, loaded, wanted)
        if converted is not None:
            loaded = converted
        elif wanted is not None and loaded.dtype.is_floating_point:
            loaded = loaded.to(wanted)
        if isinstance(self.tensor, nn.Parameter):
            loaded = tensors.as_owned(loaded, like=self.tensor)
        elif not tensors.is_plain(loaded):
            loaded = loaded.dequantize()
        for place in self.places:
            place.put(loaded)


def _kind(entry: TensorEntry) -> tuple[bool, bool]:
    return entry.is_floating_point, not entry.is_floating_point and entry.dtype.is_complex


def _owners(places: Sequence[Place]) -> list[_Owner]:
    """List parameters and persistent buffers, each with all its names, and with the attributes that hold it as well."""
    owners: dict[int, _Owner] = {}
    for place in places:
        if place.is_saved:
            owners.setdefault(id(place.tensor), _Owner(place.tensor, [], [])).names.append(place.name)
    for place in places:
        if id(place.tensor) in owners and place.is_writable:
            owners[id(place.tensor)].places.append(place)
    return list(owners.values())


def _refuse_leftovers(places: Sequence[Place], owners: Sequence[_Owner]) -> None:
    """Raise CheckpointError for tensors that would still be on the meta device when all owners have theirs."""
    given = {id(place) for owner in owners for place in owner.places}
    left = [place for place in places if place.tensor.device.type == "meta" and id(place) not in given]
    if left:
        named = [f"{place.name} ({place.kind})" for place in left]
        raise CheckpointError(
            f"{_listed(named)} would stay on the meta device without values, because no file holds them. Build the module "
            "inside `with vramkit.parameters_on_meta():`, where its constructor computes buffers and attributes as ever, or "
            "assign them before load_mapped; what the module makes when it runs, name in loaded=(...)"
        )


def _entries(files: Any, key_map: KeyMap | None, known: Mapping[str, torch.Tensor]) -> dict[str, TensorEntry]:
    """Read the tensors of files by the names of the module, whose tensors are `known`, weights with their scales."""

    def rename(name: str) -> Renamed:
        if callable(key_map):
            return key_map(name)
        return name if key_map is None else key_map.get(name, name)

    entries = read_checkpoint(files)
    new_names = {name: rename(name) for name in entries}
    entries = with_scales(entries, lambda name: new_names[name] in known)
    renamed: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        for new, part in _parts(entry, new_names[name], known):
            if new in renamed:
                raise CheckpointError(
                    f"{entry.file.path}: key_map gives {name!r} and another tensor the same name {new!r}"
                )
            renamed[new] = part
    return renamed


def _parts(entry: TensorEntry, new: Renamed, known: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, TensorEntry]]:
    """Yield what a tensor of a file is to the module: one tensor, none, or the rows of several."""
    if new is None:
        return
    if isinstance(new, str):
        yield new, entry
        return
    if not isinstance(new, Rows | tuple | list):
        raise ConfigError(f"key_map gives {new!r} for {entry.name!r}; expected a name, a tuple of names, Rows or None")
    rows = entry.shape[0] if entry.shape else 0
    for part in (new,) if isinstance(new, Rows) else new:
        if isinstance(part, Rows):
            if not rows or rows % part.of:
                raise _wrong_rows(entry, f"{part.of} equal parts for {part.name}")
            size = rows // part.of
            yield part.name, entry.rows(*((at * size, (at + 1) * size) for at in part.parts))
    names = [part for part in new if isinstance(part, str)] if isinstance(new, tuple) else []
    sizes = [known[name].shape[0] if name in known and known[name].ndim else 0 for name in names]
    if names and (sum(sizes) != rows or 0 in sizes):
        raise _wrong_rows(
            entry, f"the rows of {', '.join(f'{n} ({size})' for n, size in zip(names, sizes, strict=True))}"
        )
    stop = 0
    for name, size in zip(names, sizes, strict=True):
        start, stop = stop, stop + size
        yield name, entry.rows((start, stop))


def _wrong_rows(entry: TensorEntry, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.file.path}: tensor {entry.name!r} has shape {list(entry.shape)}, and should hold {expected}"
    )


def _refuse(names: Sequence[str], problem: str, entries: Mapping[str, TensorEntry]) -> None:
    if names:
        files = {entry.file.path for entry in entries.values()}
        index = index_beside(files)
        advice = "the checkpoint belongs to another model or configuration"
        if index is not None:
            advice = f"give all shards, or {index}, which lists them"
        where = ", ".join(sorted(map(str, files))) or "the checkpoint"
        raise CheckpointError(f"{where} {problem}: {_listed(names)}; {advice}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
