"""LTX-Video text-to-video: encode the prompt, denoise latents as tokens, decode them into frames.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S = f h w tokens, T prompt
tokens. Mirrors the call of diffusers' LTXPipeline: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vramkit.errors import ConfigError
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
from vramkit.pipelines.text_encoders import encode_t5
from vramkit.pipelines.text_masks import text_lengths
from vramkit.pipelines.text_to_video import (
    Conditions,
    StepCallback,
    TextToVideoPipeline,
    VideoOutput,
    wanted_tensors,
)

__all__ = ["LTXPipeline"]

Grid = tuple[int, int, int]  # f, h, w


@dataclass(frozen=True, slots=True)
class _Text:
    """Prompts of a call, or what they were made into before."""

    name: str  # of the argument
    prompt: Prompt
    embeds: Tensor | None  # [B, T, C]
    mask: Tensor | None  # [B, T]

    def prompts(self, count: int) -> list[str]:
        """`count` prompts; one stands for all."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""] * count


class LTXPipeline(TextToVideoPipeline):
    """Text-to-video with an LTX-Video checkpoint.

    Args:
        scheduler: flow-match Euler.
        vae: AutoencoderKLLTXVideo. May be None when latents are wanted.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        tokenizer: T5 tokenizer of transformers.
        transformer: LTXVideoTransformer3DModel.
    """

    component_names: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")
    fps: ClassVar[float] = 25.0

    def __init__(self, *, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.scheduler = scheduler
        self.vae = vae
        self.vae_spatial_compression_ratio: int = vae.spatial_compression_ratio if vae is not None else 32
        self.vae_temporal_compression_ratio: int = vae.temporal_compression_ratio if vae is not None else 8
        self._guidance_rescale = 0.0

    @property
    def guidance_rescale(self) -> float:
        """How much of the spread of the prompt's own prediction the call in progress restores."""
        return self._guidance_rescale

    @torch.no_grad()  # not inference_mode: the slots that weights stream through are ordinary tensors
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 512,
        width: int = 704,
        num_frames: int = 161,
        frame_rate: float = 25,
        num_inference_steps: int = 50,
        *,
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
        wanted = wanted_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_call(
            height=height,
            width=width,
            multiple=math.lcm(32, self.vae_spatial_compression_ratio),
            output_type=output_type,
            wanted=wanted,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        check_finite(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, frame_rate=frame_rate)
        if frame_rate <= 0:
            raise ConfigError(f"frame_rate is {frame_rate}; expected frames per second, above 0")
        levels = _noise_levels(num_inference_steps, timesteps)
        grid = self._grid(height, width, whole_latent_frames(num_frames, factor=self._rate, down=True))
        prompts = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        clips = prompts * num_videos_per_prompt
        decoding = {
            "decode_timestep": _per_clip("decode_timestep", decode_timestep, clips),
            "decode_noise_scale": _per_clip("decode_noise_scale", decode_noise_scale, clips),
        }
        texts = [_Text("prompt", prompt, prompt_embeds, prompt_attention_mask)]
        if guidance_scale > 1:
            negative = negative_prompt_embeds, negative_prompt_attention_mask
            texts.append(_Text("negative_prompt", negative_prompt, *negative))
        for text in texts:
            self._check_text(text)
        check_noise((clips, math.prod(grid), self._channels()), generator, latents, device=self.device)

        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._guidance_rescale = guidance_rescale
        conditions = self._conditions(texts, prompts, num_videos_per_prompt, max_sequence_length, grid, frame_rate)
        if latents is None:
            noise = make_noise((clips, self._channels(), *grid), generator, device=self.device)
            latents = noise.flatten(2).transpose(1, 2)
        self.scheduler.set_timesteps(sigmas=levels, mu=self._shift(math.prod(grid)), device=self.device)
        latents = latents.to(self.device, torch.float32)
        latents = self._denoise(latents, conditions, callback=callback_on_step_end, wanted=wanted)
        if output_type != "latent":
            latents = latents.transpose(1, 2).reshape(clips, -1, *grid)
        return self._finish(latents, output_type, generator=generator, **decoding)

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
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 128,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return embeddings [B, T, C] in the transformer's dtype and masks [B, T], bool, of prompts and negative prompts.

        The order is embeddings, mask, negative embeddings, negative mask; the last two are None without guidance. What is
        given passes through. Each prompt stands ``num_videos_per_prompt`` times in a row.
        """
        prompts = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text = _Text("prompt", prompt, prompt_embeds, prompt_attention_mask)
        negative = _Text("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        for each in (text, negative) if do_classifier_free_guidance else (text,):
            self._check_text(each)
        embeds, mask = self._encode(text, prompts, num_videos_per_prompt, max_sequence_length)
        if not do_classifier_free_guidance:
            return embeds, mask, None, None
        return embeds, mask, *self._encode(negative, prompts, num_videos_per_prompt, max_sequence_length)

    def decode_latents(
        self,
        latents: Tensor,
        *,
        generator: Generators = None,
        decode_timestep: Sequence[float] | None = None,
        decode_noise_scale: Sequence[float] | None = None,
    ) -> Tensor:
        """Decode latents [B, c, f, h, w] of unit variance into video [B, 3, F, H, W] around -1 .. 1.

        The last three, the two numbers one for each clip, are for a decoder with ``timestep_conditioning``: noise from
        ``generator`` is mixed in, and the decoder is told how much of it there is.
        """
        latents = latents.to(execution_device(self.vae))
        mean, std = (each.view(1, -1, 1, 1, 1).to(latents) for each in (self.vae.latents_mean, self.vae.latents_std))
        latents = (latents * std / self.vae.config.scaling_factor + mean).to(self.dtype)
        timestep = None
        if self.vae.config.timestep_conditioning:
            noise = make_noise(tuple(latents.shape), generator, device=latents.device, dtype=latents.dtype)
            timestep = latents.new_tensor(decode_timestep or [0.0] * len(latents))
            scale = timestep if decode_noise_scale is None else latents.new_tensor(decode_noise_scale)
            scale = scale.view(-1, 1, 1, 1, 1)
            latents = (1 - scale) * latents + scale * noise
        video: Tensor = self.vae.decode(latents.to(self.vae.dtype), timestep, return_dict=False)[0]
        return video

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _conditions(  # noqa: PLR0917
        self, texts: list[_Text], prompts: int, copies: int, max_sequence_length: int, grid: Grid, frame_rate: float
    ) -> Conditions:
        """What the transformer is told, with each text in one pass."""
        pixels = self.vae_spatial_compression_ratio
        sizes = {
            **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
            "rope_interpolation_scale": (self._rate / frame_rate, pixels, pixels),
        }
        told = []
        for text in texts:
            embeds, mask = self._encode(text, prompts, copies, max_sequence_length)
            # Lengths are read here, once: in the transformer a mask would be waited for at every step.
            told.append(
                {"encoder_hidden_states": embeds, "encoder_attention_mask": text_lengths(mask) or mask, **sizes}
            )
        return Conditions(*told)

    def _encode(self, text: _Text, prompts: int, copies: int, max_sequence_length: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, C] in the transformer's dtype and masks [B, T], bool, on its device."""
        embeds, mask = text.embeds, text.mask
        if embeds is None:
            embeds, mask = encode_t5(
                text.prompts(prompts),
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
                max_sequence_length=max_sequence_length,
                attend_to_padding=True,
            )
        assert mask is not None
        embeds, mask = embeds.to(self.device, self.dtype), mask.to(self.device).bool()
        return embeds.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        positive, negative = positive.float(), negative.float()
        guided = super()._guided(positive, negative, timestep)
        if self._guidance_rescale <= 0:
            return guided
        dims = tuple(range(1, positive.ndim))
        spread = positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        return self._guidance_rescale * (guided * spread) + (1 - self._guidance_rescale) * guided

    def _step(self, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        return super()._step(noise.float(), timestep, latents)  # the scheduler returns the dtype of the prediction

    def _shift(self, tokens: int) -> float:
        """How far noise levels are shifted, for a scheduler that does so by the number of tokens: linear between two."""
        config = self.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        shift: float = tokens * slope + (low - slope * few)
        return shift

    # -- checks --------------------------------------------------------------------------------------------------------

    @property
    def _rate(self) -> int:
        """Frames per latent frame."""
        return self.vae_temporal_compression_ratio

    def _channels(self) -> int:
        """Channels of a latent; checkpoints with several latents in a token were never published."""
        config = self.transformer.config
        if (config.patch_size, config.patch_size_t) != (1, 1):
            raise ConfigError(
                f"the transformer's patch_size={config.patch_size}, patch_size_t={config.patch_size_t}; expected 1 and 1"
            )
        channels: int = config.in_channels
        return channels

    def _grid(self, height: int, width: int, num_frames: int) -> Grid:
        pixels = self.vae_spatial_compression_ratio
        return (num_frames - 1) // self._rate + 1, height // pixels, width // pixels

    def _check_text(self, text: _Text) -> None:
        """Refuse ready embeddings whose mask is missing or of another shape, and prompts that nothing here can encode."""
        if text.embeds is None:
            if self.text_encoder is None or self.tokenizer is None:
                raise ConfigError(
                    f"this pipeline has no text encoder or tokenizer: give {text.name}_embeds and "
                    f"{text.name}_attention_mask"
                )
            if text.mask is not None:
                raise ConfigError(f"{text.name}_attention_mask belongs to {text.name}_embeds: give both or none")
        elif text.mask is None or text.mask.shape != text.embeds.shape[:2]:
            given = None if text.mask is None else tuple(text.mask.shape)
            raise ConfigError(
                f"{text.name}_attention_mask is {given}; expected {tuple(text.embeds.shape[:2])}, ones for the tokens of "
                f"{text.name}_embeds that count"
            )


def _noise_levels(steps: int, timesteps: Sequence[float] | None) -> Sequence[float]:
    """Noise levels before they are shifted: even ones from 1 to 1 / steps, or those that are given."""
    if timesteps is None:
        levels: list[float] = np.linspace(1.0, 1 / steps, steps).tolist()
        return levels
    check_finite(**{f"timesteps[{i}]": timestep for i, timestep in enumerate(timesteps)})
    falling = all(before > after for before, after in pairwise([*timesteps, 0.0]))
    if not timesteps or timesteps[0] > 1000 or not falling:
        raise ConfigError(f"timesteps is {list(timesteps)}; expected falling numbers, from 1000 at most to above 0")
    return [timestep / 1000 for timestep in timesteps]


def _per_clip(name: str, value: float | Sequence[float] | None, clips: int) -> list[float] | None:
    """One number for each clip; a single one stands for all, None stays None."""
    if value is None:
        return None
    numbers = list(value) if isinstance(value, Sequence) else [value] * clips
    if len(numbers) != clips:
        raise ConfigError(
            f"{name} has {len(numbers)} entries; expected one number, or one for each of the {clips} clips"
        )
    for number in numbers:
        check_finite(**{name: number})
    if outside := [number for number in numbers if not 0 <= number <= 1]:
        raise ConfigError(f"{name} is {outside[0]}; expected a number from 0 to 1")
    return numbers
