"""The base of the models: a config, files, and the two memory options by their usual names."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from vramkit.errors import CheckpointError, ConfigError, ConflictError
from vramkit.memory import tensor_bytes
from vramkit.pipelines.loading.absent import Absent
from vramkit.pipelines.loading.arguments import (
    Dtype,
    device_of,
    download_arguments,
    dtype_of,
    saving_arguments,
    wanted_dtype,
)
from vramkit.pipelines.loading.folders import CONFIG_NAME, WEIGHTS_NAME, read_json, weights_files
from vramkit.pipelines.loading.options import make_options
from vramkit.pipelines.loading.weights import load_weights, most_parameters
from vramkit.tensors import is_plain

if TYPE_CHECKING:
    from vramkit.offload.mapped import KeyMap

__all__ = ["Model", "refuse_adapters"]

_ADAPTERS = "adapters are calls of the pipeline: pipeline.load_lora_weights(...), set_adapters(...) and the like"
_BACKENDS = (
    "attention is torch's scaled_dot_product_attention, which takes the fastest kernel; `with "
    "torch.nn.attention.sdpa_kernel(...):` around the call chooses another"
)


class Model(nn.Module):
    """An nn.Module with a published config.

    A subclass sets `config_class`, a frozen dataclass that lists the keys of the published config.json, and takes one as the
    only argument of its constructor. It must be constructible with parameters on the meta device: nothing is computed from
    them.
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
    def from_config(cls, config: Any, **changed: Any) -> Self:
        """A model with random weights, from a config object or from the dict of a config.json, some options `changed`.

        Raises:
            ConfigError: keys that the model does not know, or values of another kind; keys that start with "_" and those of
                older files are ignored.
        """
        if isinstance(config, cls.config_class) and changed:
            config = dataclasses.asdict(config)
        if not isinstance(config, Mapping):
            return cls(config)
        config = {**config, **changed}
        given = {
            key: value for key, value in config.items() if not key.startswith("_") and key not in cls.old_config_keys
        }
        return cls(make_options(cls.config_class, given, owner=cls.__name__))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: Dtype | None = None,
        dtype: Dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> Self:
        """Load a model from a folder in the diffusers layout, on disk or on the hub; weights are mapped, not copied.

        Args:
            pretrained_model_name_or_path: a folder, or a repo id of the Hugging Face hub.
            subfolder: folder of the component inside it, such as "transformer".
            torch_dtype: floating dtype of the weights, or its name; None and "auto" keep what the file holds, or
                make it the dtype of most where it mixes them, with a warning. Parameters that the model keeps in fp32 stay
                fp32.
            dtype: another name of ``torch_dtype``.
            variant: as in diffusion_pytorch_model.<variant>.safetensors.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept; by default the shared Hugging Face cache.
            device_map: one device, where the model is put; plans over several are refused.
            quantization_config: how weights are quantized as they are read (see `vramkit.quant`). A folder that
                `save_quantized` wrote says so itself.
            **others: ``token``, ``local_files_only`` and ``force_download``, as huggingface_hub takes them. Arguments of
                diffusers that change nothing here, such as ``low_cpu_mem_usage``, are passed over, others refused.

        Returns:
            The model in eval mode, on the CPU, its parameters frozen.

        Raises:
            CheckpointError: no config or no safetensors in the folder, or they do not fit the model.
            ConfigError: a value in the config that the model cannot have, or a quantization that cannot be done. Keys that
                the model does not know are passed over, with a warning.
        """
        from vramkit.pipelines.loading.hub import local_folder  # noqa: PLC0415

        others = download_arguments(f"{cls.__name__}.from_pretrained", others)
        wanted, device = dtype_of(wanted_dtype(dtype, torch_dtype)), device_of(device_map)
        folder = local_folder(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            **others,
        )
        config, files = read_json(folder / CONFIG_NAME), weights_files(folder, stem=WEIGHTS_NAME, variant=variant)
        model = cls.from_files(
            files, config, source=folder / CONFIG_NAME, torch_dtype=wanted, quantization_config=quantization_config
        )
        return model if device is None else model.to(device)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike[str],
        *,
        config: Any = None,
        subfolder: str | None = None,
        torch_dtype: Dtype | None = None,
        dtype: Dtype | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> Self:
        """Load a model from one .safetensors or .gguf file with the names of diffusers, the original code or ComfyUI.

        Weights are views of the file, also those whose rows the original code joins. What is stored in fp8 (with scales or
        without) or in the blocks of GGUF stays so, computes as `torch_dtype`, and is streamed as it is stored.

        Args:
            pretrained_model_link_or_path_or_dict: the file, or its address on the Hugging Face hub (``https://huggingface.co/<owner>/<name>/blob/...``).
            config: of the model: a folder or repository with its config.json (or that of the pipeline), the file, or a dict.
                None: told from the shapes, for models of the published families.
            subfolder: of the config; "transformer" or "vae" where it is needed and not given.
            torch_dtype: as in `from_pretrained`; for weights that are stored in fewer bits, what they compute as, by
                default what most biases in the file are.
            dtype: another name of ``torch_dtype``.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept.
            device_map: as in `from_pretrained`.
            quantization_config: as in `from_pretrained`; for .gguf also ``GGUFQuantizationConfig`` of diffusers.
            **others: as in `from_pretrained`.

        Raises:
            CheckpointError: a damaged file, one of another model, or one whose config is not told by its shapes.
            ConfigError: as in `from_pretrained`.
        """
        from vramkit.pipelines.loading.single_file import load_single_file  # noqa: PLC0415 - folders need none of it

        others = download_arguments(f"{cls.__name__}.from_single_file", others)
        wanted, device = dtype_of(wanted_dtype(dtype, torch_dtype)), device_of(device_map)
        model = load_single_file(
            cls,
            pretrained_model_link_or_path_or_dict,
            config=config,
            subfolder=subfolder,
            torch_dtype=wanted,
            quantization_config=quantization_config,
            revision=revision,
            cache_dir=cache_dir,
            **others,
        )
        return model if device is None else model.to(device)

    @classmethod
    def from_files(
        cls,
        files: Sequence[Path],
        config: Any,
        *,
        source: Any,
        torch_dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        key_map: KeyMap | None = None,
    ) -> Self:
        """Load a model from files at hand and its config, which `source` names in messages; see `from_pretrained`."""
        saved = config.get("quantization_config") if isinstance(config, Mapping) else None
        model = cls.described_by(config, source=source, most=most_parameters(files))
        options: dict[str, Any] = {} if key_map is None else {"key_map": key_map}
        options |= {"dtype": torch_dtype, "keep_fp32": cls._keep_in_fp32}
        load_weights(model, files, saved, quantization_config, **options)
        return model.eval().requires_grad_(requires_grad=False)

    @classmethod
    def described_by(cls, config: Any, *, source: Any, most: int | None = None) -> Self:
        """A model with parameters on the meta device, by the config of `source`; what it does not know is passed over.

        `most` is how many parameters it may have.

        Raises:
            CheckpointError: the config describes no such model.
            ConfigError: as `from_config`.
        """
        from vramkit.offload import parameters_on_meta  # noqa: PLC0415 - the engine is needed only once weights are

        if isinstance(config, Mapping):
            given = {key: value for key, value in config.items() if key != "quantization_config"}
            config = cls._known_part(given, source)
        try:
            with parameters_on_meta(most=most):
                return cls.from_config(config)
        except ConfigError:
            raise
        except Exception as error:  # numbers of a config go through all of a constructor's arithmetic
            raise CheckpointError(f"{source} does not describe a {cls.__name__}: {error}") from error

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **where: Any
    ) -> dict[str, Any]:
        """The config.json of a folder, for `from_config`; where it is, by the arguments of `from_pretrained`."""
        from vramkit.pipelines.loading.hub import local_folder  # noqa: PLC0415

        pattern = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        return read_json(
            local_folder(pretrained_model_name_or_path, subfolder=subfolder, allow_patterns=[pattern], **where)
            / CONFIG_NAME
        )

    @classmethod
    def _known_part(cls, config: Mapping[str, Any], source: Any) -> dict[str, Any]:
        """The keys of a file's config that the model has; one warning names the others, as a newer version may have."""
        known = {field.name for field in dataclasses.fields(cls.config_class)} | set(cls.old_config_keys)
        others = [key for key in config if key not in known and not key.startswith("_")]
        if others:
            named = ", ".join(f"{key}={config[key]!r}" for key in others)
            warnings.warn(f"{source}: {cls.__name__} does not know {named}; passed over", stacklevel=5)
        return {key: value for key, value in config.items() if key not in others}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **others: Any,
    ) -> None:
        """Write config.json and safetensors, in the layout that from_pretrained reads, here and in diffusers.

        Args:
            save_directory: made if it is missing.
            variant: as in diffusion_pytorch_model.<variant>.safetensors; files of other variants stay.
            max_shard_size: bytes, or text such as "10GB"; a larger model is split and gets an index.
            **others: of diffusers, where they ask for nothing else: ``safe_serialization=True``, ``push_to_hub=False``.

        An offloaded model may be saved as it is. The files appear when all are written, with the permissions of the umask.

        Raises:
            ConfigError: an argument that cannot be meant, before anything is written.
            ConflictError: LoRA adapters are loaded, with which the layers have other names, or the model is a part of a
                larger one that is offloaded.
            StoreError: the folder cannot be written; nothing of the files is left then.
        """
        from vramkit.offload.checkpoint import distinct_weights, write_weights  # noqa: PLC0415 - the engine is needed only once weights are
        from vramkit.offload.disk import staged_folder  # noqa: PLC0415
        from vramkit.offload.offloaded import editable, refuse_part_of_offloaded  # noqa: PLC0415

        how = saving_arguments(variant, max_shard_size, others)
        refuse_adapters(self)
        refuse_part_of_offloaded(self)
        if any(not is_plain(parameter) for parameter in self.parameters()):
            from vramkit.quant.files import save_quantized  # noqa: PLC0415

            save_quantized(self, save_directory, **how)
            return
        with editable(self), staged_folder(save_directory) as stage:
            config = {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)}
            (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            write_weights(stage, distinct_weights(self), stem=WEIGHTS_NAME, **how)

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

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters as they are stored, tied ones once, and of the buffers unless they are not wanted."""
        kept = {id(tensor): tensor for tensor in (*self.parameters(), *(self.buffers() if return_buffers else ()))}
        return sum(map(tensor_bytes, kept.values()))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Numbers in the parameters, tied ones once."""
        tables = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in tables)
        )

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
        *args: Any,
        **options: Any,
    ) -> Any:
        """Stream the weights through a small window: `vramkit.offload.apply_group_offloading` on this model.

        Returns its handle.
        """
        from vramkit.offload import apply_group_offloading  # noqa: PLC0415

        return apply_group_offloading(self, onload_device, offload_device, offload_type, *args, **options)

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

    def compile_repeated_blocks(self, *args: Any, **options: Any) -> None:
        """Compile every block by itself, as ``block.compile(...)`` does: offloaded models compile so, and blocks alike once.

        Raises:
            ConfigError: the model is not a row of blocks.
        """
        blocks = [block for part in self.children() if isinstance(part, nn.ModuleList) for block in part]
        if not blocks:
            raise ConfigError(f"{type(self).__name__} is no row of blocks: compile the model, or parts of it")
        for block in blocks:
            block.compile(*args, **options)

    # -- what diffusers' models have beside ----------------------------------------------------------------------------

    set_attention_backend = Absent(_BACKENDS)
    reset_attention_backend = Absent(_BACKENDS)
    enable_xformers_memory_efficient_attention = Absent(_BACKENDS)
    disable_xformers_memory_efficient_attention = Absent(_BACKENDS)
    set_attn_processor = Absent(_BACKENDS)
    fuse_qkv_projections = Absent("weights stay as the checkpoint has them; leave it out")
    unfuse_qkv_projections = Absent("weights stay as the checkpoint has them; leave it out")
    enable_gradient_checkpointing = Absent("these models are for inference")
    disable_gradient_checkpointing = Absent("these models are for inference")
    enable_cache = Absent("every step runs all blocks; caches of others work on offloaded models of others")
    disable_cache = Absent("there is none; leave it out")
    enable_parallelism = Absent("a model runs on one device")
    add_adapter = Absent(_ADAPTERS)
    load_lora_adapter = Absent(_ADAPTERS)
    save_lora_adapter = Absent(_ADAPTERS)
    set_adapter = Absent(_ADAPTERS)
    set_adapters = Absent(_ADAPTERS)
    delete_adapters = Absent(_ADAPTERS)
    enable_adapters = Absent(_ADAPTERS)
    disable_adapters = Absent(_ADAPTERS)
    enable_lora = Absent(_ADAPTERS)
    disable_lora = Absent(_ADAPTERS)
    fuse_lora = Absent(_ADAPTERS)
    unfuse_lora = Absent(_ADAPTERS)
    unload_lora = Absent(_ADAPTERS)
    dequantize = Absent("load the original checkpoint without quantization_config")
    save_config = Absent("save_pretrained(folder) writes it with the weights")
    register_to_config = Absent("a config is not changed: from_config makes another model")
    push_to_hub = Absent("save_pretrained(folder), then `hf upload`")


def refuse_adapters(model: nn.Module) -> None:
    """Refuse to save what carries adapters.

    Raises:
        ConflictError: layers have other names with them, and weights that are changed in place are not the model's own.
    """
    if any(hasattr(part, "base_layer") for part in model.modules()) or getattr(model, "_lora_adapters", None):
        raise ConflictError(
            f"{type(model).__name__} carries LoRA adapters, which its files have no place for: unload_lora_weights() "
            "before saving, after fuse_lora() if they are to be in the weights"
        )
