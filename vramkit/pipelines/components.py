"""The parts of a checkpoint folder: which class a model_index.json names, and how each is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vramkit.errors import CheckpointError
from vramkit.pipelines.folders import read_json
from vramkit.pipelines.registry import MODELS, SCHEDULERS, TEXT_ENCODERS, TOKENIZERS

MODEL_INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where one component lies and how it is wanted."""

    folder: Path
    name: str  # the attribute of the pipeline, and the folder's name
    library: str
    class_name: str
    torch_dtype: torch.dtype | None
    variant: str | None
    quantization_config: Any = None  # for models


def read_model_index(folder: Path) -> dict[str, Any]:
    """Read the list of a checkpoint's components; CheckpointError when it is missing or damaged."""
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MODEL_INDEX}: it is not a checkpoint in the diffusers folder layout "
            "(model_index.json, transformer/, vae/, ...); give the folder that holds that file"
        )
    return read_json(path)


def is_component(entry: object) -> bool:
    """Say whether a model_index.json value names a component: ``[library, class]``, or ``[null, null]`` for none."""
    return isinstance(entry, list) and len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)


def load_component(source: Source) -> Any:
    """Load one component, weights mapped rather than copied.

    Raises:
        CheckpointError: its folder is missing, or its class is not one that vramkit knows.
    """
    loader = _loader_of(source.class_name) if source.library in _LIBRARIES else None
    if loader is None:
        known = ", ".join(sorted(name for names, _ in _LOADERS for name in names))
        raise CheckpointError(
            f"{MODEL_INDEX} asks for {source.library}.{source.class_name} as {source.name!r}, which is not supported; "
            f"known classes: {known}. Load it yourself and pass {source.name}=... to from_pretrained"
        )
    if not source.folder.is_dir():
        raise CheckpointError(
            f"{source.folder} is missing: {MODEL_INDEX} lists {source.name!r}. Download the rest of the checkpoint, or "
            f"pass {source.name}=... to from_pretrained (None leaves it out)"
        )
    return loader(source)


def _load_model(source: Source) -> Any:
    from vramkit.pipelines.modeling import AutoModel  # noqa: PLC0415 - keeps this table free of model code

    return AutoModel.from_pretrained(
        source.folder,
        torch_dtype=source.torch_dtype,
        variant=source.variant,
        quantization_config=source.quantization_config,
    )


def _load_scheduler(source: Source) -> Any:
    module = importlib.import_module(SCHEDULERS[source.class_name])
    return getattr(module, source.class_name).from_pretrained(source.folder)


def _load_text_encoder(source: Source) -> Any:
    from vramkit.pipelines.text_encoders import load_text_encoder  # noqa: PLC0415

    return load_text_encoder(
        source.folder,
        class_name=source.class_name,
        torch_dtype=source.torch_dtype,
        variant=source.variant,
        quantization_config=source.quantization_config,
    )


def _load_tokenizer(source: Source) -> Any:
    from vramkit.pipelines.text_encoders import load_tokenizer  # noqa: PLC0415

    return load_tokenizer(source.folder)


_LIBRARIES = frozenset({"diffusers", "transformers", "vramkit"})
_LOADERS: tuple[tuple[Collection[str], Callable[[Source], Any]], ...] = (
    (MODELS, _load_model),
    (SCHEDULERS, _load_scheduler),
    (TEXT_ENCODERS, _load_text_encoder),
    (TOKENIZERS, _load_tokenizer),
)


def _loader_of(class_name: str) -> Callable[[Source], Any] | None:
    return next((loader for names, loader in _LOADERS if class_name in names), None)
