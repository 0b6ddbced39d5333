"""Encoders of text and images of the transformers library, loaded mapped, and their tokenizers and image processors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from vramkit.errors import CheckpointError
from vramkit.extras import extra
from vramkit.pipelines.loading.folders import CONFIG_NAME, listed, listing, read_json, weights_files
from vramkit.pipelines.loading.registry import IMAGE_ENCODERS
from vramkit.pipelines.loading.weights import load_weights, most_parameters

if TYPE_CHECKING:
    from torch import nn

# Before the names of the model in files of older versions (CLIP), of a causal language model, of one that sees pictures.
_TEXT, _VISION = "text_model.", "vision_model."
_PREFIXES = ("model.", "language_model.", "language_model.model.", "model.language_model.")
# What files of a whole model hold beside its text encoder: T5's decoder, heads, CLIP's other half, eyes.
_BESIDE = (
    *("decoder.", "lm_head.", "text_projection.", "visual_projection.", "logit_scale"),
    *("vision_tower.", "multi_modal_projector.", "language_model.lm_head.", "spiece_model", "tekken_model"),
    *("model.vision_tower.", "model.visual.", "model.multi_modal_projector."),
)
# For the loaders of transformers: no code of the folder (they would ask on the terminal), nothing from the network.
_HERE: Mapping[str, Any] = MappingProxyType({"trust_remote_code": False, "local_files_only": True})
_MOST_SIZE = 2**24  # of anything in a config, all of which a constructor may fill memory for
_MOST_EXTRA = 10_000  # tokens beside those of the vocabulary, each made one by one
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")


def load_text_encoder(
    folder: Path,
    *,
    class_name: str,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    quantization_config: Any = None,
) -> nn.Module:
    """Build an encoder of transformers, of text or images, on the meta device and map its safetensors weights.

    Args:
        folder: holds config.json and the safetensors weights (one file, or shards with an index).
        class_name: a class of transformers, for example ``"UMT5EncoderModel"``.
        torch_dtype: None keeps the dtype of the file. For fp16 the parameters that the class lists as too wide for
            it (T5: ``wo``) stay fp32, as transformers itself does; for bf16 none do.
        variant: reads ``model.<variant>.safetensors``. Files may hold the whole model that the encoder is a part of.
        quantization_config: how weights are quantized as they are read (see `vramkit.quant`).

    Raises:
        CheckpointError: transformers has no such class, or the files do not fit it.
        ConfigError: a quantization that cannot be done.
    """
    saved = read_json(folder / CONFIG_NAME).get("quantization_config")
    files = weights_files(folder, stem="model", variant=variant)
    model = unfilled(class_name, folder, source=folder / CONFIG_NAME, most=most_parameters(files))
    return _filled(model, files, saved, torch_dtype, quantization_config)


def load_encoder_file(
    path_or_url: str | os.PathLike[str],
    *,
    class_name: str | None = None,
    config: Mapping[str, Any] | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    **where: Any,
) -> nn.Module:
    """Load an encoder of text or images from one .safetensors or .gguf file, mapped as it is stored.

    Args:
        path_or_url: the file, or its address on the hub, under names of transformers (and ComfyUI), of the code of Wan, or
            of llama.cpp (T5).
        class_name: a class of transformers; None: the one whose names are in the file.
        config: of the model: a folder with its config.json, or what that holds; None: told from the shapes, for models as
            they were published.
        torch_dtype: as in `load_text_encoder`; what weights in fp8 or GGUF compute as, by default as most beside them.
        quantization_config: as in `load_text_encoder`.
        **where: for `local_file`.

    Raises:
        CheckpointError: a damaged file, or one of another model.
        ConfigError: a quantization that cannot be done, or a path that does not exist.
    """
    from vramkit.offload.checkpoint import StoredEntry, read_checkpoint  # noqa: PLC0415 - the engine is needed only now
    from vramkit.offload.scaled import computes_as, with_scales  # noqa: PLC0415
    from vramkit.pipelines.loading.encoder_files import encoder_in  # noqa: PLC0415 - folders need none of it
    from vramkit.pipelines.loading.hub import local_file  # noqa: PLC0415

    file = local_file(path_or_url, **where)
    entries = with_scales(read_checkpoint(file), lambda _name: False)
    found = encoder_in({name: entry.shape for name, entry in entries.items()}, source=file, wanted=class_name)
    if torch_dtype is None and any(isinstance(entry, StoredEntry) for entry in entries.values()):
        torch_dtype = computes_as(entries)
    model = unfilled(
        found.class_name, found.config if config is None else config, source=file, most=most_parameters([file])
    )
    return _filled(model, [file], None, torch_dtype, quantization_config, names=found.names)


def _filled(  # noqa: PLR0917
    model: Any,
    files: Sequence[Path],
    saved: Any,
    torch_dtype: torch.dtype | None,
    quantization_config: Any,
    names: Mapping[str, str] = MappingProxyType({}),
) -> nn.Module:
    """Give a model its weights; `names` are those of the model by the names in the file, where they are others."""
    class_name = type(model).__name__
    own, other = (_VISION, _TEXT) if class_name in IMAGE_ENCODERS else (_TEXT, _VISION)
    known = frozenset(model.state_dict())

    def rename(name: str) -> str | None:
        return _name_in(known, own, names.get(name, name))

    fragile = model._keep_in_fp32_modules or () if torch_dtype in (torch.float16, None) else ()  # noqa: SLF001
    load_weights(
        model,
        files,
        saved,
        quantization_config,
        dtype=torch_dtype,
        key_map=rename,
        keep_fp32=[f".{module}." for module in fragile],
    )
    if saved is None:
        _warn_of_others(files, class_name, rename, (*_BESIDE, other))
    frozen: nn.Module = model.eval().requires_grad_(requires_grad=False)
    return frozen


def unfilled(class_name: str, config: Mapping[str, Any] | Path, *, source: Path, most: int) -> Any:
    """Build the class by its config, or by that of a folder; parameters on the meta device, computed tables filled.

    `most` is how many parameters it may have.

    Raises:
        CheckpointError: the config describes no such model, or asks for code.
    """
    with extra("text", needed_for="a text encoder"):
        import transformers  # noqa: PLC0415 - a few seconds to import, and not every pipeline has a text encoder

    from vramkit.offload import parameters_on_meta  # noqa: PLC0415 - the engine is needed only once weights are

    model_class: Any = getattr(transformers, class_name, None)
    if model_class is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no class {class_name} for {source}")
    # The class itself takes its defaults when a folder has no config.
    described = read_json(config / CONFIG_NAME) if isinstance(config, Path) else dict(config)
    _check_config(described, source)
    try:
        kind = model_class.config_class
        options = (
            kind.from_pretrained(config, local_files_only=True)
            if isinstance(config, Path)
            else kind.from_dict(described)
        )
        with parameters_on_meta(most=most):
            return model_class(options)
    except Exception as error:  # the errors of that library's checks have no base of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source} does not describe a {class_name}: {reason}") from error


def _check_config(described: Mapping[str, Any], source: Path) -> None:
    """Refuse a config that asks for code, or for sizes that no model has."""
    if (kernels := _code_asked_for(described)) is not None:
        raise CheckpointError(
            f"{source} asks for kernels from the repository {kernels!r}; code from repositories is never run: take the "
            "entry out"
        )
    if large := [key for key, value in described.items() if type(value) is int and value > _MOST_SIZE]:
        raise CheckpointError(f"{source}: {large[0]} is {described[large[0]]}, which no model has; it is damaged")


def _code_asked_for(described: Any) -> str | None:
    """The repository that a config names for attention or experts, which transformers would download and run."""
    if not isinstance(described, dict):
        return None
    for key, value in described.items():
        if key.endswith("_implementation"):
            named = value.values() if isinstance(value, dict) else (value,)
            if found := next((each for each in named if isinstance(each, str) and "/" in each), None):
                return found
        elif (inner := _code_asked_for(value)) is not None:
            return inner
    return None


def _name_in(known: Collection[str], own: str, name: str) -> str | None:
    """Translate a checkpoint's name to the model's, CLIP's with or without its `own` prefix; None without a place for it."""
    stripped = (name.removeprefix(prefix) for prefix in (own, *_PREFIXES) if name.startswith(prefix))
    return next((each for each in (name, *stripped, own + name) if each in known), None)


def _warn_of_others(
    files: Sequence[Path], class_name: str, rename: Callable[[str], str | None], beside: tuple[str, ...]
) -> None:
    """Name in one warning what the files hold that is neither the model's nor known to stand beside it."""
    from vramkit.offload.checkpoint import read_checkpoint  # noqa: PLC0415 - the engine is needed only once weights are
    from vramkit.offload.scaled import with_scales  # noqa: PLC0415

    entries = with_scales(read_checkpoint(files), lambda name: rename(name) is not None)
    left = [name for name in entries if rename(name) is None and not name.startswith(beside)]
    if unknown := [name for name in left if not name.endswith(("position_ids", "inv_freq"))]:
        warnings.warn(
            f"{files[0]}: {class_name} has no place for {listed(unknown)}; passed over", UserWarning, stacklevel=3
        )


def load_tokenizer(folder: Path, *, class_name: str | None = None) -> Any:
    """Load the tokenizer of a checkpoint folder; CheckpointError when transformers cannot read it.

    A folder says by tokenizer_config.json which class it is for; one that lacks it is read by ``class_name``.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would make up an empty one
        raise CheckpointError(f"{folder}: no {' or '.join(VOCABULARIES)}; it holds {listing(folder)}")
    _refuse_pointers(folder)
    with extra("text", needed_for="a tokenizer"):
        import transformers  # noqa: PLC0415

    described = folder / "tokenizer_config.json"
    config = read_json(described) if described.is_file() else {}
    if isinstance(more := config.get("extra_ids"), int | float) and more > _MOST_EXTRA:
        raise CheckpointError(f"{described}: extra_ids is {more}, expected a hundred or so; it is damaged")
    if "auto_map" in config:
        raise CheckpointError(
            f"{described} names code of its own (auto_map); code from checkpoints is never run. Load the tokenizer yourself "
            "and pass tokenizer=... to from_pretrained, or take the entry out if tokenizer.json is all that it needs"
        )
    kind = transformers.AutoTokenizer if described.is_file() else getattr(transformers, class_name or "AutoTokenizer")
    try:
        return kind.from_pretrained(folder, **_HERE)
    except Exception as error:  # the readers of vocabularies raise bare ones
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def _refuse_pointers(folder: Path) -> None:
    """Refuse a tokenizer whose files are pointers of git-lfs, of which its readers would make tokens or riddles.

    All is read from tokenizer.json where it is there, and from the others where it is not.
    """
    from vramkit.offload.stand_ins import is_pointer, stand_in  # noqa: PLC0415 - most tokenizers come with weights

    whole = folder / VOCABULARIES[0]
    read = [whole] if whole.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    if pointers := [path for path in read if is_pointer(path)]:
        raise CheckpointError(f"{pointers[0]} {stand_in(pointers[0])}")


def load_image_processor(folder: Path, *, class_name: str) -> Any:
    """Load what prepares images for an image encoder; CheckpointError when transformers cannot read it."""
    with extra("text", needed_for="an image processor"):
        import transformers  # noqa: PLC0415

    read_json(folder / "preprocessor_config.json")  # the class itself takes its defaults when there is none
    try:
        return getattr(transformers, class_name).from_pretrained(folder, **_HERE)
    except Exception as error:  # as above
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the image processor in {folder} cannot be read: {reason}") from error
