"""What all pipelines share: components loaded from a checkpoint folder, moved, offloaded and saved together."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vramkit import __version__
from vramkit.errors import StoreError
from vramkit.extras import extra
from vramkit.offload import offload_of
from vramkit.offload.disk import staged_folder
from vramkit.offload.offloaded import editable
from vramkit.pipelines.calling.checkpoints import CheckpointCalls, check_names
from vramkit.pipelines.calling.memory import MemoryCalls
from vramkit.pipelines.calling.parts import check_component
from vramkit.pipelines.loading.absent import Absent
from vramkit.pipelines.loading.arguments import saving_arguments
from vramkit.pipelines.loading.components import MODEL_INDEX
from vramkit.pipelines.loading.modeling import refuse_adapters
from vramkit.pipelines.loading.options import FrozenConfig
from vramkit.pipelines.lora.adapters import LoraAdapters

_ADOPTED = frozenset({"transformer", "transformer_2", "vae"})


class Pipeline(CheckpointCalls, LoraAdapters, MemoryCalls):
    """A set of named components that generate something together.

    A subclass names its components and options as the keyword parameters of ``__init__``; the names are those of
    model_index.json. Components are plain attributes: they may be replaced at any time.
    """

    optional: ClassVar[tuple[str, ...]] = ()  # those that a whole checkpoint may lack
    name_or_path: str | None = None  # what from_pretrained was given

    def __init__(self) -> None:
        self._progress_bar_config: dict[str, Any] = {}
        self._model_offload = None
        self.together: Callable[[Sequence[Any], Mapping[str, Any]], AbstractContextManager[object]] | None = None
        """What a call with these arguments runs in, where several ranks make it (`vramkit.distributed.parallelize`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Check components where they are put in, and let ready models of diffusers become ours; see `adopted`."""
        if name in self.component_names:
            check_component(name, value)
        if name in _ADOPTED and isinstance(value, nn.Module):
            from vramkit.pipelines.loading.adoption import adopted  # noqa: PLC0415 - most models are ours already

            value = adopted(value, name, type(self))
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hooks that transformers leaves on its models, which no pickle takes."""
        for module in self._modules().values():
            _drop_captures(module)
        return dict(vars(self))

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, in the order in which a call uses them; absent ones are None."""
        return {name: getattr(self, name) for name in self.component_names}

    @property
    def config(self) -> FrozenConfig:
        """The pipeline's own options, as model_index.json holds them."""
        options = [name for name in inspect.signature(type(self)).parameters if name not in self.component_names]
        return FrozenConfig({name: getattr(self, name) for name in options})

    @property
    def device(self) -> torch.device:
        """The device that computes: the first module's, cpu when there is none."""
        first = next(iter(self._modules().values()), None)
        return torch.device("cpu") if first is None else execution_device(first)

    def register_modules(self, **components: Any) -> None:
        """Replace components by name."""
        check_names("component", components, self.component_names)
        for name, component in components.items():
            setattr(self, name, component)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **others: Any,
    ) -> None:
        """Write all components and model_index.json in the published folder layout, offloaded or not; safetensors only.

        Args:
            save_directory: made if it is missing. The files appear when all are written, with the permissions of the umask.
            safe_serialization: True.
            variant: of the weights' files of each model, as in `Model.save_pretrained`.
            max_shard_size: of each model; None: 10GB of ours, and what transformers takes of its own.
            **others: as in `Model.save_pretrained`.

        Raises:
            ConfigError: an argument that cannot be meant, before anything is written.
            ConflictError: LoRA adapters are loaded.
            StoreError: the folder cannot be written; nothing of the files is left then.
        """
        how = saving_arguments(variant, max_shard_size, others | {"safe_serialization": safe_serialization})
        for module in self._modules().values():
            refuse_adapters(module)
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_vramkit_version": __version__}
        with staged_folder(save_directory) as stage:
            for name, given in self.components.items():
                component = getattr(given, "_orig_mod", given)  # what torch.compile wraps
                index[name] = [None, None] if component is None else [_library_of(component), type(component).__name__]
                if component is not None:
                    _save(component, stage / name, how if isinstance(component, nn.Module) else {})
            text = json.dumps(index | self.config, indent=2)
            (stage / MODEL_INDEX).write_text(text + "\n", encoding="utf-8")

    from_config = Absent(
        "a pipeline is its components: WanPipeline(vae=..., ...), from_pipe(pipe), from_pretrained(folder)"
    )
    load_config = Absent("vramkit.pipelines.loading.folders.read_json(folder / 'model_index.json') reads it")
    save_config = Absent("save_pretrained(folder) writes it with the components")
    register_to_config = Absent("options are attributes of the pipeline: set them")
    push_to_hub = Absent("save_pretrained(folder), then `hf upload`")
    check_inputs = Absent("every call checks its arguments before anything is computed")
    prepare_latents = Absent("give the call latents=..., or a generator")
    numpy_to_pil = Absent('give the call output_type="pil"')
    fuse_qkv_projections = Absent("weights stay as the checkpoint has them; leave it out")
    unfuse_qkv_projections = Absent("weights stay as the checkpoint has them; leave it out")

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set options of tqdm for the progress bars, for example ``disable=True`` or ``desc="denoising"``."""
        self._progress_bar_config = config

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Return a tqdm bar over ``iterable``, or one of ``total`` steps to be updated by hand."""
        with extra("pipelines", needed_for="a progress bar"):
            from tqdm import tqdm  # noqa: PLC0415
        return tqdm(iterable, total=total, **self._progress_bar_config)


def execution_device(module: nn.Module) -> torch.device:
    """Return where ``module`` computes: the onload device when it is offloaded, else where its weights lie."""
    offload = offload_of(module)
    if offload is not None:
        return offload.config.device
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def hand_over(module: nn.Module, following: nn.Module) -> None:
    """Let device memory that ``module`` keeps for its next call go, and what ``following`` starts with come.

    For two models of which one is about to be called for the last time before the other; nothing for one and the same.
    """
    if module is following:
        return
    if (leaving := offload_of(module)) is not None:
        leaving.rest()
    if (coming := offload_of(following)) is not None:
        coming.prefetch()


def _drop_captures(module: nn.Module) -> None:
    """Take off what transformers has put on a model to note its states; it puts it on again where they are asked for."""
    for part in module.modules():
        for key, hook in list(part._forward_hooks.items()):  # noqa: SLF001
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del part._forward_hooks[key]  # noqa: SLF001
        vars(part).pop("_output_capturing_hooks_installed", None)


def _save(component: Any, folder: Path, how: Mapping[str, Any]) -> None:
    """Write one component as `how` says; those of other libraries too, which know neither our weights nor offloading."""
    if getattr(component, "_vramkit_quantization", None) is not None:
        from vramkit.quant.files import save_quantized  # noqa: PLC0415

        save_quantized(component, folder, **how)
        return
    with editable(component) if isinstance(component, nn.Module) else contextlib.nullcontext():
        try:
            component.save_pretrained(folder, **how)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # The library of tokenizers says so that a file could not be written.
            raise StoreError(f"writing {folder.name} failed: {error}; nothing was kept of it") from error


def _library_of(component: object) -> str:
    """Return the library that model_index.json names for a component: ours stand under the published name."""
    package = type(component).__module__.partition(".")[0]
    return "diffusers" if package == "vramkit" else package
