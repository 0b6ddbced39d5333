"""Wan text-to-video: `WanPipeline`, for checkpoints of Wan2.1 and Wan2.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from vramkit.pipelines.calling.calls import pipeline_call
from vramkit.pipelines.calling.inputs import Generators, Prompt
from vramkit.pipelines.calling.text_to_video import StepCallback, VideoOutput
from vramkit.pipelines.wan.base import WanVideoPipeline

__all__ = ["WanPipeline"]


class WanPipeline(WanVideoPipeline):
    """Text-to-video with a checkpoint of Wan2.1, Wan2.2 T2V A14B or Wan2.2 TI2V 5B.

    Args:
        tokenizer: T5 tokenizer of transformers.
        text_encoder: UMT5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        vae: AutoencoderKLWan. May be None when latents are wanted.
        scheduler: UniPC or flow-match Euler.
        transformer: WanTransformer3DModel.
        transformer_2: the second expert of A14B, which runs the steps below `boundary_ratio`.
        boundary_ratio: share of the training timesteps from which on `transformer` runs; None for one transformer.
        expand_timesteps: whether the transformer was trained with a timestep for each token (5B). Without an image they are
            all the same.

    Raises:
        ConfigError: a `transformer_2` that would never run, or a `boundary_ratio` that is none.
    """

    optional: ClassVar[tuple[str, ...]] = ("transformer_2",)
    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "transformer",
        "transformer_2",
        "scheduler",
        "vae",
    )

    def __init__(  # noqa: PLR0917 - the order of the published one
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        self._take(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )

    @pipeline_call
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> VideoOutput:
        """Generate clips.

        Args:
            prompt: one prompt, or a list. Alternatively ``prompt_embeds``.
            negative_prompt: what to steer away from; used when ``guidance_scale`` > 1. Default: the empty prompt.
            height: pixels, a multiple of 16.
            width: pixels, a multiple of 16.
            num_frames: 4k + 1; other numbers are rounded, with a warning, as the published pipeline does.
            num_inference_steps: denoising steps.
            guidance_scale: weight of the prompt against the negative prompt; up to 1 means no guidance, one transformer
                pass per step instead of two.
            guidance_scale_2: the same for the steps of ``transformer_2``; by default as ``guidance_scale``, which alone says
                whether there is guidance.
            num_videos_per_prompt: clips per prompt.
            generator: source of the noise, or one per clip. A generator on the CPU gives the same noise everywhere.
            latents: the noise itself, float [B, c, f, h, w].
            prompt_embeds: ready text embeddings [B, S, C].
            negative_prompt_embeds: the same for the negative prompt.
            output_type: ``"np"`` float32 [B, F, H, W, C] in 0 .. 1, ``"pt"`` [B, F, C, H, W] in 0 .. 1, ``"pil"``
                lists of pictures, ``"latent"`` float32 latents, not decoded.
            return_dict: accepted; the output is a named tuple and serves as either.
            attention_kwargs: passed to the transformer.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after each step; may return
                replacements for the tensors.
            callback_on_step_end_tensor_inputs: which of latents, prompt_embeds, negative_prompt_embeds it is given.
            max_sequence_length: tokens per prompt; longer prompts are cut.

        Returns:
            VideoOutput, whose ``frames`` has one entry per clip.

        Raises:
            ConfigError: arguments that do not fit, before anything is computed.
        """
        return self._generate(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
