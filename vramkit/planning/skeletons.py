"""Pipelines without weights: from the configs of a checkpoint, or of a model that is known by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.calling.pipeline import Pipeline
from vramkit.pipelines.loading.components import is_component, read_model_index
from vramkit.pipelines.loading.folders import read_json
from vramkit.pipelines.loading.hub import local_folder
from vramkit.pipelines.loading.registry import (
    IMAGE_ENCODERS,
    IMAGE_PROCESSORS,
    MODELS,
    SCHEDULERS,
    TEXT_ENCODERS,
    TOKENIZERS,
)
from vramkit.pipelines.loading.text_encoders import VOCABULARIES, load_image_processor, load_tokenizer, unfilled
from vramkit.pipelines.loading.weights import MOST_PARAMETERS

__all__ = ["known_models", "skeleton_of"]

_MODELS = Path(__file__).parent / "models.json"
_CONFIGS = ("*.json", "*.txt", "*.model")  # and vocabularies; never weights


def known_models() -> dict[str, dict[str, Any]]:
    """Return the configs of models that are known by name."""
    models: dict[str, dict[str, Any]] = json.loads(_MODELS.read_text(encoding="utf-8"))
    return models


def skeleton_of(model: str | os.PathLike[str], *, dtype: torch.dtype, with_image: bool = False) -> Any:
    """Return a pipeline of ours whose models have no memory.

    Args:
        model: a known name such as ``"wan2.1-14b"``, a checkpoint folder, or a Hugging Face repository, of which configs and
            vocabularies are read and no weights.
        dtype: of its models; an autoencoder that loses detail in 16 bits is float32.
        with_image: take the pipeline that makes clips of an image, where the folder of another one is its as well.

    Raises:
        ConfigError: a name that nobody knows; names the near ones.
        CheckpointError: a folder that does not hold a checkpoint, or one of a family that is not known here.
    """
    known = known_models()
    name = os.fspath(model)
    if name.lower() in known:
        return _of_configs(known[name.lower()], dtype, with_image)
    if not isinstance(model, os.PathLike) and "/" not in name and os.sep not in name and not Path(name).is_dir():
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4) or sorted(known)
        raise ConfigError(
            f"{name!r} is no known model and no folder; near ones are {', '.join(near)}. Give one of {', '.join(known)}, a "
            "checkpoint folder, or a Hugging Face repository (owner/name)"
        )
    return _of_folder(model, dtype, with_image)


def _of_configs(configs: Mapping[str, Any], dtype: torch.dtype, with_image: bool) -> Any:
    kind = _pipeline_class(str(configs["pipeline"]))
    kind = kind.with_image() if with_image else kind
    parts: dict[str, Any] = {}
    for name, config in configs.items():
        if name == "pipeline":
            continue
        if not isinstance(config, dict):
            parts[name] = config  # an option of the pipeline
            continue
        options = dict(config)
        class_name = options.pop("class")
        if class_name in SCHEDULERS:
            parts[name] = getattr(importlib.import_module(SCHEDULERS[class_name]), class_name).from_config(options)
        else:
            parts[name] = _model(class_name, options, _dtype_of(kind, name, dtype), source=_MODELS)
        if name.startswith("text_encoder"):
            parts[name.replace("text_encoder", "tokenizer")] = _LongestTexts()
    return kind(**parts)


def _of_folder(model: str | os.PathLike[str], dtype: torch.dtype, with_image: bool) -> Any:
    patterns = [*_CONFIGS, *(f"*/{pattern}" for pattern in _CONFIGS)]
    root = local_folder(model, allow_patterns=patterns)
    kind: Any = Pipeline.class_of(root)
    kind = kind.with_image() if with_image else kind
    parts: dict[str, Any] = {}
    options: dict[str, Any] = {}
    entries = {name: entry for name, entry in read_model_index(root).items() if not name.startswith("_")}
    needed = [name for name, each in inspect.signature(kind).parameters.items() if each.default is each.empty]
    if missing := [name for name in needed if not is_component(entries.get(name))]:
        raise CheckpointError(f"{root} does not list {', '.join(missing)} as [library, class] in its model_index.json")
    for name, entry in entries.items():
        if not is_component(entry):
            options[name] = entry
            continue
        class_name = entry[1]
        parts[name] = None if class_name is None else _part(root / name, class_name, _dtype_of(kind, name, dtype))
    return kind(**parts, **options)


def _part(folder: Path, class_name: str, dtype: torch.dtype) -> Any:
    if class_name in SCHEDULERS:
        return getattr(importlib.import_module(SCHEDULERS[class_name]), class_name).from_pretrained(folder)
    if class_name in TOKENIZERS:
        has_words = any((folder / name).is_file() for name in VOCABULARIES)
        return load_tokenizer(folder) if has_words else _LongestTexts()
    if class_name in IMAGE_PROCESSORS:
        return load_image_processor(folder, class_name=class_name)
    if class_name not in MODELS.keys() | TEXT_ENCODERS | IMAGE_ENCODERS:
        raise CheckpointError(f"{folder.parent} names {class_name} as {folder.name!r}, which is not supported")
    source = folder / "config.json"
    config = read_json(source)
    config.pop("quantization_config", None)
    return _model(class_name, config, dtype, source=source)


def _pipeline_class(name: str) -> Any:
    from vramkit.pipelines.loading.registry import PIPELINES  # noqa: PLC0415 - beside its one use

    return getattr(importlib.import_module(PIPELINES[name]), name)


def _dtype_of(kind: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name == "vae" and kind.vae_in_fp32 else dtype


def _model(class_name: str, config: Mapping[str, Any], dtype: torch.dtype, *, source: Path) -> nn.Module:
    """Build a model with its parameters on the meta device, in `dtype` but for those that stay fp32."""
    if class_name in MODELS:
        kind: Any = getattr(importlib.import_module(MODELS[class_name]), class_name)
        model: nn.Module = kind.described_by(config, source=source, most=MOST_PARAMETERS)
    else:
        model = unfilled(class_name, config, source=source, most=MOST_PARAMETERS)
    kept = getattr(model, "_keep_in_fp32", ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(fragment in name for fragment in kept):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(requires_grad=False)


class _LongestTexts:
    """Stands for a tokenizer that is not there: every text is as long as it may be."""

    model_max_length = 77

    def __call__(self, texts: list[str], *, max_length: int = 77, **_options: Any) -> SimpleNamespace:
        """Return ids and mask [texts, max_length], all ones."""
        ones = torch.ones(len(texts), max_length, dtype=torch.int64)
        return SimpleNamespace(input_ids=ones, attention_mask=ones.clone())
