"""Where a LoRA comes from: a file, a folder with one, a repository, or tensors at hand."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.folders import read_json
from vramkit.pipelines.lora.config import LoraConfig

__all__ = ["LoraFile", "LoraSource", "read_lora", "save_lora"]

LoraSource = str | os.PathLike[str] | Mapping[str, Tensor]

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # of diffusers
_METADATA = "lora_adapter_metadata"  # of a safetensors header: the PEFT configs of a pipeline's models, as JSON
_PEFT_NAME = "adapter_model.safetensors"  # of PEFT's save_pretrained, beside its config
_PEFT_CONFIG = "adapter_config.json"
_ENDINGS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")  # of files, not of repositories


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """The tensors of a LoRA, views of its file."""

    state: Mapping[str, Tensor]
    entries: Mapping[str, Any]
    """Of PEFT configs, each behind the component that it is for (``transformer.r``); without one, for the whole file."""
    source: str
    """Its name, for messages."""

    def config(self, component: str) -> LoraConfig:
        """Return the config of one component."""
        prefix = f"{component}."
        own = {key.removeprefix(prefix): value for key, value in self.entries.items() if key.startswith(prefix)}
        return LoraConfig(
            {key: value for key, value in self.entries.items() if "." not in key} | own, source=self.source
        )


def read_lora(
    source: LoraSource,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> LoraFile:
    """Open a LoRA: a file, a folder or repository with one, a folder of PEFT's save_pretrained, or tensors at hand.

    Raises:
        ConfigError: a path that does not exist, or a folder with several files and no `weight_name`.
        CheckpointError: no safetensors file, a damaged one, one with numbers that are not finite, or a download that failed.
    """
    if isinstance(source, Mapping):
        if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in source.items()):
            raise ConfigError(
                "the LoRA is a mapping of other things than names to tensors; give a state dict or a path"
            )
        return LoraFile(source, {}, "the state dict")
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"the LoRA is {type(source).__name__}; expected a path, a repository or a state dict")
    from safetensors import safe_open  # noqa: PLC0415

    from vramkit.offload import read_checkpoint  # noqa: PLC0415 - the engine is needed only once weights are

    path = _file(
        source,
        weight_name,
        subfolder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    state = {name: entry.tensor() for name, entry in read_checkpoint(path).items()}
    for name, tensor in state.items():
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{path}: tensor {name!r} holds infinities or NaN, which would be in all that the model makes; the training "
                "went wrong, or the file was written in too narrow a dtype: take another one"
            )
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    entries = _json(text, f"{path}: its {_METADATA}") | _peft_config(path)
    return LoraFile(state, entries, str(path))


def save_lora(
    folder: str | os.PathLike[str],
    layers: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Mapping[str, Any]],
    *,
    weight_name: str | None = None,
) -> Path:
    """Write tensors by component and name to one file, as diffusers does, and return its path.

    metadata are PEFT configs by component, which say the alphas.
    """
    from safetensors.torch import save  # noqa: PLC0415

    from vramkit.offload.disk import atomic_write  # noqa: PLC0415

    state = {
        f"{component}.{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for component, held in layers.items()
        for key, tensor in held.items()
    }
    entries = {f"{component}.{key}": value for component, held in metadata.items() for key, value in held.items()}
    header = {"format": "pt"}
    if entries:
        header[_METADATA] = json.dumps(entries, indent=2, sort_keys=True, default=_as_json)
    if not isinstance(folder, str | os.PathLike):
        raise ConfigError(f"save_directory is {type(folder).__name__}, expected the path of a folder")
    path = Path(folder) / (weight_name or WEIGHTS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(save(state, metadata=header))
    return path


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # fp8 has no such operation
    return bool(wide.isfinite().all())


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _json(text: str | None, what: str) -> dict[str, Any]:
    try:
        entries = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not a JSON object; remove it or save the file again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{what} is not a JSON object; remove it or save the file again")
    return entries


def _peft_config(path: Path) -> dict[str, Any]:
    """The config beside a file that PEFT wrote, which has the alphas; other files have nothing to do with it."""
    if path.name != _PEFT_NAME:
        return {}
    config = path.with_name(_PEFT_CONFIG)
    if not config.is_file():
        warnings.warn(
            f"{path} has no {_PEFT_CONFIG} beside it, which says how strong the adapter is: alpha is taken to be the rank",
            stacklevel=5,
        )
        return {}
    return read_json(config)


def _file(source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, **download: Any) -> Path:
    from vramkit.pipelines.loading.hub import is_address, local_file, local_folder  # noqa: PLC0415

    direct = Path(source).expanduser()
    if direct.is_file() or is_address(source):
        return local_file(source, **download)
    if direct.suffix in _ENDINGS and not direct.is_dir():
        raise ConfigError(
            f"{source} does not exist; give the .safetensors file of a LoRA, its folder or its repository"
        )
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise CheckpointError(
            f"weight_name={weight_name!r}: only .safetensors files are read (a pickled one can run code); convert it first"
        )
    pattern = weight_name or "*.safetensors"
    folder = local_folder(
        source,
        subfolder=subfolder,
        **download,
        allow_patterns=[f"{subfolder}/{each}" if subfolder else each for each in (pattern, _PEFT_CONFIG)],
    )
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise CheckpointError(
                f"{source} has no {weight_name}; it has {', '.join(found) or 'no .safetensors files'}"
            )
        return folder / weight_name
    if not found:
        raise CheckpointError(f"{source} has no .safetensors file; give the folder or repository of a LoRA")
    if len(found) > 1:
        raise ConfigError(f"{source} has several files; choose one by weight_name: {', '.join(found)}")
    return folder / found[0]
