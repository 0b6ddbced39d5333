"""What the CogVideoX pipelines share: components, prompts, sizes, latents, the steps of a call.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S prompt tokens.
Mirrors the calls of diffusers' pipelines: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.inputs import (
    Generators,
    Prompt,
    check_finite,
    check_noise,
    make_noise,
    warn_caller,
)
from vramkit.pipelines.calling.pipeline import execution_device
from vramkit.pipelines.calling.prompts import encode_t5
from vramkit.pipelines.calling.t5_to_video import T5ToVideoPipeline
from vramkit.pipelines.calling.text_to_video import Conditions, StepCallback, VideoOutput, wanted_tensors

__all__ = ["CogVideoXVideoPipeline"]


class CogVideoXVideoPipeline(T5ToVideoPipeline):
    """A CogVideoX checkpoint.

    Args:
        tokenizer: T5 tokenizer of transformers.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        vae: AutoencoderKLCogVideoX.
        transformer: CogVideoXTransformer3DModel.
        scheduler: CogVideoXDDIMScheduler or CogVideoXDPMScheduler.
    """

    fps: ClassVar[float] = 8.0
    joins_texts: ClassVar[bool] = True
    predictions: ClassVar[tuple[str, ...]] = ("v_prediction", "epsilon", "sample")
    component_names: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.transformer = transformer
        self.scheduler = scheduler
        self.vae_scale_factor_spatial: int = self.vae.config.scale_factor_spatial if vae is not None else 8
        self.vae_scale_factor_temporal = int(self.vae.config.temporal_compression_ratio) if vae is not None else 4
        self._dynamic_from: tuple[float, int] | None = None  # guidance scale and steps of a call that varies the scale
        self._drawn: dict[str, Any] = {}  # what steps that draw noise are told

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress runs the transformer on the negative prompt too; it does to its end."""
        return self._given_guidance_scale > 1

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [B, f, c, h, w] of unit variance into video [B, 3, F, H, W] in -1 .. 1."""
        latents = latents.to(execution_device(self.vae), self.vae.dtype).transpose(1, 2)
        video: Tensor = self.vae.decode(1 / self.vae.config.scaling_factor * latents, return_dict=False)[0]
        return video

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _generate(
        self,
        image: Any = None,
        *,
        prompt: Prompt,
        negative_prompt: Prompt,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        num_inference_steps: int,
        timesteps: None,
        guidance_scale: float,
        use_dynamic_cfg: bool,
        num_videos_per_prompt: int,
        eta: float,
        generator: Generators,
        latents: Tensor | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        max_sequence_length: int,
    ) -> VideoOutput:
        """The call, of which an image makes another one through `_conditioned`."""
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
        prompts = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._check_encoder(prompt_embeds, negative_prompt_embeds)
        padding = -latent_frames % self.transformer.config.patch[0]
        shape = self._latent_shape(prompts * num_videos_per_prompt, latent_frames + padding, height, width)
        check_noise(shape, generator, latents, device=self.device)
        image = self._checked(image, prompts, height, width)

        self._drawn = {"generator": generator, "eta": eta}
        self._dynamic_from = (guidance_scale, num_inference_steps) if use_dynamic_cfg else None
        self._enter("encode", **self._sizes)
        conditions = self._conditions(
            prompt,
            negative_prompt,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        conditions = self._conditioned(conditions, image, shape)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        if latents is None:
            latents = make_noise(shape, generator, device=self.device, dtype=self.dtype)
        latents = self._denoise(latents.to(self.device), conditions, callback=callback_on_step_end, wanted=wanted)
        return self._finish(latents if output_type == "latent" else latents[:, padding:], output_type)

    def _checked(self, image: Any, prompts: int, height: int, width: int) -> Any:
        """Refuse an image that the checkpoint cannot be told, before anything is computed."""
        return image

    def _conditioned(self, conditions: Conditions, image: Any, shape: tuple[int, ...]) -> Conditions:
        """What the transformer is told, with the image of the call; shape is that of the latents."""
        return conditions

    def _latent_channels(self) -> int:
        """Channels that are denoised."""
        channels: int = self.transformer.config.in_channels
        return channels

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        """Combine two predictions in fp32, with the scale of this step if it varies."""
        if self._dynamic_from is not None:
            scale, steps = self._dynamic_from
            # The published formula, which takes a timestep of training (0 to 999) for one of `steps`.
            swing = 1 - math.cos(math.pi * ((steps - float(timestep)) / steps) ** 5)
            self._guidance_scale = 1 + scale * swing / 2
        return super()._guided(positive.float(), negative.float(), timestep)

    def _guidance_note(self) -> str | None:
        if self._guidance_scale > 1 or not self.do_classifier_free_guidance:
            return None
        return "a CogVideoX call weighs the two predictions by it to the end, as published: 1 is the prompt alone, 0 is not"

    def _step(self, noise: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Tensor:
        """Take one step in fp32; the latents go on in the transformer's dtype."""
        accepted = inspect.signature(self.scheduler.step).parameters
        drawn = {name: value for name, value in self._drawn.items() if name in accepted}
        return super()._step(noise.float(), timestep, latents, **drawn, **options).to(self.dtype)

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
        """Refuse what the checkpoint has no positions for, and timesteps."""
        config, ratio = self.transformer.config, self.vae_scale_factor_spatial
        for name, pixels, most in (
            ("height", height, config.sample_height * ratio),
            ("width", width, config.sample_width * ratio),
        ):
            if config.use_learned_positional_embeddings and pixels != most:
                raise ConfigError(f"{name} is {pixels}; this checkpoint has learned positions for {most} pixels only")
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
        warn_caller(
            f"num_frames is {num_frames}, but CogVideoX makes {2 * rate} * k or {2 * rate} * k + 1 frames. Making {made} "
            "frames, as the published pipeline does"
        )
        return latent_frames

    def _latent_shape(self, clips: int, frames: int, height: int, width: int) -> tuple[int, ...]:
        ratio = self.vae_scale_factor_spatial
        return clips, frames, self._latent_channels(), height // ratio, width // ratio
