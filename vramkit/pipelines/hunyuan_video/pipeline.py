"""HunyuanVideo text-to-video: encode the prompt twice, denoise latents, decode them into frames.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S prompt tokens.
Mirrors the call of diffusers' HunyuanVideoPipeline: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.calls import pipeline_call
from vramkit.pipelines.calling.inputs import (
    Generators,
    Prompt,
    check_finite,
    check_noise,
    check_prompts,
    check_tensor,
    falling_numbers,
    make_noise,
    whole_latent_frames,
)
from vramkit.pipelines.calling.pipeline import execution_device
from vramkit.pipelines.calling.text_to_video import (
    Conditions,
    StepCallback,
    TextToVideoPipeline,
    VideoOutput,
    wanted_tensors,
)
from vramkit.pipelines.hunyuan_video.prompts import PROMPT_TEMPLATE, check_template, encode_clip, encode_llama
from vramkit.pipelines.networks.text_masks import text_lengths

__all__ = ["HunyuanVideoPipeline"]


@dataclass(frozen=True, slots=True)
class _Text:
    """Prompts of a call, or what they were made into before."""

    prompt: Prompt
    embeds: Tensor | None  # [B, S, C]
    pooled: Tensor | None  # [B, C]
    mask: Tensor | None  # [B, S]

    def prompts(self, count: int) -> list[str]:
        """`count` prompts; one stands for all."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""] * count


class HunyuanVideoPipeline(TextToVideoPipeline):
    """Text-to-video with a HunyuanVideo checkpoint.

    Args:
        text_encoder: LlamaModel of transformers. It and its tokenizer may be None when embeds are given.
        tokenizer: tokenizer of Llama 3.
        transformer: HunyuanVideoTransformer3DModel.
        vae: AutoencoderKLHunyuanVideo. May be None when latents are wanted.
        scheduler: flow-match Euler.
        text_encoder_2: CLIPTextModel of transformers. It and its tokenizer may be None when pooled embeds are given.
        tokenizer_2: tokenizer of CLIP.
    """

    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "transformer",
        "scheduler",
        "vae",
    )
    fps: ClassVar[float] = 24.0
    schedule_arguments: ClassVar[tuple[str, ...]] = ("sigmas",)
    predictions: ClassVar[tuple[str, ...]] = ("flow_prediction",)

    def __init__(  # noqa: PLR0917 - the order of the published one
        self,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.text_encoder_2 = text_encoder_2
        self.tokenizer_2 = tokenizer_2
        self.vae_scale_factor_temporal: int = vae.config.temporal_compression_ratio if vae is not None else 4
        self.vae_scale_factor_spatial: int = vae.config.spatial_compression_ratio if vae is not None else 8
        self._true_cfg_scale = 1.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress runs the transformer on the negative prompt too."""
        return self._true_cfg_scale > 1.0

    @pipeline_call
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        height: int = 720,
        width: int = 1280,
        num_frames: int = 129,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        true_cfg_scale: float = 1.0,
        guidance_scale: float = 6.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_template: Mapping[str, Any] = PROMPT_TEMPLATE,
        max_sequence_length: int = 256,
    ) -> VideoOutput:
        """Generate clips.

        Args:
            prompt: one prompt, or a list. Alternatively ``prompt_embeds`` and ``pooled_prompt_embeds``.
            prompt_2: not used, with a warning when it differs: the published pipeline gives ``prompt`` to both encoders.
                For another text in CLIP give ``pooled_prompt_embeds``.
            negative_prompt: what to steer away from; used when ``true_cfg_scale`` > 1. There is no default.
            negative_prompt_2: as ``prompt_2``.
            height: pixels, a multiple of 16.
            width: pixels, a multiple of 16.
            num_frames: 4k + 1; other numbers are rounded down, with a warning, as the published pipeline does silently.
            num_inference_steps: denoising steps; ignored where ``sigmas`` are given.
            sigmas: noise levels from 1 downwards, before the scheduler shifts them.
            true_cfg_scale: weight of the prompt against the negative prompt; above 1 and with a negative prompt it takes
                two transformer passes per step.
            guidance_scale: the scale that the model was distilled to imitate; one pass per step.
            num_videos_per_prompt: clips per prompt.
            generator: source of the noise, or one per clip. A generator on the CPU gives the same noise everywhere.
            latents: the noise itself, float [B, c, f, h, w].
            prompt_embeds: ready states of the language model [B, S, C].
            pooled_prompt_embeds: ready CLIP embeddings [B, C].
            prompt_attention_mask: [B, S], 1 for the tokens of ``prompt_embeds`` that count; None for all.
            negative_prompt_embeds: the same for the negative prompt, as are the next two.
            negative_pooled_prompt_embeds: [B, C].
            negative_prompt_attention_mask: [B, S].
            output_type: ``"np"`` float32 [B, F, H, W, C] in 0 .. 1, ``"pt"`` [B, F, C, H, W] in 0 .. 1, ``"pil"``
                lists of pictures, ``"latent"`` latents, not decoded.
            return_dict: accepted; the output is a named tuple and serves as either.
            attention_kwargs: passed to the transformer.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after each step; may return
                replacements for the tensors.
            callback_on_step_end_tensor_inputs: which of latents, prompt_embeds, negative_prompt_embeds it is given.
            prompt_template: ``template``, the text around a prompt, and ``crop_start``, the tokens before it.
            max_sequence_length: tokens per prompt behind ``crop_start``; longer prompts are cut.

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
        check_finite(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        levels = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        if sigmas is not None:
            levels = falling_numbers("sigmas", sigmas, most=1, to_zero=True)
        check_template(prompt_template)
        num_frames = whole_latent_frames(num_frames, factor=self.vae_scale_factor_temporal, down=True)
        prompts = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        _warn_of_second_prompts(prompt_2=(prompt_2, prompt), negative_prompt_2=(negative_prompt_2, negative_prompt))
        texts = [_Text(prompt, prompt_embeds, pooled_prompt_embeds, prompt_attention_mask)]
        negative = _Text(
            negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask
        )
        if true_cfg_scale > 1 and (negative.prompt is not None or negative.embeds is not None):
            texts.append(negative)
        for name, text in zip(("", "negative_"), texts, strict=False):
            self._check_text(name, text, prompts)
        shape = self._latent_shape(prompts * num_videos_per_prompt, height, width, num_frames)
        check_noise(shape, generator, latents, device=self.device)

        self.scheduler.set_timesteps(sigmas=levels, device=self.device)
        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._true_cfg_scale = true_cfg_scale if len(texts) > 1 else 1.0
        self._enter("encode", **self._sizes)
        conditions = self._encode(texts, prompts, num_videos_per_prompt, prompt_template, max_sequence_length)
        if latents is None:
            latents = make_noise(shape, generator, device=self.device)
        latents = latents.to(self.device, torch.float32)
        latents = self._denoise(latents, conditions, callback=callback_on_step_end, wanted=wanted)
        return self._finish(latents, output_type)

    @torch.no_grad()
    def encode_prompt(  # noqa: PLR0917 - the order of the published one
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        prompt_template: Mapping[str, Any] = PROMPT_TEMPLATE,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_sequence_length: int = 256,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return states [B, S, C], pooled embeddings [B, C] and a mask [B, S].

        What is given passes through; ``prompt_2`` is not used, as in a call. Each prompt stands ``num_videos_per_prompt``
        times in a row. Results are on ``device``, where the pipeline computes unless it is given, states in ``dtype``, by
        default that of the text encoder.
        """
        check_template(prompt_template)
        prompts = check_prompts(prompt, None, prompt_embeds, None)
        _warn_of_second_prompts(prompt_2=(prompt_2, prompt))
        text = _Text(prompt, prompt_embeds, pooled_prompt_embeds, prompt_attention_mask)
        self._check_text("", text, prompts)
        embeds, mask = self._states(text, prompts, prompt_template, int(max_sequence_length), dtype)
        results = (embeds, self._pooled(text, prompts), mask)
        embeds, pooled, mask = (
            each.to(device or self.device).repeat_interleave(int(num_videos_per_prompt), dim=0) for each in results
        )
        return embeds, pooled, mask

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [B, c, f, h, w] of unit variance into video [B, 3, F, H, W] around -1 .. 1."""
        latents = latents.to(execution_device(self.vae), self.vae.dtype)
        video: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return video

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _encode(
        self, texts: list[_Text], prompts: int, copies: int, template: Mapping[str, Any], max_sequence_length: int
    ) -> Conditions:
        """What the transformer is told; one encoder after the other, so that each comes to the device once."""
        states = [self._states(text, prompts, template, max_sequence_length) for text in texts]
        pooled = [self._pooled(text, prompts) for text in texts]
        repeat = partial(torch.repeat_interleave, repeats=copies, dim=0)
        # In the dtype of the model, as the published pipeline rounds it.
        scale = torch.full((prompts * copies,), self._guidance_scale, dtype=self.dtype, device=self.device)
        told = [
            {
                "encoder_hidden_states": repeat(embeds).to(self.dtype),
                # Lengths are read here, once: in the transformer a mask would be waited for at every step.
                "encoder_attention_mask": text_lengths(repeat(mask)) or repeat(mask),
                "pooled_projections": repeat(vector).to(self.dtype),
            }
            for (embeds, mask), vector in zip(states, pooled, strict=True)
        ]
        return Conditions(*told, shared={"guidance": scale * 1000.0})

    def _states(
        self,
        text: _Text,
        prompts: int,
        template: Mapping[str, Any],
        max_sequence_length: int,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States [B, S, C], new ones in the text encoder's dtype, and a mask [B, S], where the pipeline computes."""
        embeds, mask = text.embeds, text.mask
        if embeds is None:
            embeds, mask = encode_llama(
                text.prompts(prompts),
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
                template=template,
                max_sequence_length=max_sequence_length,
            )
            embeds = embeds.to(dtype or self.text_encoder.dtype)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        return embeds.to(self.device), mask.to(self.device)

    def _pooled(self, text: _Text, prompts: int) -> Tensor:
        """Pooled embeddings [B, C], where the pipeline computes."""
        pooled = text.pooled
        if pooled is None:
            pooled = encode_clip(text.prompts(prompts), tokenizer=self.tokenizer_2, text_encoder=self.text_encoder_2)
        return pooled.to(self.device)

    def _predict_noise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        # After the first step latents have the dtype of the model, and the published pipeline rounds timesteps to it too.
        return super()._predict_noise(latents, timestep.to(latents.dtype), conditions)

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        return negative + self._true_cfg_scale * (positive - negative)

    def _guidance_note(self) -> str | None:
        return "a HunyuanVideo call keeps the scales that it was given, as published"

    def _pixels_per_patch(self) -> int:
        """What height and width are multiples of: 16 at the least, as the published pipeline asks for."""
        patch = self.transformer.config.patch_size if self.transformer is not None else 1
        return math.lcm(16, self.vae_scale_factor_spatial * patch)

    def _check_text(self, name: str, text: _Text, prompts: int) -> None:
        """Refuse ready parts that do not fit one another, and prompts that nothing here can encode."""
        if text.embeds is None and (self.text_encoder is None or self.tokenizer is None):
            raise ConfigError(f"this pipeline has no text_encoder or tokenizer: give {name}prompt_embeds")
        if text.pooled is None and text.prompt is None:
            raise ConfigError(f"{name}prompt_embeds is given without {name}pooled_prompt_embeds: give both")
        if text.pooled is None and (self.text_encoder_2 is None or self.tokenizer_2 is None):
            raise ConfigError(f"this pipeline has no text_encoder_2 or tokenizer_2: give {name}pooled_prompt_embeds")
        if text.pooled is not None:
            config = None if self.transformer is None else self.transformer.config
            channels = getattr(config, "pooled_projection_dim", "channels")
            because = "what text_encoder_2 of this checkpoint makes"
            check_tensor(f"{name}pooled_prompt_embeds", text.pooled, (prompts, channels), because=because)
        if text.mask is None:
            return
        if text.embeds is None:
            raise ConfigError(f"{name}prompt_attention_mask belongs to {name}prompt_embeds: give both or none")
        check_tensor(f"{name}prompt_attention_mask", text.mask, text.embeds.shape[:2], floating=False)

    def _latent_shape(self, clips: int, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        return (
            clips,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )


def _warn_of_second_prompts(**pairs: tuple[Prompt, Prompt]) -> None:
    """Say that a prompt for CLIP alone, (second, first) by its name, has no effect."""
    for name, (second, first) in pairs.items():
        if second is not None and second != first:
            pooled = f"{name.removesuffix('prompt_2')}pooled_prompt_embeds"
            warnings.warn(
                f"{name} is not used: the published pipeline gives the first prompt to both encoders. For another text in "
                f"CLIP give {pooled}",
                UserWarning,
                stacklevel=4,  # the caller of the pipeline, past torch.no_grad
            )
