"""A model from one file: its config, its names, and its weights as views of the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload.checkpoint import StoredEntry, read_checkpoint
from vramkit.offload.mapped import Renamed
from vramkit.offload.scaled import computes_as, with_scales
from vramkit.pipelines.loading.folders import CONFIG_NAME, read_json
from vramkit.pipelines.loading.hub import local_file, local_folder
from vramkit.pipelines.loading.modeling import Model
from vramkit.pipelines.loading.original_names import models_in, renaming
from vramkit.pipelines.loading.told_configs import told_config, untold

__all__ = ["classes_in", "config_source", "load_single_file"]

ModelT = TypeVar("ModelT", bound=Model)


def classes_in(file: Path) -> list[str]:
    """Return the published class names of the models that a file holds, a transformer before an autoencoder.

    Raises:
        CheckpointError: a damaged file.
    """
    return sorted(models_in(read_checkpoint(file)), key=lambda name: name.startswith("Autoencoder"))


def load_single_file(
    model_class: type[ModelT],
    source: str | os.PathLike[str],
    *,
    config: Any = None,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **download: Any,
) -> ModelT:
    """Load a model from one file; see `Model.from_single_file`."""
    file = local_file(source, revision=revision, cache_dir=cache_dir, **download)
    name = model_class.__name__
    entries = read_checkpoint(file)
    rename = renaming(name, entries, source=file)
    if config is None:
        given = told_config(name, _shapes(entries, rename))
        if given is None:
            raise CheckpointError(
                f"{file}: its shapes do not tell the config of this {name}; give config=, the folder or repository of the "
                f"published model (or its config as a dict){untold(name)}"
            )
    else:
        given = config_source(config, model_class, subfolder=subfolder, cache_dir=cache_dir, **download)
    dtype = _computes_as(file, torch_dtype, quantization_config)
    if dtype is None:  # what is beside stored weights is of several dtypes in most files
        stored = with_scales(entries, lambda _name: False)
        dtype = computes_as(stored) if any(isinstance(entry, StoredEntry) for entry in stored.values()) else None
    return model_class.from_files(
        [file],
        given,
        source=file if config is None or isinstance(config, Mapping) else config,
        torch_dtype=dtype,
        quantization_config=None if _is_gguf(quantization_config) else quantization_config,
        key_map=rename,
    )


def config_source(config: Any, model_class: type[Model], *, subfolder: str | None = None, **where: Any) -> Any:
    """Return the config that a user names: a mapping or config object, a config.json, its folder, or a pipeline's folder.

    `where` is for `local_folder`.

    Raises:
        CheckpointError: there is none.
        ConfigError: a path that does not exist.
    """
    if isinstance(config, Mapping | model_class.config_class):
        return config
    path = Path(os.fspath(config)).expanduser()
    if path.is_file():
        return read_json(path)
    if subfolder is None and path.is_dir() and (path / CONFIG_NAME).is_file():
        return read_json(path / CONFIG_NAME)
    subfolder = subfolder or ("vae" if model_class.__name__.startswith("Autoencoder") else "transformer")
    wanted = [f"{subfolder}/{CONFIG_NAME}"]
    return read_json(local_folder(config, subfolder=subfolder, allow_patterns=wanted, **where) / CONFIG_NAME)


def _shapes(entries: Mapping[str, Any], rename: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights by our names, those that are joined in the file left out."""
    renamed: dict[str, Renamed] = {name: rename(name) for name in entries}
    return {new: entries[name].shape for name, new in renamed.items() if isinstance(new, str)}


def _is_gguf(quantization_config: Any) -> bool:
    if quantization_config is None:
        return False
    from vramkit.quant.config import GgufConfig  # noqa: PLC0415 - most files are not quantized
    from vramkit.quant.registry import as_config  # noqa: PLC0415

    return isinstance(as_config(quantization_config), GgufConfig)


def _computes_as(file: Path, torch_dtype: torch.dtype | None, quantization_config: Any) -> torch.dtype | None:
    """Return the dtype that weights compute in, which a config for GGUF may say as well."""
    if not _is_gguf(quantization_config):
        return torch_dtype
    from vramkit.quant.registry import as_config  # noqa: PLC0415

    asked: torch.dtype | None = as_config(quantization_config).torch_compute_dtype  # type: ignore[attr-defined]
    if file.suffix != ".gguf":
        raise ConfigError(f"quantization_config is one for GGUF, and {file} is no .gguf file; leave it out")
    if None not in (torch_dtype, asked) and torch_dtype != asked:
        raise ConfigError(
            f"torch_dtype={torch_dtype} and compute_dtype={asked} of the quantization_config; give one of them, or the same"
        )
    return torch_dtype or asked
