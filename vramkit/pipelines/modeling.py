"""The base of the models: a config, files, and the two memory options by their usual names."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from vramkit.errors import CheckpointError, ConfigError, ConflictError
from vramkit.pipelines.folders import read_json, weights_files
from vramkit.pipelines.options import make_options
from vramkit.pipelines.registry import MODELS
from vramkit.tensors import is_plain

__all__ = ["AutoModel", "Model"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"


class Model(nn.Module):
    """An nn.Module with a published config.

    A subclass sets `config_class`, a frozen dataclass that lists the keys of the published config.json, and takes one as the
    only argument of its constructor. It must be constructible on the meta device: nothing is computed from weights, and
    tables are made at the first forward.
    """

    config_class: ClassVar[type[Any]]
    # Keys of older config files that have no effect any more.
    old_config_keys: ClassVar[tuple[str, ...]] = ()
    # Fragments of the names of parameters that stay fp32 when a lower torch_dtype is asked for.
    _keep_in_fp32: ClassVar[tuple[str, ...]] = ()
    # Fragments of the names of modules that layerwise casting leaves alone.
    skip_layerwise_casting: ClassVar[tuple[str, ...]] = ()
    # The same for quantization, beside those and embeddings, norms, modulation and heads.
    skip_quantization: ClassVar[tuple[str, ...]] = ()

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__}: got a config of type {type(config).__name__}, expected "
                f"{self.config_class.__name__}; use {type(self).__name__}.from_config(dict)"
            )
        self.config = config

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """A model with random weights, from a config object or from the dict of a config.json.

        Raises:
            ConfigError: keys that the model does not know, or values of another kind; keys that start with "_" and those of
                older files are ignored.
        """
        if not isinstance(config, Mapping):
            return cls(config)
        given = {
            key: value for key, value in config.items() if not key.startswith("_") and key not in cls.old_config_keys
        }
        return cls(make_options(cls.config_class, given, owner=cls.__name__))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        quantization_config: Any = None,
    ) -> Self:
        """Load a model from a folder in the diffusers layout, on disk or on the hub; weights are mapped, not copied.

        Args:
            path_or_repo: a folder, or a repo id of the Hugging Face hub.
            subfolder: folder of the component inside it, such as "transformer".
            torch_dtype: floating dtype of the weights; None keeps what the file holds. Parameters that the model keeps in
                fp32 stay fp32.
            variant: as in diffusion_pytorch_model.<variant>.safetensors.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept; by default the shared Hugging Face cache.
            quantization_config: how weights are quantized as they are read (see `vramkit.quant`). A folder that
                `save_quantized` wrote says so itself.

        Returns:
            The model in eval mode, on the CPU, its parameters frozen.

        Raises:
            CheckpointError: no config or no safetensors in the folder, or they do not fit the model.
            ConfigError: config keys that the model does not know, or a quantization that cannot be done.
        """
        from vramkit.pipelines.hub import local_folder  # noqa: PLC0415

        folder = local_folder(path_or_repo, subfolder=subfolder, revision=revision, cache_dir=cache_dir)
        config, files = read_json(folder / CONFIG_NAME), weights_files(folder, stem=WEIGHTS_NAME, variant=variant)
        saved = config.pop("quantization_config", None)
        try:
            with torch.device("meta"):
                model = cls.from_config(config)
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{folder / CONFIG_NAME} does not describe a {cls.__name__}: {error}") from error
        keep = cls._keep_in_fp32 if torch_dtype is not None else ()
        load_weights(model, files, saved, quantization_config, dtype=torch_dtype, keep_fp32=keep)
        return model.eval().requires_grad_(requires_grad=False)

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "10GB") -> None:
        """Write config.json and safetensors, in the layout that from_pretrained reads.

        Args:
            folder: made if it is missing.
            max_shard_size: bytes, or text such as "10GB"; a larger model is split and gets an index.

        Raises:
            ConflictError: LoRA adapters are loaded, with which the layers have other names.
        """
        from huggingface_hub import save_torch_state_dict  # noqa: PLC0415

        if any(hasattr(part, "base_layer") for part in self.modules()):
            raise ConflictError(
                f"{type(self).__name__} carries LoRA adapters, which its files have no place for: unload_lora_weights() "
                "before saving, after fuse_lora() if they are to be in the weights"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(not is_plain(parameter) for parameter in self.parameters()):
            from vramkit.quant.files import save_quantized  # noqa: PLC0415

            save_quantized(self, folder, max_shard_size=max_shard_size)
            return
        config = {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_torch_state_dict(
            self.state_dict(),
            folder,
            filename_pattern=f"{WEIGHTS_NAME}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
        )

    # -- properties ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the weights, those that stay fp32 left out."""
        return self._first_weight().dtype

    @property
    def quantization_skip_modules(self) -> tuple[str, ...]:
        """Patterns of the modules that `vramkit.quant.quantize` leaves alone unless it is told others."""
        from vramkit.casting.api import DEFAULT_SKIP_PATTERNS  # noqa: PLC0415

        return tuple(dict.fromkeys((*self.skip_layerwise_casting, *self.skip_quantization, *DEFAULT_SKIP_PATTERNS)))

    @property
    def device(self) -> torch.device:
        """Where the weights rest."""
        return self._first_weight().device

    def _first_weight(self) -> Tensor:
        weights = [(name, p) for name, p in self.named_parameters() if p.is_floating_point()]
        free = (p for name, p in weights if not any(fragment in name for fragment in self._keep_in_fp32))
        return next(free, weights[0][1])

    # -- memory options ------------------------------------------------------------------------------------------------

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        **options: Any,
    ) -> Any:
        """Stream the weights through a small window: `vramkit.offload.apply_group_offloading` on this model.

        Returns its handle.
        """
        from vramkit.offload import apply_group_offloading  # noqa: PLC0415

        return apply_group_offloading(
            self, onload_device, offload_device=offload_device, offload_type=offload_type, **options
        )

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Any:
        """Store the weights of large layers in fp8: `vramkit.casting.apply_layerwise_casting` on this model.

        The layers that this model needs exact are skipped; `skip_modules_pattern` replaces that list. compute_dtype is the
        dtype of the model if it is None.
        """
        from vramkit.casting import apply_layerwise_casting  # noqa: PLC0415

        options.setdefault("skip_modules_pattern", self.skip_layerwise_casting)
        return apply_layerwise_casting(
            self, storage_dtype=storage_dtype, compute_dtype=compute_dtype or self.dtype, **options
        )


def load_weights(model: nn.Module, files: Any, saved: Any, quantization_config: Any, **options: Any) -> None:
    """Give a model on the meta device its weights: as they are, quantized as they are read, or as they were saved.

    Args:
        model: to be filled.
        files: of its weights, as in `load_mapped`.
        saved: the ``quantization_config`` in its config.json, or None.
        quantization_config: what the user asks for, or None.
        **options: for `load_mapped`.

    Raises:
        ConfigError: quantization is asked for, and the weights are quantized already.
        CheckpointError: the files do not fit.
    """
    if saved is None and quantization_config is None:
        from vramkit.offload import load_mapped  # noqa: PLC0415 - the engine is needed only once weights are

        load_mapped(model, files, **options)
        return
    from vramkit.quant.files import load_quantized, load_quantizing  # noqa: PLC0415

    if saved is None:
        load_quantizing(model, files, quantization_config, **options)
    elif quantization_config is None:
        load_quantized(model, files, saved, **options)
    else:
        raise ConfigError(
            f"quantization_config was given for {type(model).__name__}, whose files are quantized already "
            f"({saved.get('backend', saved.get('quant_method'))}); leave it out, or load the original checkpoint"
        )


class AutoModel:
    """Loads whichever model a folder holds."""

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, *, subfolder: str | None = None, **options: Any) -> Model:
        """Load a model by the `_class_name` in its config.json; options as in `Model.from_pretrained`.

        Raises:
            CheckpointError: no config.json, or one without a class name.
            ConfigError: a class that vramkit does not have.
        """
        from vramkit.pipelines.hub import local_folder  # noqa: PLC0415

        where = {name: options[name] for name in ("revision", "cache_dir") if name in options}
        path = local_folder(path_or_repo, subfolder=subfolder, **where) / CONFIG_NAME
        model_class = cls.class_named(read_json(path).get("_class_name"), source=path)
        return model_class.from_pretrained(path_or_repo, subfolder=subfolder, **options)

    @staticmethod
    def class_named(name: str | None, *, source: Path | str = "the config") -> type[Model]:
        """The class here of a published class name."""
        if name is None:
            raise CheckpointError(f"{source}: no _class_name, so the model is unknown; load it through its own class")
        if name not in MODELS:
            raise ConfigError(f"{source}: _class_name {name!r} is not supported, expected one of {sorted(MODELS)}")
        model_class: type[Model] = getattr(importlib.import_module(MODELS[name]), name)
        return model_class
