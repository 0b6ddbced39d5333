"""Text-to-video pipelines whose transformer is told the states of a T5 encoder, and of the text nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.inputs import Prompt, check_prompts, plain_number
from vramkit.pipelines.calling.text_to_video import Conditions, TextToVideoPipeline

__all__ = ["T5ToVideoPipeline"]


class T5ToVideoPipeline(TextToVideoPipeline):
    """A pipeline with a T5 encoder and its tokenizer; a family says in `_encode` how its prompts are encoded."""

    tokenizer: Any
    text_encoder: Any

    @torch.no_grad()
    def encode_prompt(  # noqa: PLR0917 - the order of the published ones
        self,
        prompt: Prompt,
        negative_prompt: Prompt = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text embeddings [B, S, C] of prompts and negative prompts, as calls take them.

        Args:
            prompt: one prompt, or a list; None where ``prompt_embeds`` are given.
            negative_prompt: as many, or one for all; by default the empty prompt.
            do_classifier_free_guidance: whether the second result is wanted; else it is None.
            num_videos_per_prompt: how often each prompt stands in a row.
            prompt_embeds: ready embeddings, which keep their dtype.
            negative_prompt_embeds: the same for the negative prompt.
            max_sequence_length: tokens per prompt; longer prompts are cut. Calls take more by themselves (Wan: 512).
            device: of the results; by default where the pipeline computes.
            dtype: of the results; by default that of the text encoder.
        """
        prompts = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)

        def embed(texts: Prompt, ready: Tensor | None) -> Tensor:
            embeds = ready
            if embeds is None:
                listed = texts if isinstance(texts, list) else [texts or ""] * prompts
                embeds = self._encode(listed, plain_number(max_sequence_length)).to(
                    dtype=dtype or self.text_encoder.dtype
                )
            return embeds.to(device or self.device).repeat_interleave(int(num_videos_per_prompt), dim=0)

        positive = embed(prompt, prompt_embeds)
        return positive, embed(negative_prompt, negative_prompt_embeds) if do_classifier_free_guidance else None

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _encode(self, texts: list[str], max_sequence_length: int) -> Tensor:
        """Embeddings [B, S, C] of prompts."""
        raise AttributeError(f"{type(self).__name__} does not say how its prompts are encoded")

    def _conditions(self, prompt: Prompt, negative_prompt: Prompt, **options: Any) -> Conditions:
        """What the transformer is told; options as those of `encode_prompt`."""
        guided = self.do_classifier_free_guidance
        embeds = self.encode_prompt(prompt, negative_prompt, do_classifier_free_guidance=guided, **options)
        return Conditions(*({"encoder_hidden_states": each.to(self.dtype)} for each in embeds if each is not None))

    def _check_encoder(self, prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None) -> None:
        """Refuse prompts that nothing here can encode."""
        given = [prompt_embeds, negative_prompt_embeds] if self.do_classifier_free_guidance else [prompt_embeds]
        if (self.text_encoder is None or self.tokenizer is None) and any(embeds is None for embeds in given):
            raise ConfigError(
                "this pipeline has no text encoder or tokenizer: give prompt_embeds (and negative_prompt_embeds when "
                "guidance_scale > 1)"
            )
