"""Prompts as HunyuanVideo was trained to see them: inside instructions to a language model, and pooled by CLIP.

Shapes: B prompts, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.pipeline import execution_device
from vramkit.pipelines.calling.texts import remembered

__all__ = ["PROMPT_TEMPLATE", "check_template", "encode_clip", "encode_llama"]

# What is asked of the language model, as published (arXiv:2412.03603, section 4.4): its states of the instruction, the
# first 95 tokens, are cut off.
_ASPECTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video:",
)
_TASK = "Describe the video by detailing the following aspects: "


def _turn(role: str, text: str) -> str:
    """One turn of a conversation in the format of Llama 3."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


PROMPT_TEMPLATE: Mapping[str, Any] = MappingProxyType(
    {"template": _turn("system", _TASK + "".join(_ASPECTS)) + _turn("user", "{}"), "crop_start": 95}
)
CLIP_TOKENS = 77
SKIPPED_LAYERS = (
    2  # the last ones of the language model, whose states say more about the next word than about the video
)


def check_template(template: Mapping[str, Any]) -> None:
    """Refuse what is no template: a text with one {} for the prompt, and how many tokens of it are cut off."""
    text, start = (template.get(key) if isinstance(template, Mapping) else None for key in ("template", "crop_start"))
    if not isinstance(text, str) or "{}" not in text or not isinstance(start, int) or start < 0:
        raise ConfigError(
            f"prompt_template is {template!r}; expected {{'template': a text with {{}} for the prompt, 'crop_start': the "
            "number of tokens before the prompt}"
        )


@remembered
def encode_llama(
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    text_encoder: nn.Module,
    template: Mapping[str, Any],
    max_sequence_length: int,
) -> tuple[Tensor, Tensor]:
    """Encode prompts to states [B, S, C] and a mask [B, S], 1 on the prompt's tokens; S = max_sequence_length.

    The states are those of the third layer from the end. Longer prompts are cut. Both results are on the device where the
    encoder computes.

    Raises:
        ConfigError: a prompt without a token behind the template's `crop_start`.
    """
    start = template["crop_start"]
    tokens = tokenizer(
        [template["template"].format(prompt) for prompt in prompts],
        max_length=max_sequence_length + start,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    if not tokens.attention_mask[:, start:].any(dim=1).all():
        raise ConfigError(
            f"prompt_template: crop_start cuts off {start} tokens, and a prompt in the template has no more; the template "
            "and the tokenizer do not belong together"
        )
    device = execution_device(text_encoder)
    mask = tokens.attention_mask.to(device)
    states = text_encoder(tokens.input_ids.to(device), mask, output_hidden_states=True, use_cache=False).hidden_states
    return states[-(SKIPPED_LAYERS + 1)][:, start:], mask[:, start:]


@remembered
def encode_clip(prompts: Sequence[str], *, tokenizer: Any, text_encoder: nn.Module) -> Tensor:
    """Encode prompts to one vector each, [B, C], on the device where the encoder computes; longer prompts are cut."""
    tokens = tokenizer(
        list(prompts), max_length=CLIP_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
    )
    pooled: Tensor = text_encoder(tokens.input_ids.to(execution_device(text_encoder))).pooler_output
    return pooled
