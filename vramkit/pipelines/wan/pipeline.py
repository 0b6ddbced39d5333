"""Wan2.1 text-to-video: encode the prompt, denoise latents with guidance, decode them into frames.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S prompt tokens.
Mirrors the call of diffusers' WanPipeline: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from vramkit.errors import CheckpointError
from vramkit.pipelines.inputs import (
    Generators,
    Prompt,
    check_finite,
    check_noise,
    check_prompts,
    make_noise,
    whole_latent_frames,
)
from vramkit.pipelines.pipeline import execution_device
from vramkit.pipelines.prompts import clean_prompt
from vramkit.pipelines.t5_to_video import T5ToVideoPipeline
from vramkit.pipelines.text_encoders import encode_t5
from vramkit.pipelines.text_to_video import StepCallback, VideoOutput, wanted_tensors


class WanPipeline(T5ToVideoPipeline):
    """Text-to-video with a Wan2.1 checkpoint.

    Args:
        tokenizer: T5 tokenizer of transformers.
        text_encoder: UMT5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        vae: AutoencoderKLWan. May be None when latents are wanted.
        scheduler: UniPC or flow-match Euler.
        transformer: WanTransformer3DModel.
        transformer_2: the second expert of Wan2.2, which is not supported: must be None.
        boundary_ratio: of Wan2.2: must be None.
        expand_timesteps: of Wan2.2: must be False.
    """

    vae_in_fp32: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("transformer_2",)
    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "transformer",
        "transformer_2",
        "scheduler",
        "vae",
    )

    def __init__(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: None = None,
        boundary_ratio: None = None,
        expand_timesteps: Literal[False] = False,
    ) -> None:
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            raise CheckpointError(
                "transformer_2, boundary_ratio or expand_timesteps is set: this is a Wan2.2 checkpoint, and only "
                "Wan2.1 text-to-video is supported"
            )
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.transformer_2 = None
        self.scheduler = scheduler
        self.vae = vae
        self.boundary_ratio = None
        self.expand_timesteps = False
        self.vae_scale_factor_temporal: int = vae.config.scale_factor_temporal if vae is not None else 4
        self.vae_scale_factor_spatial: int = vae.config.scale_factor_spatial if vae is not None else 8

    @torch.no_grad()  # not inference_mode: the slots that weights stream through are ordinary tensors
    def __call__(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
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
        wanted = wanted_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_call(
            height=height,
            width=width,
            multiple=self._pixels_per_patch(),
            output_type=output_type,
            wanted=wanted,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        check_finite(guidance_scale=guidance_scale)
        num_frames = whole_latent_frames(num_frames, factor=self.vae_scale_factor_temporal)
        prompts = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._check_encoder(prompt_embeds, negative_prompt_embeds)
        shape = self._latent_shape(prompts * num_videos_per_prompt, height, width, num_frames)
        check_noise(shape, generator, latents, device=self.device)

        conditions = self._conditions(
            prompt,
            negative_prompt,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        if latents is None:
            latents = make_noise(shape, generator, device=self.device)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents.to(self.device, torch.float32)
        latents = self._denoise(latents, conditions, callback=callback_on_step_end, wanted=wanted)
        return self._finish(latents, output_type)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [B, c, f, h, w] of unit variance into video [B, 3, F, H, W] in -1 .. 1."""
        config = self.vae.config
        latents = latents.to(execution_device(self.vae), self.vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        # Divided by the reciprocal rather than multiplied: the published pipeline rounds that way.
        video: torch.Tensor = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return video

    def _encode(self, texts: list[str], max_sequence_length: int) -> torch.Tensor:
        """Embeddings [B, S, C] of prompts with zeros behind the last token: Wan was trained without padding tokens."""
        embeds, mask = encode_t5(
            [clean_prompt(text) for text in texts],
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            max_sequence_length=max_sequence_length,
            attend_to_padding=False,
        )
        return embeds.masked_fill_(~mask[..., None], 0)

    def _pixels_per_patch(self) -> int:
        """What height and width are multiples of: 16 at the least, as the published pipeline asks for."""
        patch = max(self.transformer.config.patch_size[1:]) if self.transformer is not None else 1
        return math.lcm(16, self.vae_scale_factor_spatial * patch)

    def _latent_shape(self, clips: int, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        return (
            clips,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
