"""LTX-Video text-to-video: `LTXPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vramkit.pipelines.calling.calls import pipeline_call
from vramkit.pipelines.calling.inputs import Generators, Prompt
from vramkit.pipelines.calling.text_to_video import StepCallback, VideoOutput
from vramkit.pipelines.ltx.base import LTXVideoPipeline

__all__ = ["LTXPipeline"]


class LTXPipeline(LTXVideoPipeline):
    """Text-to-video with an LTX-Video checkpoint.

    Args:
        scheduler: flow-match Euler.
        vae: AutoencoderKLLTXVideo. May be None when latents are wanted.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        tokenizer: T5 tokenizer of transformers.
        transformer: LTXVideoTransformer3DModel.
    """

    @pipeline_call
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 512,
        width: int = 704,
        num_frames: int = 161,
        frame_rate: float = 25,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 3.0,
        guidance_rescale: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        decode_timestep: float | Sequence[float] = 0.0,
        decode_noise_scale: float | Sequence[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 128,
    ) -> VideoOutput:
        """Generate clips.

        Args:
            prompt: one prompt, or a list. Alternatively ``prompt_embeds``.
            negative_prompt: what to steer away from; used when ``guidance_scale`` > 1. Default: the empty prompt.
            height: pixels, a multiple of 32.
            width: pixels, a multiple of 32.
            num_frames: 8k + 1; other numbers are rounded down, with a warning, as the published pipeline does silently.
            frame_rate: frames per second that the motion is meant for.
            num_inference_steps: denoising steps; ignored where ``timesteps`` are given.
            timesteps: noise levels of the steps, falling, 1000 for pure noise, in place of even ones; the scheduler shifts
                them as it does those. (The published call has this argument but cannot use it.)
            guidance_scale: weight of the prompt against the negative prompt; up to 1 means no guidance, one transformer
                pass per step instead of two.
            guidance_rescale: share, 0 to 1, of a prediction whose spread is that without guidance (arXiv:2305.08891).
            num_videos_per_prompt: clips per prompt.
            generator: source of the noise, or one per clip. A generator on the CPU gives the same noise everywhere.
            latents: the noise itself as tokens, float [B, S, c].
            prompt_embeds: ready text embeddings [B, T, C].
            prompt_attention_mask: [B, T], ones for the tokens of ``prompt_embeds`` that count.
            negative_prompt_embeds: the same for the negative prompt, as is the next.
            negative_prompt_attention_mask: [B, T].
            decode_timestep: for a decoder with ``timestep_conditioning``: the noise level, 0 to 1, from which it denoises
                (checkpoints were published with 0.05 and 0.03); one, or one for each clip.
            decode_noise_scale: share of noise that is mixed into the latents before; by default ``decode_timestep``.
            output_type: ``"np"`` float32 [B, F, H, W, C] in 0 .. 1, ``"pt"`` [B, F, C, H, W] in 0 .. 1, ``"pil"``
                lists of pictures, ``"latent"`` float32 tokens [B, S, c], not decoded.
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
            frame_rate=frame_rate,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            decode_timestep=decode_timestep,
            decode_noise_scale=decode_noise_scale,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
