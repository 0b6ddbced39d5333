"""What all pipelines share: components loaded from a checkpoint folder, moved, offloaded and saved together."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn
from tqdm import tqdm

from vramkit import __version__
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import ModelOffload, apply_model_offload, offload_of
from vramkit.pipelines.components import MODEL_INDEX, Source, is_component, load_component, read_model_index
from vramkit.pipelines.hub import CHECKPOINT_PATTERNS, local_folder
from vramkit.pipelines.lora import LoraAdapters
from vramkit.pipelines.registry import PIPELINES

Self = TypeVar("Self", bound="Pipeline")
DtypeChoice = torch.dtype | Mapping[str, torch.dtype] | None


class Pipeline(LoraAdapters):
    """A set of named components that generate something together.

    A subclass names its components and options as the keyword parameters of ``__init__``; the names are those of
    model_index.json. Components are plain attributes: they may be replaced at any time.
    """

    component_names: ClassVar[tuple[str, ...]]  # in the order in which a call uses them
    optional: ClassVar[tuple[str, ...]] = ()  # those that a whole checkpoint may lack

    def __init__(self) -> None:
        self._progress_bar_config: dict[str, Any] = {}
        self._model_offload: ModelOffload | None = None

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_repo: str | os.PathLike[str],
        *,
        torch_dtype: DtypeChoice = None,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        quantization_config: Any = None,
        **components: Any,
    ) -> Self:
        """Load a checkpoint in the published diffusers folder layout, component by component.

        ``Pipeline.from_pretrained`` takes the class that the checkpoint names. Weights are mapped from their safetensors
        files: nothing is read before it is used. Only safetensors and JSON (and tokenizer vocabularies) are opened.

        Args:
            path_or_repo: a folder with model_index.json, or a Hugging Face repository id.
            torch_dtype: for all models, or by component name with ``"default"`` for the others. None keeps the dtypes
                of the files.
            revision: branch, tag or commit of the repository.
            variant: reads ``<name>.<variant>.safetensors``.
            cache_dir: where downloads are kept.
            quantization_config: a `PipelineQuantizationConfig`, or a config of `vramkit.quant` for every model but the VAE;
                weights are quantized as they are read.
            **components: ready components, used as they are; None leaves one out.

        Raises:
            ConfigError: an unknown component or dtype name, a path that does not exist, or a quantization that cannot
                be done.
            CheckpointError: a missing or damaged file, or a class that is not known here.
        """
        if cls is Pipeline:
            where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
            options = {"torch_dtype": torch_dtype, "variant": variant, "quantization_config": quantization_config}
            found = cls.class_of(path_or_repo, **where)
            return cast("Self", found.from_pretrained(path_or_repo, **where, **options, **components))
        _check_names("component", components, cls.component_names)
        if isinstance(torch_dtype, Mapping):
            _check_names("torch_dtype for", torch_dtype, (*cls.component_names, "default"))
        quantized: Any = {}.get
        if quantization_config is not None:
            from vramkit.quant.pipeline import as_pipeline_config  # noqa: PLC0415 - most checkpoints are loaded as they are

            quantization = as_pipeline_config(quantization_config)
            quantization.check(cls.component_names, list(components))
            quantized = quantization.config_for
        root = local_folder(path_or_repo, revision=revision, cache_dir=cache_dir, allow_patterns=[MODEL_INDEX])
        entries, options = cls._read_index(root)
        wanted = {name: entry for name, entry in entries.items() if name not in components and entry[1] is not None}
        if wanted:
            patterns = [f"{name}/{pattern}" for name in wanted for pattern in CHECKPOINT_PATTERNS]
            root = local_folder(path_or_repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
        loaded = {
            name: load_component(
                Source(
                    folder=root / name,
                    name=name,
                    library=library,
                    class_name=class_name,
                    torch_dtype=_dtype_for(name, torch_dtype),
                    variant=variant,
                    quantization_config=quantized(name),
                )
            )
            for name, (library, class_name) in wanted.items()
        }
        return cls(**(dict.fromkeys(entries) | loaded | components), **options)

    @staticmethod
    def class_of(
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> type[Pipeline]:
        """Return the pipeline class that a checkpoint is for; arguments as in `from_pretrained`.

        Raises:
            ConfigError: a path that does not exist.
            CheckpointError: no model_index.json, or the class that it names is not known here.
        """
        root = local_folder(path_or_repo, revision=revision, cache_dir=cache_dir, allow_patterns=[MODEL_INDEX])
        name = str(read_model_index(root).get("_class_name"))
        if name not in PIPELINES:
            raise CheckpointError(
                f"{root / MODEL_INDEX} names the pipeline {name!r}, which is not supported; expected one of "
                f"{', '.join(PIPELINES)}"
            )
        found: type[Pipeline] = getattr(importlib.import_module(PIPELINES[name]), name)
        return found

    @classmethod
    def _read_index(cls, root: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Split model_index.json into the entries of components and the pipeline's own options."""
        index = read_model_index(root)
        if index.get("_class_name") != cls.__name__:
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
        options = {key: value for key, value in public.items() if key not in entries}
        known = inspect.signature(cls).parameters
        unknown = [key for key in public if key not in known]
        if unknown:
            raise CheckpointError(
                f"{root / MODEL_INDEX} names {', '.join(unknown)}, which {cls.__name__} does not have"
            )
        return entries, options

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, in the order in which a call uses them; absent ones are None."""
        return {name: getattr(self, name) for name in self.component_names}

    @property
    def config(self) -> dict[str, Any]:
        """The pipeline's own options, as model_index.json holds them."""
        options = [name for name in inspect.signature(type(self)).parameters if name not in self.component_names]
        return {name: getattr(self, name) for name in options}

    @property
    def device(self) -> torch.device:
        """The device that computes: the first module's, cpu when there is none."""
        modules = self._modules()
        return execution_device(modules[0]) if modules else torch.device("cpu")

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move (and cast) the modules as ``torch.nn.Module.to`` does: ``to(device)``, ``to(dtype)``, or both.

        Offloaded modules keep their place: their weights travel by themselves.
        """
        for module in self._modules():
            if offload_of(module) is None:
                module.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """Keep every model in RAM and bring it to the device, whole, while it works; the previous one leaves first.

        Args:
            device: where the models compute; by default the GPU, which has to be there.
        """
        if device is None and not torch.cuda.is_available():
            raise ConfigError('no GPU was found: name the device, for example enable_model_cpu_offload("cpu")')
        if self._model_offload is not None:
            self._model_offload.remove()
        self._model_offload = apply_model_offload(self, device or "cuda")

    def maybe_free(self) -> None:
        """Take the model that `enable_model_cpu_offload` brought to the device off it again; calls end with this."""
        if self._model_offload is not None:
            self._model_offload.evict()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write all components and model_index.json in the published folder layout."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_vramkit_version": __version__}
        for name, component in self.components.items():
            index[name] = [None, None] if component is None else [_library_of(component), type(component).__name__]
            if component is not None:
                _save(component, root / name)
        text = json.dumps(index | self.config, indent=2)
        (root / MODEL_INDEX).write_text(text + "\n", encoding="utf-8")  # last: a folder without it is not complete

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set options of tqdm for the progress bars, for example ``disable=True`` or ``desc="denoising"``."""
        self._progress_bar_config = config

    def progress_bar(self, iterable: Iterable[Any] | None = None, *, total: int | None = None) -> Any:
        """Return a tqdm bar over ``iterable``, or one of ``total`` steps to be updated by hand."""
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def _modules(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]


def execution_device(module: nn.Module) -> torch.device:
    """Return where ``module`` computes: the onload device when it is offloaded, else where its weights lie."""
    offload = offload_of(module)
    if offload is not None:
        return offload.config.device
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _save(component: Any, folder: Path) -> None:
    """Write one component; quantized models of other libraries too, whose own way does not know our weights."""
    if getattr(component, "_vramkit_quantization", None) is not None:
        from vramkit.quant.files import save_quantized  # noqa: PLC0415

        save_quantized(component, folder)
    else:
        component.save_pretrained(folder)


def _check_names(what: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"unknown {what} {', '.join(unknown)}; expected some of {', '.join(known)}")


def _dtype_for(name: str, choice: DtypeChoice) -> torch.dtype | None:
    return choice.get(name, choice.get("default")) if isinstance(choice, Mapping) else choice


def _library_of(component: object) -> str:
    """Return the library that model_index.json names for a component: ours stand under the published name."""
    package = type(component).__module__.partition(".")[0]
    return "diffusers" if package == "vramkit" else package
