"""Quantized models as folders: safetensors with the parts of each weight, and what they mean in config.json."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from vramkit.casting.coverage import warn_if_little
from vramkit.casting.narrow import NarrowTensor
from vramkit.casting.weights import label_of
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import load_mapped
from vramkit.offload.checkpoint import TensorEntry, read_checkpoint, write_weights
from vramkit.offload.disk import staged_folder
from vramkit.offload.offloaded import editable
from vramkit.quant.api import Quantizer, note_quantization, quantization_of
from vramkit.quant.config import Fp8Config, GgufConfig, QuantConfig
from vramkit.quant.handler import Handler
from vramkit.quant.registry import as_config, handler_for
from vramkit.quant.tensor import QuantizedTensor
from vramkit.tensors import is_plain

__all__ = ["CONFIG_KEY", "load_quantized", "load_quantizing", "note_stored", "save_quantized"]

CONFIG_KEY = "quantization_config"
_METHOD = "vramkit"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_quantized(
    module: Any, folder: str | os.PathLike[str], *, variant: str | None = None, max_shard_size: int | str = "10GB"
) -> None:
    """Write a quantized or cast model, or a pipeline with such models, so that it loads without the original weights.

    ``from_pretrained`` of vramkit's models and pipelines finds out by itself, `load_quantized` loads it into any
    module; that of transformers does not know such files. Only safetensors and JSON are written.

    Args:
        module: a model of vramkit or of another library, or a `Pipeline`.
        folder: made if it is missing.
        variant: of the names of the weights' files.
        max_shard_size: bytes, or text such as "10GB"; a larger model is split and gets an index.

    Raises:
        ConfigError: the module is not quantized, or its weights were quantized elsewhere (`adopt`).
    """
    if not isinstance(module, nn.Module):
        module.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)  # a pipeline, model by model
        return
    found = quantization_of(module)
    config_used = _stored_as(module) if found is None else found.config
    if config_used is None:
        name = type(module).__name__
        if not all(map(is_plain, module.parameters())):
            raise ConfigError(
                f"{name} has weights that were quantized elsewhere, so that no config says how they are stored; keep "
                "the files that they were loaded from, or quantize the original weights by vramkit.quant and save those"
            )
        raise ConfigError(f"{name} is not quantized; quantize it first, or use save_pretrained")
    with editable(module), staged_folder(folder) as stage:
        tensors, notes = _packed(module, handler_for(config_used))
        stem, config = _published(module)
        more = {**config_used.to_dict(), "skipped": found.skipped if found else (), "tensors": notes}
        config[CONFIG_KEY] = {"quant_method": _METHOD, **more}
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(stage, tensors, stem=stem, variant=variant, max_shard_size=max_shard_size)


def load_quantized(
    module: ModuleT,
    files: Any,
    saved: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    keep_fp32: Sequence[str] = (),
    key_map: Callable[[str], str | None] | None = None,
) -> ModuleT:
    """Give `module` (usually built under ``torch.device("meta")``) the weights that `save_quantized` wrote, mapped.

    Args:
        module: of the class and shapes that were saved.
        files: as in `load_mapped`.
        saved: the ``quantization_config`` of the folder's config.json.
        dtype: floating dtype that the module computes in; None keeps what was saved.
        keep_fp32: as in `load_mapped`.
        key_map: as in `load_mapped`, for what is not quantized.

    Raises:
        CheckpointError: it was not written by `save_quantized`, or does not fit the module.
        ConfigError: the backend's package is missing.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{CONFIG_KEY} of config.json is {saved!r}, expected an object; it is damaged")
    if saved.get("quant_method") != _METHOD:
        raise CheckpointError(
            f"the weights were quantized by {saved.get('quant_method')!r}, whose files are not read here; load the original "
            "checkpoint with quantization_config=..., and save_quantized() it"
        )
    config, notes = _saved_config(saved), _saved_notes(saved)
    handler = handler_for(config)
    entries = read_checkpoint(files)
    owned = {name: _owner(module, name) for name in notes}
    parts = {name: _parts_of(name, entries) for name in notes}
    names: list[str] = []
    for name, (layer, key) in owned.items():
        try:
            tensors = {part: entry.tensor() for part, entry in parts[name].items()}
            weight = handler.put_together(tensors, notes[name], tuple(getattr(layer, key).shape))
        except CheckpointError as error:
            raise CheckpointError(f"{_files_of(parts[name])}: {name}: {error}") from error
        if dtype is not None and dtype != weight.dtype:
            weight = weight.rebuilt(weight.parts(), dtype)
        setattr(layer, key, nn.Parameter(weight, requires_grad=False))
        names.append(label_of(name))
    taken = {f"{name}.{part}" for name, found in parts.items() for part in found}

    def rest(name: str) -> str | None:
        if name in taken:
            return None
        return name if key_map is None else key_map(name)

    load_mapped(module, files, dtype=dtype, keep_fp32=keep_fp32, key_map=rest, loaded=list(notes))
    note_quantization(module, config, handler, names)
    return module


def load_quantizing(module: ModuleT, files: Any, config: Any, **options: Any) -> ModuleT:
    """Give `module` (on the meta device) the weights of a checkpoint, each quantized as it is read.

    Host memory holds what is quantized and one original weight at a time.

    Args:
        module: as in `load_mapped`.
        files: as in `load_mapped`.
        config: as in `quantize`.
        **options: for `load_mapped`.

    Raises:
        CheckpointError: as `load_mapped`.
        ConfigError, ConflictError: as `quantize`.
    """
    quantizer = Quantizer(module, config)
    load_mapped(module, files, convert=quantizer.converted, **options)
    warn_if_little(module, quantizer.finish().coverage, stacklevel=2)
    return module


def note_stored(module: nn.Module) -> None:
    """Note that weights of `module` came from files in fewer bits, so that they are saved and dequantized as ours are."""
    config = _stored_as(module)
    if config is not None:
        names = [label_of(name) for name, parameter in module.named_parameters() if not is_plain(parameter)]
        note_quantization(module, config, handler_for(config), names)


def _stored_as(module: nn.Module) -> QuantConfig | None:
    """Return the config of the format that weights of `module` are stored in, which nobody quantized; None if none is."""
    stored: list[torch.Tensor] = [parameter for parameter in module.parameters() if not is_plain(parameter)]
    if stored and all(isinstance(weight, NarrowTensor) for weight in stored):
        return Fp8Config()
    if stored and all(
        isinstance(weight, QuantizedTensor) and type(weight).__name__ == "GgufTensor" for weight in stored
    ):
        return GgufConfig()
    return None


def _packed(module: nn.Module, handler: Handler) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return all tensors of the module, quantized ones in parts, and the notes of those by name."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    for name, tensor in module.state_dict().items():
        if is_plain(tensor):
            tensors[name] = tensor
            continue
        parts, notes[name] = handler.take_apart(tensor)
        tensors |= {f"{name}.{part}": value.detach() for part, value in parts.items()}
    return tensors, notes


def _published(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return how the weights' files of a module are called, and its config."""
    config: Any = getattr(module, "config", None)
    if callable(getattr(config, "to_json_string", None)):
        return "model", json.loads(config.to_json_string())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return "diffusion_pytorch_model", {"_class_name": type(module).__name__, **dataclasses.asdict(config)}
    return "model", {"_class_name": type(module).__name__}


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        layer = nn.Module()
    if key not in dict(layer.named_parameters(recurse=False)):
        raise CheckpointError(f"the module has no {name}, which the config lists as quantized")
    return layer, key


def _saved_config(saved: Mapping[str, Any]) -> QuantConfig:
    """The config that weights were saved with, whole: a default in place of a lost option would mean other numbers."""
    options = {key: value for key, value in saved.items() if key not in ("tensors", "skipped", "quant_method")}
    try:
        config = as_config(options)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{CONFIG_KEY} of config.json is damaged: {error}") from error
    if lost := sorted(config.to_dict().keys() - options.keys()):
        raise CheckpointError(
            f"{CONFIG_KEY} of config.json lacks {', '.join(lost)}; it is damaged: save the model again"
        )
    return config


def _saved_notes(saved: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    notes = saved.get("tensors")
    if not isinstance(notes, Mapping) or not all(isinstance(each, Mapping) for each in notes.values()):
        raise CheckpointError(
            f'{CONFIG_KEY} of config.json has no "tensors" with what each is stored as; it is damaged'
        )
    return notes


def _files_of(entries: Mapping[str, TensorEntry]) -> str:
    return ", ".join(sorted({str(entry.file.path) for entry in entries.values()}))


def _parts_of(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    found = {key[len(name) + 1 :]: entry for key, entry in entries.items() if key.startswith(f"{name}.")}
    if not found:
        raise CheckpointError(f"the files lack the parts of {name}, which the config lists as quantized")
    return found
