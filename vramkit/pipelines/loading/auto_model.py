"""Whichever model a folder or a file holds."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.arguments import Dtype, device_of, download_arguments, dtype_of, wanted_dtype
from vramkit.pipelines.loading.folders import CONFIG_NAME, read_json
from vramkit.pipelines.loading.hub import DOWNLOAD, local_file, local_folder
from vramkit.pipelines.loading.modeling import Model
from vramkit.pipelines.loading.registry import MODELS

__all__ = ["AutoModel"]


class AutoModel:
    """Loads whichever model a folder holds."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_or_path: str | Path, *, subfolder: str | None = None, **options: Any
    ) -> Model:
        """Load a model by the `_class_name` in its config.json; options as in `Model.from_pretrained`.

        Raises:
            CheckpointError: no config.json, or one without a class name.
            ConfigError: a class that vramkit does not have.
        """
        where = {name: options[name] for name in ("revision", "cache_dir", *DOWNLOAD) if name in options}
        config_only = [f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME]
        path = (
            local_folder(pretrained_model_or_path, subfolder=subfolder, allow_patterns=config_only, **where)
            / CONFIG_NAME
        )
        model_class = cls.class_named(read_json(path).get("_class_name"), source=path)
        return model_class.from_pretrained(pretrained_model_or_path, subfolder=subfolder, **options)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike[str], **options: Any
    ) -> nn.Module:
        """Load the model that a file holds, the transformer where there are several; options as `Model.from_single_file`.

        Files of text and image encoders give those of transformers: T5, UMT5, Llama and both halves of CLIP.

        Raises:
            CheckpointError: a damaged file, or one of no model that vramkit knows.
        """
        from vramkit.pipelines.loading.single_file import classes_in  # noqa: PLC0415

        where = {name: options[name] for name in ("revision", "cache_dir", *DOWNLOAD) if name in options}
        file = local_file(pretrained_model_link_or_path_or_dict, **where)
        if found := classes_in(file):
            return cls.class_named(found[0], source=file).from_single_file(file, **options)
        return _encoder(file, **options)

    @staticmethod
    def class_named(name: Any, *, source: Path | str = "the config") -> type[Model]:
        """The class here of a published class name."""
        if name is None:
            raise CheckpointError(f"{source}: no _class_name, so the model is unknown; load it through its own class")
        if not isinstance(name, str) or name not in MODELS:
            raise ConfigError(f"{source}: _class_name {name!r} is not supported, expected one of {sorted(MODELS)}")
        model_class: type[Model] = getattr(importlib.import_module(MODELS[name]), name)
        return model_class


def _encoder(
    file: Path,
    *,
    config: Any = None,
    torch_dtype: Dtype | None = None,
    dtype: Dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    **others: Any,
) -> nn.Module:
    """Load an encoder, by the arguments of `Model.from_single_file`; the file is here."""
    from vramkit.pipelines.loading.text_encoders import load_encoder_file  # noqa: PLC0415

    download_arguments("AutoModel.from_single_file", others, known=("revision", "cache_dir"))
    device = device_of(device_map)
    model = load_encoder_file(
        file,
        config=config if config is None or isinstance(config, Mapping) else Path(config).expanduser(),
        torch_dtype=dtype_of(wanted_dtype(dtype, torch_dtype)),
        quantization_config=quantization_config,
    )
    return model if device is None else model.to(device)
