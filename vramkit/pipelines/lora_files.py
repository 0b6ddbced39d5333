"""Where a LoRA comes from: a file, a folder with one, a repository, or tensors at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vramkit.errors import CheckpointError, ConfigError

__all__ = ["LoraSource", "read_lora"]

LoraSource = str | os.PathLike[str] | Mapping[str, Tensor]

_METADATA = "lora_adapter_metadata"  # of a safetensors header: the PEFT configs of a pipeline's models, as JSON


def read_lora(
    source: LoraSource,
    *,
    component: str,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Mapping[str, Tensor], dict[str, Any], str]:
    """Return the tensors of a LoRA, views of its file, the PEFT config of `component` in it, and its name for messages.

    Raises:
        ConfigError: a path that does not exist, or a folder with several files and no `weight_name`.
        CheckpointError: no safetensors file, a damaged one, or a download that failed.
    """
    if isinstance(source, Mapping):
        if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in source.items()):
            raise ConfigError(
                "the LoRA is a mapping of other things than names to tensors; give a state dict or a path"
            )
        return source, {}, "the state dict"
    from safetensors import safe_open  # noqa: PLC0415

    from vramkit.offload import read_checkpoint  # noqa: PLC0415 - the engine is needed only once weights are

    path = _file(source, weight_name=weight_name, subfolder=subfolder, revision=revision, cache_dir=cache_dir)
    state = {name: entry.tensor() for name, entry in read_checkpoint(path).items()}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    return state, _config(text, component, path), str(path)


def _config(text: str | None, component: str, path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(text or "{}").items()
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its {_METADATA} is not a JSON object; remove it or save the file again"
        ) from error
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in entries if key.startswith(prefix)}


def _file(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None,
    subfolder: str | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    from vramkit.pipelines.hub import local_folder  # noqa: PLC0415

    direct = Path(source).expanduser()
    if direct.is_file():
        return direct
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise CheckpointError(
            f"weight_name={weight_name!r}: only .safetensors files are read (a pickled one can run code); convert it first"
        )
    pattern = weight_name or "*.safetensors"
    folder = local_folder(
        source,
        subfolder=subfolder,
        revision=revision,
        cache_dir=cache_dir,
        allow_patterns=[f"{subfolder}/{pattern}" if subfolder else pattern],
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
