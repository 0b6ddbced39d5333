"""CogVideoX text-to-video: encode the prompt, denoise latents with guidance, decode them into frames.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S prompt tokens.
Mirrors the call of diffusers' CogVideoXPipeline: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.inputs import Generators, Prompt, check_finite, check_noise, check_prompts, make_noise
from vramkit.pipelines.pipeline import execution_device
from vramkit.pipelines.schedulers.cogvideox_dpm import CogVideoXDPMScheduler
from vramkit.pipelines.t5_to_video import T5ToVideoPipeline
from vramkit.pipelines.text_encoders import encode_t5
from vramkit.pipelines.text_to_video import StepCallback, VideoOutput, wanted_tensors

__all__ = ["CogVideoXPipeline"]


class CogVideoXPipeline(T5ToVideoPipeline):
    """Text-to-video with a CogVideoX (2B, 5B) or CogVideoX1.5 checkpoint.

    Args:
        tokenizer: T5 tokenizer of transformers.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        vae: AutoencoderKLCogVideoX. May be None when latents are wanted.
        transformer: CogVideoXTransformer3DModel.
        scheduler: CogVideoXDDIMScheduler or CogVideoXDPMScheduler.
    """

    fps: ClassVar[float] = 8.0
    prompt_tokens: ClassVar[int] = 226
    component_names: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")

    def __init__(self, *, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.transformer = transformer
        self.scheduler = scheduler
        self.vae_scale_factor_spatial: int = vae.config.scale_factor_spatial if vae is not None else 8
        self.vae_scale_factor_temporal = int(vae.config.temporal_compression_ratio) if vae is not None else 4
        self._dynamic_from: tuple[float, int] | None = None  # guidance scale and steps of a call that varies the scale
        self._generator: Generators = None

    @torch.no_grad()  # not inference_mode: the slots that weights stream through are ordinary tensors
    def __call__(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        *,
        num_inference_steps: int = 50,
        timesteps: None = None,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 226,
    ) -> VideoOutput:
        """Generate clips.

        Args:
            prompt: one prompt, or a list. Alternatively ``prompt_embeds``.
            negative_prompt: what to steer away from; used when ``guidance_scale`` > 1. Default: the empty prompt.
            height: pixels, a multiple of 16. Default: what the checkpoint was trained on, as for the next two.
            width: pixels, a multiple of 16.
            num_frames: 8k or 8k + 1. Other multiples of 4, and these plus 1, make 8k or 8k + 1 frames as in the published
                pipeline, with a warning.
            num_inference_steps: denoising steps.
            timesteps: must be None: the schedulers of this family space their timesteps by themselves.
            guidance_scale: weight of the prompt against the negative prompt; up to 1 means no guidance, one transformer
                pass per step instead of two.
            use_dynamic_cfg: vary the guidance scale from step to step, as published.
            num_videos_per_prompt: clips per prompt. The published pipeline reads it and makes one.
            eta: accepted and without effect, since no scheduler of this family uses it.
            generator: source of the noise, or one per clip. A generator on the CPU gives the same noise everywhere.
            latents: the noise itself, float [B, f, c, h, w]; 1.5 wants an even number of latent frames.
            prompt_embeds: ready text embeddings [B, S, C].
            negative_prompt_embeds: the same for the negative prompt.
            output_type: ``"pil"`` lists of pictures, ``"np"`` float32 [B, F, H, W, C] in 0 .. 1, ``"pt"`` [B, F, C, H, W]
                in 0 .. 1, ``"latent"`` latents, not decoded.
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
        height, width, num_frames = self._trained_sizes(height, width, num_frames)
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
        check_finite(guidance_scale=guidance_scale, eta=eta)
        self._check_size_and_steps(height, width, timesteps)
        latent_frames = self._latent_frames(num_frames)
        prompts = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._check_encoder(prompt_embeds, negative_prompt_embeds)
        padding = -latent_frames % self.transformer.config.patch[0]
        shape = self._latent_shape(prompts * num_videos_per_prompt, latent_frames + padding, height, width)
        check_noise(shape, generator, latents, device=self.device)

        self._generator = generator
        self._dynamic_from = (guidance_scale, num_inference_steps) if use_dynamic_cfg else None
        conditions = self._conditions(
            prompt,
            negative_prompt,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        if latents is None:
            latents = make_noise(shape, generator, device=self.device, dtype=self.dtype)
        latents = self._denoise(latents.to(self.device), conditions, callback=callback_on_step_end, wanted=wanted)
        return self._finish(latents if output_type == "latent" else latents[:, padding:], output_type)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [B, f, c, h, w] of unit variance into video [B, 3, F, H, W] in -1 .. 1."""
        latents = latents.to(execution_device(self.vae), self.vae.dtype).transpose(1, 2)
        video: Tensor = self.vae.decode(1 / self.vae.config.scaling_factor * latents, return_dict=False)[0]
        return video

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        """Combine two predictions in fp32, with the scale of this step if it varies."""
        if self._dynamic_from is not None:
            scale, steps = self._dynamic_from
            # The published formula, which takes a timestep of training (0 to 999) for one of `steps`.
            swing = 1 - math.cos(math.pi * ((steps - float(timestep)) / steps) ** 5)
            self._guidance_scale = 1 + scale * swing / 2
        return super()._guided(positive.float(), negative.float(), timestep)

    def _step(self, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """Take one step in fp32; the latents go on in the transformer's dtype."""
        drawn = {"generator": self._generator} if isinstance(self.scheduler, CogVideoXDPMScheduler) else {}
        stepped: Tensor = self.scheduler.step(noise.float(), timestep, latents, return_dict=False, **drawn)[0]
        return stepped.to(self.dtype)

    def _encode(self, texts: list[str], max_sequence_length: int) -> Tensor:
        """Embeddings [B, S, C] of prompts, padding included: CogVideoX was trained with it."""
        embeds, _ = encode_t5(
            texts,
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            max_sequence_length=max_sequence_length,
            attend_to_padding=True,
        )
        return embeds

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _trained_sizes(self, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
        """Fill in what the checkpoint was trained on; without a transformer, which is refused later, anything."""
        if self.transformer is None:
            return height or 16, width or 16, num_frames or 1
        config, ratio = self.transformer.config, self.vae_scale_factor_spatial
        return (
            config.sample_height * ratio if height is None else height,
            config.sample_width * ratio if width is None else width,
            config.sample_frames if num_frames is None else num_frames,
        )

    def _pixels_per_patch(self) -> int:
        return self.vae_scale_factor_spatial * (
            self.transformer.config.patch_size if self.transformer is not None else 1
        )

    def _check_size_and_steps(self, height: int, width: int, timesteps: Any) -> None:
        """Refuse what 1.5 has no positions for, and timesteps."""
        config, ratio = self.transformer.config, self.vae_scale_factor_spatial
        for name, pixels, most in (
            ("height", height, config.sample_height * ratio),
            ("width", width, config.sample_width * ratio),
        ):
            if config.patch_size_t is not None and pixels > most:
                raise ConfigError(f"{name} is {pixels}; this checkpoint has positions for at most {most} pixels")
        if timesteps is not None:
            raise ConfigError(
                f"timesteps is {timesteps!r}; the schedulers of CogVideoX space their timesteps by themselves: give "
                "num_inference_steps"
            )

    def _latent_frames(self, num_frames: int) -> int:
        """How many latent frames make a clip; refuses, or warns of, clips of another number of frames."""
        rate = self.vae_scale_factor_temporal
        latent_frames = (num_frames - 1) // rate + 1
        # The VAE makes one frame of the first of an odd number of latent frames, and `rate` of every other.
        made = rate * latent_frames - (rate - 1) * (latent_frames % 2)
        if num_frames == made:
            return latent_frames
        if num_frames % rate > 1:
            below = num_frames // (2 * rate) * 2 * rate + 1
            raise ConfigError(
                f"num_frames is {num_frames}; CogVideoX makes {2 * rate} * k or {2 * rate} * k + 1 frames, for example "
                f"{below} or {below + 2 * rate - 1}"
            )
        warnings.warn(
            f"num_frames is {num_frames}, but CogVideoX makes {2 * rate} * k or {2 * rate} * k + 1 frames. Making {made} "
            "frames, as the published pipeline does",
            UserWarning,
            stacklevel=4,  # the caller of the pipeline, past torch.no_grad
        )
        return latent_frames

    def _latent_shape(self, clips: int, frames: int, height: int, width: int) -> tuple[int, ...]:
        ratio = self.vae_scale_factor_spatial
        return clips, frames, self.transformer.config.in_channels, height // ratio, width // ratio
