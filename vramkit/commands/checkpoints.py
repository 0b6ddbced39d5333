"""From the name of a checkpoint to a pipeline: in outline, to check a call with, or with its weights, placed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from vramkit.commands.options import Dtype, Offload, Quantize
from vramkit.errors import CheckpointError, ConfigError
from vramkit.memory import available_ram_bytes, format_bytes, module_bytes
from vramkit.offload import apply_group_offloading, offload_of
from vramkit.pipelines.calling.pipeline import Pipeline
from vramkit.pipelines.loading.auto_model import AutoModel
from vramkit.pipelines.loading.components import is_component, read_model_index
from vramkit.pipelines.loading.folders import CONFIG_NAME, read_json
from vramkit.pipelines.loading.hub import local_folder
from vramkit.pipelines.loading.registry import IMAGE_ENCODERS, IMAGE_PROCESSORS, MODELS, TEXT_ENCODERS, TOKENIZERS
from vramkit.pipelines.loading.weights import MOST_PARAMETERS

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["describe_weights", "load", "models_of", "outline", "place", "resolve_dtype"]

# Components of which checks look at the kind alone, so that stand-ins do.
_ENCODERS = (*TEXT_ENCODERS, *IMAGE_ENCODERS)
_PREPARERS = (*TOKENIZERS, *IMAGE_PROCESSORS)


def family_of(model: str, images: Mapping[str, Any]) -> Any:
    """The pipeline class of a checkpoint that takes the images that are given, or none.

    Raises:
        ConfigError: there is no such class, or the checkpoint needs an image.
    """
    family: Any = Pipeline.class_of(model)
    if images:
        family = family.with_image()
    taken = inspect.signature(family.__call__).parameters
    if unknown := [name for name in images if name not in taken]:
        raise ConfigError(f"--{unknown[0].replace('_', '-')} was given, which {family.__name__} does not take")
    if "image" in taken and taken["image"].default is inspect.Parameter.empty and "image" not in images:
        raise ConfigError(f"{model} makes clips of an image: give --image")
    return family


def outline(model: str, family: Any = None) -> Any:
    """A pipeline without weights, made from the JSON files of a checkpoint: `check` refuses what a call would.

    Raises:
        ConfigError, CheckpointError: as `Pipeline.from_pretrained`, and a checkpoint that lacks a component.
    """
    root = local_folder(model, allow_patterns=["*.json", "*/*.json"])
    stand_ins: dict[str, Any] = {}
    for name, entry in read_model_index(root).items():
        if is_component(entry) and entry[1] in _ENCODERS:
            stand_ins[name] = nn.Module()
        elif is_component(entry) and entry[1] in _PREPARERS:
            stand_ins[name] = _prepares_nothing
        elif is_component(entry) and entry[1] in MODELS and (root / name / CONFIG_NAME).is_file():
            stand_ins[name] = _without_weights(root / name / CONFIG_NAME)
    pipeline: Any = (family or Pipeline.class_of(model)).from_pretrained(model, **stand_ins)
    missing = [name for name, part in pipeline.components.items() if part is None and name not in pipeline.optional]
    if missing:
        raise CheckpointError(
            f"{model} has no {' and no '.join(missing)}, without which there is no clip from a prompt"
        )
    return pipeline


def _prepares_nothing(*_args: object, **_kwargs: object) -> NoReturn:
    raise AssertionError("an outline was asked to encode")


def _without_weights(path: Path) -> nn.Module:
    """A model whose parameters are on the meta device."""
    config = read_json(path)
    kind = AutoModel.class_named(config.get("_class_name"), source=path)
    return kind.described_by(config, source=path, most=MOST_PARAMETERS).eval()


def resolve_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The dtype of the transformer; auto is bfloat16 on a GPU and float32 on the CPU."""
    if dtype is Dtype.auto:
        dtype = Dtype.float32 if device == "cpu" else Dtype.bfloat16
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def load(
    model: str, dtype: torch.dtype, *, family: Any = None, quantize: Quantize | None = None, only: tuple[str, ...] = ()
) -> Any:
    """Load a checkpoint, or some of its components; the VAE of a family that wants it so is in float32."""
    family = family or Pipeline.class_of(model)
    exact = {"vae", "image_encoder"} & set(family.component_names) if family.vae_in_fp32 else set()
    left_out = {name: None for name in family.component_names if only and name not in only}
    return family.from_pretrained(
        model,
        torch_dtype={"default": dtype} | dict.fromkeys(sorted(exact), torch.float32),
        quantization_config=None if quantize is None else _quantization(quantize, family),
        **left_out,
    )


def _quantization(quantize: Quantize, family: Any) -> Any:
    from vramkit.quant import PipelineQuantizationConfig  # noqa: PLC0415

    backend, options = {
        Quantize.fp8: ("fp8", {}),
        Quantize.int8: ("quanto", {"weights": "int8"}),
        Quantize.nf4: ("bitsandbytes_4bit", {"quant_type": "nf4"}),
    }[quantize]
    experts = [name for name in family.component_names if name.startswith("transformer")]
    return PipelineQuantizationConfig(backend, options, components_to_quantize=experts)


def models_of(pipeline: Any) -> dict[str, nn.Module]:
    """The components that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def place(
    pipeline: Any,
    device: str,
    offload: Offload,
    *,
    store: str | None = None,
    resident: str = "0",
    slots: int | None = None,
    mesh: Any = None,
) -> None:
    """Put the models where ``--offload`` says; ranks of `mesh` share the weights of what streams, but the autoencoder's."""
    if offload is Offload.none:
        pipeline.to(device)
    elif offload is Offload.model:
        pipeline.enable_model_cpu_offload(device)
    else:
        for module in models_of(pipeline).values():
            apply_group_offloading(
                module,
                device,
                offload_type=f"{offload.value}_level",
                store=store,
                slots=slots,
                resident=resident if module is pipeline.transformer else 0,
                mesh=None if module is pipeline.vae else mesh,
            )


def describe_weights(pipeline: Any, device: str) -> list[str]:
    """Say, a line for each model, how large it is, and what of it streams through how many slots of what size."""
    lines = []
    for name, module in models_of(pipeline).items():
        offload = offload_of(module)
        size = module_bytes(module)
        stats = None if offload is None else offload.stats()
        if stats is None:
            lines.append(f"{name}: {format_bytes(size)} on {device}")
        elif not stats.slots:
            lines.append(f"{name}: {format_bytes(size)}, on {device} while it is needed")
        else:
            stores = " and ".join(_STORES[kind] for kind in stats.stores)
            lines.append(
                f"{name}: {format_bytes(stats.streamed_bytes)} stream from {stores} through {stats.slots} slots of "
                f"{format_bytes(stats.slot_bytes)}, {format_bytes(stats.resident_bytes)} stay on {device}"
            )
    return lines


_STORES = {
    "registered": "page-locked memory",
    "mapped": "the mapped files",
    "pageable": "memory",
    "disk": "disk",
    "peer": "another device",
}


def hint_of_disk(pipeline: Any, store: str | None) -> str | None:
    """Say that weights larger than the free memory are better read around it."""
    weights_bytes = sum(map(module_bytes, models_of(pipeline).values()))
    free_bytes = available_ram_bytes()
    if store is not None or weights_bytes <= free_bytes:
        return None
    return (
        f"{format_bytes(weights_bytes)} of weights and {format_bytes(free_bytes)} of free memory: if the system runs "
        "short, --store disk reads the weights from their files, piece by piece, and keeps nothing"
    )
