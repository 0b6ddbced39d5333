"""The calls that make a pipeline: of a checkpoint's folder, of a single file and a folder, of another pipeline."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from typing_extensions import Self

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.arguments import Dtype, device_of, dtype_of, other_arguments, wanted_dtype
from vramkit.pipelines.loading.components import (
    MODEL_INDEX,
    Source,
    component_folders,
    is_component,
    load_component,
    load_component_from,
    read_model_index,
)
from vramkit.pipelines.loading.folders import CONFIG_NAME
from vramkit.pipelines.loading.hub import DOWNLOAD, checkpoint_patterns, local_folder
from vramkit.pipelines.loading.registry import IMAGE_PIPELINES, PIPELINES, published_rest

if TYPE_CHECKING:
    from vramkit.pipelines.calling.pipeline import Pipeline

__all__ = ["CheckpointCalls", "check_names"]

DtypeChoice = Dtype | Mapping[str, Dtype] | None


class CheckpointCalls:
    """The part of a pipeline that loads one. Its class names the components and options in the signature of ``__init__``."""

    component_names: ClassVar[tuple[str, ...]]  # in the order in which a call uses them
    folders_of: ClassVar[tuple[str, ...]] = ()  # other classes whose folders this one can use as well

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: DtypeChoice = None,
        dtype: DtypeChoice = None,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device_map: Any = None,
        quantization_config: Any = None,
        **components: Any,
    ) -> Self:
        """Load a checkpoint in the published diffusers folder layout, component by component.

        ``Pipeline.from_pretrained`` takes the class that the checkpoint names. Weights are mapped from their safetensors
        files: nothing is read before it is used. Only safetensors and JSON (and tokenizer vocabularies) are opened.

        Args:
            pretrained_model_name_or_path: a folder with model_index.json, or a Hugging Face repository id.
            torch_dtype: for all models, or by component name with ``"default"`` for the others; a torch.dtype, or its name.
                None and "auto" keep the dtypes of the files.
            dtype: another name of ``torch_dtype``.
            revision: branch, tag or commit of the repository.
            variant: reads ``<name>.<variant>.safetensors``, and the plain files of models that have none of that variant
                while others have.
            cache_dir: where downloads are kept.
            token: for gated and private repositories; by default the one of ``hf auth login``.
            local_files_only: take what was downloaded before, and ask nothing of the network.
            force_download: download again what is there already.
            device_map: one device, where the models are put; plans over several are refused.
            quantization_config: a `PipelineQuantizationConfig`, or a config of `vramkit.quant` for every model but the VAE;
                weights are quantized as they are read.
            **components: ready components, of vramkit, transformers or diffusers, whose models become ours around the same
                weights; paths of their folders, or of single files of models (``text_encoder="t5xxl.safetensors"``); None
                leaves one out. Also other arguments of diffusers: those that change nothing here, such as
                ``low_cpu_mem_usage``, are passed over, others refused.

        Raises:
            ConfigError: an unknown component or dtype name, a path that does not exist, or a quantization that cannot
                be done.
            CheckpointError: a missing or damaged file, or a class that is not known here.
        """
        where: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        torch_dtype = wanted_dtype(dtype, torch_dtype)
        if not hasattr(cls, "component_names"):  # the base of all
            found: Any = cls.class_of(pretrained_model_name_or_path, **where)
            chosen = {"torch_dtype": torch_dtype, "variant": variant, "device_map": device_map}
            return cast(
                "Self",
                found.from_pretrained(
                    pretrained_model_name_or_path,
                    **where,
                    **chosen,
                    quantization_config=quantization_config,
                    **components,
                ),
            )
        components = other_arguments(f"{cls.__name__}.from_pretrained", components)
        device = device_of(device_map)
        check_names("component", components, cls.component_names)
        paths = {name: value for name, value in components.items() if isinstance(value, str | os.PathLike)}
        if isinstance(torch_dtype, Mapping):
            check_names("torch_dtype for", torch_dtype, (*cls.component_names, "default"))
        dtypes = {name: _dtype_for(name, torch_dtype) for name in cls.component_names}
        quantized: Any = {}.get
        if quantization_config is not None:
            from vramkit.quant.pipeline import as_pipeline_config  # noqa: PLC0415 - most checkpoints are loaded as they are

            quantization = as_pipeline_config(quantization_config)
            quantization.check(cls.component_names, [name for name in components if name not in paths])
            quantized = quantization.config_for
        root = local_folder(pretrained_model_name_or_path, **where, allow_patterns=[MODEL_INDEX])
        entries, options = cls._read_index(root)
        needed = [name for name, each in inspect.signature(cls).parameters.items() if each.default is each.empty]
        if missing := [name for name in needed if name not in (*entries, *options, *components)]:
            raise CheckpointError(
                f"{root / MODEL_INDEX} does not list {', '.join(missing)}; give {missing[0]}=..., or None to do without"
            )
        wanted = {name: entry for name, entry in entries.items() if name not in components and entry[1] is not None}
        variants = dict.fromkeys(wanted, variant)
        if wanted:
            fetch = partial(local_folder, pretrained_model_name_or_path, **where)
            root, variants = component_folders(fetch, {name: entry[1] for name, entry in wanted.items()}, variant)
        if unknown := [name for name in paths if not any(entries.get(name, ()))]:
            raise ConfigError(
                f"{unknown[0]}={str(paths[unknown[0]])!r}: {root / MODEL_INDEX} names no class for it; load it, and give "
                "what was loaded"
            )
        if paths:
            root = local_folder(
                pretrained_model_name_or_path, **where, allow_patterns=[f"{name}/{CONFIG_NAME}" for name in paths]
            )

        def source(name: str) -> Source:
            library, class_name = entries[name]
            return Source(
                folder=root / name,
                name=name,
                library=library,
                class_name=class_name,
                torch_dtype=dtypes[name],
                variant=variants.get(name),
                quantization_config=quantized(name),
            )

        loaded = {name: load_component(source(name)) for name in wanted}
        download = {name: value for name, value in where.items() if name != "revision"}
        components |= {name: load_component_from(path, source(name), **download) for name, path in paths.items()}
        pipeline: Any = cls(**(dict.fromkeys(entries) | loaded | components), **options)
        pipeline.name_or_path = os.fspath(pretrained_model_name_or_path)
        return cast("Self", pipeline if device is None else pipeline.to(device))

    @classmethod
    def from_pipe(
        cls, pipeline: Any, *, dtype: DtypeChoice = None, torch_dtype: DtypeChoice = None, **changed: Any
    ) -> Self:
        """Make a pipeline around the components of another one, which both go on using.

        For a call of another kind with the same models, or, with a ``scheduler`` of its own, for another thread.

        Args:
            pipeline: has components and options that this class knows.
            dtype: what the models are cast to; they keep their dtypes without it (those of diffusers become float32).
            torch_dtype: another name of ``dtype``.
            **changed: components and options that are others here.

        Raises:
            ConfigError: an unknown name, or a component that the other pipeline does not have.
        """
        if not all(hasattr(pipeline, name) for name in ("components", "config")):
            raise ConfigError(f"{cls.__name__}.from_pipe: got a {type(pipeline).__name__}; expected a pipeline")
        known = inspect.signature(cls).parameters
        check_names("component or option", changed, (*known,))
        options = {name: value for name, value in pipeline.config.items() if name not in cls.component_names}
        given = {name: value for name, value in (pipeline.components | options | changed).items() if name in known}
        if missing := [name for name, each in known.items() if each.default is each.empty and name not in given]:
            raise ConfigError(
                f"{cls.__name__}.from_pipe: {type(pipeline).__name__} has no {', '.join(missing)}; give "
                f"{missing[0]}=..., or None to do without"
            )
        made: Any = cls(**given)
        made._model_offload = getattr(  # noqa: SLF001 - so that its calls, too, end with an empty device
            pipeline, "_model_offload", None
        )
        wanted = wanted_dtype(dtype, torch_dtype)
        return cast("Self", made if wanted is None else made.to(dtype=_dtype_for("", wanted)))

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        torch_dtype: DtypeChoice = None,
        dtype: DtypeChoice = None,
        revision: str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> Self:
        """Load a pipeline whose transformer, and autoencoder if it is there too, are in one file, and the rest in a folder.

        Args:
            pretrained_model_link_or_path: a .safetensors or .gguf file, as in `Model.from_single_file`.
            config: the folder or repository that the rest, and the configs, are read from; by default the published one.
            torch_dtype: as in `from_pretrained`.
            dtype: another name of ``torch_dtype``.
            revision: of the file, where it is on the hub.
            device_map: one device.
            quantization_config: for the models in the file, as in `Model.from_single_file`.
            **others: how files are downloaded, and components, as in `from_pretrained`.

        Raises:
            ConfigError, CheckpointError: as in `from_pretrained` and `Model.from_single_file`.
        """
        if config is None and published_rest(cls.__name__, {}) is None:
            raise ConfigError(
                f"from_single_file of {cls.__name__}: use the class of the family, such as WanPipeline, or say by config= "
                "where the rest is (a folder or repository)"
            )
        from vramkit.pipelines.loading.auto_model import AutoModel  # noqa: PLC0415
        from vramkit.pipelines.loading.hub import local_file  # noqa: PLC0415 - most pipelines are folders
        from vramkit.pipelines.loading.single_file import classes_in  # noqa: PLC0415
        from vramkit.pipelines.loading.told_configs import tells  # noqa: PLC0415

        components = other_arguments(f"{cls.__name__}.from_single_file", others)
        where = {name: components.pop(name) for name in ("cache_dir", *DOWNLOAD) if name in components}
        check_names("component", components, cls.component_names)
        dtypes = wanted_dtype(dtype, torch_dtype)
        file = local_file(pretrained_model_link_or_path, revision=revision, **where)
        if not (classes := classes_in(file)):
            raise CheckpointError(f"{file} holds no transformer and no autoencoder under names that are known")
        parts = {"vae" if name.startswith("Autoencoder") else "transformer": name for name in classes}

        def rest(told: Any) -> Any:  # which variant it is of, the transformer tells
            return config or published_rest(cls.__name__, told)

        for name in ("transformer", "vae"):
            if name not in parts or name in components:
                continue
            told = getattr(components.get("transformer"), "config", None)
            components[name] = AutoModel.class_named(parts[name], source=file).from_single_file(
                file,
                config=config if told is None or tells(parts[name]) else rest(told),
                torch_dtype=_dtype_for(name, dtypes),
                quantization_config=quantization_config if name == "transformer" else None,
                **where,
            )
        source = rest(getattr(components.get("transformer"), "config", {}))
        return cls.from_pretrained(source, torch_dtype=dtypes, device_map=device_map, **where, **components)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **where: Any) -> Path:
        """Download a checkpoint and return its folder; where it is, by the arguments of `from_pretrained`."""
        where = other_arguments(f"{cls.__name__}.download", where)
        return local_folder(
            pretrained_model_name, **where, allow_patterns=[MODEL_INDEX, *(f"*/{p}" for p in checkpoint_patterns())]
        )

    @staticmethod
    def class_of(path_or_repo: str | os.PathLike[str], **where: Any) -> type[Pipeline]:
        """Return the pipeline class that a checkpoint is for; where it is, by the arguments of `from_pretrained`.

        Raises:
            ConfigError: a path that does not exist.
            CheckpointError: no model_index.json, or the class that it names is not known here.
        """
        root = local_folder(path_or_repo, **where, allow_patterns=[MODEL_INDEX])
        name = str(read_model_index(root).get("_class_name"))
        if name not in PIPELINES:
            raise CheckpointError(
                f"{root / MODEL_INDEX} names the pipeline {name!r}, which is not supported; expected one of "
                f"{', '.join(PIPELINES)}"
            )
        found: type[Pipeline] = getattr(importlib.import_module(PIPELINES[name]), name)
        return found

    @classmethod
    def with_image(cls) -> type[Pipeline]:
        """Return the class that makes clips of an image with the folders of this one: itself, if there is no other."""
        name = IMAGE_PIPELINES.get(cls.__name__, cls.__name__)
        found: type[Pipeline] = getattr(importlib.import_module(PIPELINES[name]), name)
        return found

    @classmethod
    def _read_index(cls, root: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Split model_index.json into the entries of components and the pipeline's own options."""
        index = read_model_index(root)
        if index.get("_class_name") not in (cls.__name__, *cls.folders_of):
            raise CheckpointError(
                f"{root} is a checkpoint of {index.get('_class_name')}, not of {cls.__name__}: use the pipeline class "
                "that it names"
            )
        public = {key: value for key, value in index.items() if not key.startswith("_")}
        entries = {key: value for key, value in public.items() if is_component(value) or key in cls.component_names}
        if damaged := [key for key, value in entries.items() if not is_component(value)]:
            raise CheckpointError(
                f"{root / MODEL_INDEX}: {damaged[0]} is {index[damaged[0]]!r}, expected [library, class]"
            )
        known = inspect.signature(cls).parameters
        if odd := [key for key in entries if key in known and key not in cls.component_names]:
            raise CheckpointError(f"{root / MODEL_INDEX}: {odd[0]} is {index[odd[0]]!r}, and it is an option")
        unknown = {key: value for key, value in public.items() if key not in known}
        if needed := [key for key in unknown if key in entries and entries[key][1] is not None]:
            raise CheckpointError(f"{root / MODEL_INDEX} names {', '.join(needed)}, which {cls.__name__} does not have")
        if unknown:
            named = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
            warnings.warn(f"{root / MODEL_INDEX}: {cls.__name__} does not know {named}; passed over", stacklevel=4)
        options = {key: value for key, value in public.items() if key not in entries and key in known}
        return {key: value for key, value in entries.items() if key in known}, options


def check_names(what: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise ConfigError for names that are not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"unknown {what} {', '.join(unknown)}; expected some of {', '.join(known)}")


def _dtype_for(name: str, choice: DtypeChoice) -> torch.dtype | None:
    return dtype_of(choice.get(name, choice.get("default")) if isinstance(choice, Mapping) else choice)
