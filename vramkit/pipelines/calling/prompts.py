"""Prompts: text as checkpoints were trained to see it, and what T5 encoders make of it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vramkit.errors import ConfigError
from vramkit.extras import extra
from vramkit.pipelines.calling.pipeline import execution_device
from vramkit.pipelines.calling.texts import remembered


def clean_prompt(text: str) -> str:
    """Return ``text`` with broken encodings mended, HTML entities resolved and white space collapsed.

    Entities are resolved twice, because captions taken from web pages carry ``&amp;quot;``. The steps are those of the
    published Wan pipelines: two prompts that differ only in line breaks give the same tokens.
    """
    with extra("text", needed_for="a prompt"):
        import ftfy  # noqa: PLC0415 - only needed once a prompt is encoded

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


@remembered
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
