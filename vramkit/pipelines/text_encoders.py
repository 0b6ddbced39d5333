"""Text encoders and tokenizers of the transformers library: loaded mapped, and run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.folders import listing, read_json, weights_files
from vramkit.pipelines.modeling import load_weights
from vramkit.pipelines.pipeline import execution_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

_PREFIX = "text_model."  # of CLIP's parameters, in files of all versions before 5 of transformers
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")


def load_text_encoder(
    folder: Path,
    *,
    class_name: str,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    quantization_config: Any = None,
) -> nn.Module:
    """Build a transformers text encoder on the meta device and map its safetensors weights.

    Args:
        folder: holds config.json and the safetensors weights (one file, or shards with an index).
        class_name: a class of transformers, for example ``"UMT5EncoderModel"``.
        torch_dtype: None keeps the dtype of the file. For fp16 the parameters that the class lists as too wide for
            it (T5: ``wo``) stay fp32, as transformers itself does; for bf16 none do.
        variant: reads ``model.<variant>.safetensors``.
        quantization_config: how weights are quantized as they are read (see `vramkit.quant`).

    Raises:
        CheckpointError: transformers has no such class, or the files do not fit it.
        ConfigError: a quantization that cannot be done.
    """
    import transformers  # noqa: PLC0415 - a few seconds to import, and not every pipeline has a text encoder

    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no class {class_name} for {folder}")
    model = _unfilled(model_class, folder)
    fragile = model._keep_in_fp32_modules or () if torch_dtype == torch.float16 else ()  # noqa: SLF001
    load_weights(
        model,
        weights_files(folder, stem="model", variant=variant),
        read_json(folder / "config.json").get("quantization_config"),
        quantization_config,
        dtype=torch_dtype,
        key_map=partial(_name_in, set(model.state_dict())),
        keep_fp32=[f".{module}." for module in fragile],
    )
    frozen: nn.Module = model.eval().requires_grad_(requires_grad=False)
    return frozen


def _unfilled(model_class: Any, folder: Path) -> Any:
    """Build the class from the folder's config.json, parameters on the meta device and the tables it computes filled."""
    from accelerate import init_empty_weights  # noqa: PLC0415

    read_json(folder / "config.json")  # the class itself takes its defaults when there is none
    try:
        config = model_class.config_class.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = model_class(config)
        model.tie_weights()  # undone by the way parameters were emptied
        return model
    except Exception as error:  # the errors of that library's checks have no base of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a {model_class.__name__}: {reason}"
        ) from error


def _name_in(known: set[str], name: str) -> str | None:
    """Translate a checkpoint's name to the model's: versions of transformers differ by a prefix, and once saved tables."""
    if name.endswith(("position_ids", "inv_freq")) and name not in known:
        return None
    return next((each for each in (name, name.removeprefix(_PREFIX), _PREFIX + name) if each in known), name)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint folder; CheckpointError when transformers cannot read it."""
    if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would make up an empty one
        raise CheckpointError(f"{folder}: no {' or '.join(VOCABULARIES)}; it holds {listing(folder)}")
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def encode_t5(
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    text_encoder: nn.Module,
    max_sequence_length: int,
    attend_to_padding: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts to states [B, S, C] and a mask [B, S], bool, True on the prompt's tokens; S = max_sequence_length.

    Longer prompts are cut. Both results are on the device where the encoder computes.

    Args:
        prompts: B prompts.
        tokenizer: a T5 tokenizer.
        text_encoder: a T5 encoder.
        max_sequence_length: tokens per prompt, the end token included.
        attend_to_padding: whether the encoder looks at the padding behind a prompt; a checkpoint was trained one way.
    """
    if max_sequence_length < 1:
        raise ConfigError(f"max_sequence_length is {max_sequence_length}; expected at least 1 token")
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    device = execution_device(text_encoder)
    mask = tokens.attention_mask.to(device)
    states = text_encoder(tokens.input_ids.to(device), None if attend_to_padding else mask)
    return states.last_hidden_state, mask.bool()
