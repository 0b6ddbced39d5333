"""Text-to-video pipelines whose transformer is told the states of a T5 encoder, and of the text nothing else."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.inputs import Prompt
from vramkit.pipelines.text_to_video import Conditions, TextToVideoPipeline

__all__ = ["T5ToVideoPipeline"]


class T5ToVideoPipeline(TextToVideoPipeline):
    """A pipeline with a T5 encoder and its tokenizer; a family says in `_encode` how its prompts are encoded."""

    tokenizer: Any
    text_encoder: Any

    prompt_tokens: ClassVar[int] = 512  # what prompts are padded to and cut at unless a call says otherwise

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompt,
        negative_prompt: Prompt = None,
        *,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text embeddings [B, S, C] of prompts and negative prompts, in the transformer's dtype.

        Ready embeddings pass through. The second is None without guidance. Each prompt stands ``num_videos_per_prompt``
        times in a row.
        """
        tokens = self.prompt_tokens if max_sequence_length is None else max_sequence_length

        def embed(texts: list[str], ready: Tensor | None) -> Tensor:
            embeds = self._encode(texts, tokens) if ready is None else ready
            return embeds.to(self.device, self.dtype).repeat_interleave(num_videos_per_prompt, dim=0)

        positive = embed([prompt] if isinstance(prompt, str) else prompt or [], prompt_embeds)
        if not do_classifier_free_guidance:
            return positive, None
        if not isinstance(negative_prompt, list):
            negative_prompt = [negative_prompt or ""] * (positive.shape[0] // num_videos_per_prompt)
        return positive, embed(negative_prompt, negative_prompt_embeds)

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _encode(self, texts: list[str], max_sequence_length: int) -> Tensor:
        """Embeddings [B, S, C] of prompts."""
        raise AttributeError(f"{type(self).__name__} does not say how its prompts are encoded")

    def _conditions(self, prompt: Prompt, negative_prompt: Prompt, **options: Any) -> Conditions:
        """What the transformer is told; options as those of `encode_prompt`."""
        guided = self.do_classifier_free_guidance
        embeds = self.encode_prompt(prompt, negative_prompt, do_classifier_free_guidance=guided, **options)
        return Conditions(*({"encoder_hidden_states": each} for each in embeds if each is not None))

    def _check_encoder(self, prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None) -> None:
        """Refuse prompts that nothing here can encode."""
        given = [prompt_embeds, negative_prompt_embeds] if self.do_classifier_free_guidance else [prompt_embeds]
        if (self.text_encoder is None or self.tokenizer is None) and any(embeds is None for embeds in given):
            raise ConfigError(
                "this pipeline has no text encoder or tokenizer: give prompt_embeds (and negative_prompt_embeds when "
                "guidance_scale > 1)"
            )
