"""The parts of a checkpoint folder: which class a model_index.json names, and how each is loaded."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.folders import CONFIG_NAME, has_variant, read_json
from vramkit.pipelines.loading.hub import checkpoint_patterns
from vramkit.pipelines.loading.registry import (
    IMAGE_ENCODERS,
    IMAGE_PROCESSORS,
    MODELS,
    SCHEDULERS,
    TEXT_ENCODERS,
    TOKENIZERS,
)

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


def component_folders(
    fetch: Callable[..., Path], classes: Mapping[str, str], variant: str | None
) -> tuple[Path, dict[str, str | None]]:
    """Have the folders of components here, each with the weights of one variant, and say by name which one that is.

    Args:
        fetch: called with ``allow_patterns=[...]``, returns the checkpoint's folder with at least those files.
        classes: component name -> published class name.
        variant: of the weights; models that have none of it are read as they are, if others have.

    Raises:
        CheckpointError: no model has weights of the variant.
    """
    root = fetch(allow_patterns=_in_folders(classes, checkpoint_patterns(variant)))
    models = [name for name, kind in classes.items() if kind not in SCHEDULERS and kind not in TOKENIZERS]
    plain = [] if variant is None else [name for name in models if not has_variant(root / name, variant)]
    if not plain:
        return root, dict.fromkeys(classes, variant)
    if len(plain) == len(models):
        raise CheckpointError(
            f"{root} has no weights of variant {variant!r} in {', '.join(models)}; leave variant out for those that it has"
        )
    root = fetch(allow_patterns=_in_folders(plain, checkpoint_patterns()))
    return root, {name: None if name in plain else variant for name in classes}


def _in_folders(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [f"{name}/{pattern}" for name in names for pattern in patterns]


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


def load_component_from(path_or_url: str | os.PathLike[str], source: Source, **where: Any) -> Any:
    """Load one component from elsewhere than its checkpoint: a folder, or one file of a model, here or on the hub.

    The config of a file is that in the folder of `source` if there is one, else it is told from the shapes. `where` is for
    `local_file`.

    Raises:
        ConfigError: a path that does not exist, or a component that is no model.
        CheckpointError: a damaged file, or one of another model.
    """
    path = Path(path_or_url).expanduser()
    if path.is_dir():
        return load_component(dataclasses.replace(source, folder=path, variant=None))
    config = source.folder if (source.folder / CONFIG_NAME).is_file() else None
    options: dict[str, Any] = {
        "config": config,
        "torch_dtype": source.torch_dtype,
        "quantization_config": source.quantization_config,
        **where,
    }
    if source.class_name in MODELS:
        from vramkit.pipelines.loading.auto_model import AutoModel  # noqa: PLC0415

        return AutoModel.class_named(source.class_name).from_single_file(path_or_url, **options)
    if source.class_name in TEXT_ENCODERS | IMAGE_ENCODERS:
        from vramkit.pipelines.loading.text_encoders import load_encoder_file  # noqa: PLC0415

        return load_encoder_file(path_or_url, class_name=source.class_name, **options)
    raise ConfigError(
        f"{source.name}={os.fspath(path_or_url)!r} is no folder, and single files are read of models only: load it, and "
        "give what was loaded"
    )


def _load_model(source: Source) -> Any:
    from vramkit.pipelines.loading.auto_model import AutoModel  # noqa: PLC0415 - keeps this table free of model code

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
    from vramkit.pipelines.loading.text_encoders import load_text_encoder  # noqa: PLC0415

    return load_text_encoder(
        source.folder,
        class_name=source.class_name,
        torch_dtype=source.torch_dtype,
        variant=source.variant,
        quantization_config=source.quantization_config,
    )


def _load_tokenizer(source: Source) -> Any:
    from vramkit.pipelines.loading.text_encoders import load_tokenizer  # noqa: PLC0415

    return load_tokenizer(source.folder, class_name=source.class_name)


def _load_image_processor(source: Source) -> Any:
    from vramkit.pipelines.loading.text_encoders import load_image_processor  # noqa: PLC0415

    return load_image_processor(source.folder, class_name=source.class_name)


_LIBRARIES = frozenset({"diffusers", "transformers", "vramkit"})
_LOADERS: tuple[tuple[Collection[str], Callable[[Source], Any]], ...] = (
    (MODELS, _load_model),
    (SCHEDULERS, _load_scheduler),
    (TEXT_ENCODERS | IMAGE_ENCODERS, _load_text_encoder),
    (IMAGE_PROCESSORS, _load_image_processor),
    (TOKENIZERS, _load_tokenizer),
)


def _loader_of(class_name: str) -> Callable[[Source], Any] | None:
    return next((loader for names, loader in _LOADERS if class_name in names), None)
