"""What the Wan pipelines share: components and options of a checkpoint, experts, prompts, latents, the steps of a call.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S prompt tokens.
Mirrors the calls of diffusers' pipelines: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.inputs import (
    Generators,
    Prompt,
    check_finite,
    check_noise,
    check_size,
    make_noise,
    whole_latent_frames,
    whole_patches,
)
from vramkit.pipelines.calling.pipeline import execution_device
from vramkit.pipelines.calling.prompts import clean_prompt, encode_t5
from vramkit.pipelines.calling.t5_to_video import T5ToVideoPipeline
from vramkit.pipelines.calling.text_to_video import Conditions, StepCallback, VideoOutput, wanted_tensors

__all__ = ["ClipSize", "WanVideoPipeline"]


@dataclass(frozen=True, slots=True)
class ClipSize:
    """What a call makes: prompts, clips of each, and their size in pixels and frames."""

    prompts: int
    copies: int
    height: int
    width: int
    num_frames: int

    @property
    def clips(self) -> int:
        """B."""
        return self.prompts * self.copies


class WanVideoPipeline(T5ToVideoPipeline):
    """A Wan checkpoint: one transformer, or two of which each runs the steps of its noise levels (Wan2.2 A14B)."""

    vae_in_fp32: ClassVar[bool] = True
    text_width: ClassVar[str] = "text_dim"
    predictions: ClassVar[tuple[str, ...]] = ("flow_prediction",)

    transformer_2: Any
    boundary_ratio: float | None
    expand_timesteps: bool

    def _take(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any,
        transformer_2: Any,
        boundary_ratio: float | None,
        expand_timesteps: bool,
    ) -> None:
        """Take the components and options that a checkpoint lists."""
        if boundary_ratio is not None:
            check_finite(boundary_ratio=boundary_ratio)
            if not 0 <= boundary_ratio <= 1:
                raise ConfigError(
                    f"boundary_ratio is {boundary_ratio}; expected a share of the timesteps, 0 to 1, or None"
                )
        if transformer_2 is not None and boundary_ratio is None:
            raise ConfigError(
                "there is a transformer_2 and no boundary_ratio, so it would never run: give the ratio of the checkpoint "
                "(Wan2.2 T2V 0.875, I2V 0.9), or leave transformer_2 out"
            )
        if vae is not None:
            _check_moments(vae.config)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.scheduler = scheduler
        self.vae = vae
        self.boundary_ratio = boundary_ratio
        self.expand_timesteps = bool(expand_timesteps)
        self.vae_scale_factor_temporal: int = self.vae.config.scale_factor_temporal if vae is not None else 4
        self.vae_scale_factor_spatial: int = self.vae.config.scale_factor_spatial if vae is not None else 8
        self._given_guidance_scale_2: float | None = None
        if self.expand_timesteps:
            self.fps = 24.0  # type: ignore[misc] # Wan2.2 5B was trained on faster clips than its siblings

    @property
    def guidance_scale_2(self) -> float | None:
        """The guidance scale of ``transformer_2`` in the call in progress, None where that of the other serves."""
        return self._given_guidance_scale_2

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [B, c, f, h, w] of unit variance into video [B, 3, F, H, W] in -1 .. 1."""
        latents = latents.to(execution_device(self.vae), self.vae.dtype)
        mean, std = self._latent_moments(latents)
        # Divided by the reciprocal rather than multiplied: the published pipeline rounds that way.
        video: Tensor = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return video

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _generate(
        self,
        images: Any = None,
        *,
        prompt: Prompt,
        negative_prompt: Prompt,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_scale_2: float | None,
        num_videos_per_prompt: int,
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
        """The call, of which `images` makes another one through `_conditioned`."""
        wanted = wanted_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_call(
            height=height,
            width=width,
            multiple=16,  # what the published pipeline asks for; of more it takes what is whole
            output_type=output_type,
            wanted=wanted,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        self._check_guidance(guidance_scale, guidance_scale_2)
        height, width = (
            whole_patches(name, pixels, multiple=self._pixels_per_patch())
            for name, pixels in (("height", height), ("width", width))
        )
        check_size(height, width, multiple=self._pixels_per_patch())
        num_frames = whole_latent_frames(num_frames, factor=self.vae_scale_factor_temporal)
        prompts = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        size = ClipSize(prompts, num_videos_per_prompt, height, width, num_frames)
        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._given_guidance_scale_2 = guidance_scale_2
        self._check_encoder(prompt_embeds, negative_prompt_embeds)
        shape = self._latent_shape(size)
        check_noise(shape, generator, latents, device=self.device)
        images = self._checked(images, size)

        self._enter("encode", **self._sizes)
        conditions = self._conditions(
            prompt,
            negative_prompt,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        conditions = self._conditioned(conditions, images, size)
        if latents is None:
            latents = make_noise(shape, generator, device=self.device)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents.to(self.device, torch.float32)
        latents = self._denoise(latents, conditions, callback=callback_on_step_end, wanted=wanted)
        return self._finish(latents, output_type)

    def _checked(self, images: Any, size: ClipSize) -> Any:
        """Refuse images that the checkpoint cannot be told, before anything is computed."""
        return images

    def _conditioned(self, conditions: Conditions, images: Any, size: ClipSize) -> Conditions:
        """What the transformer is told, with the images of the call."""
        return conditions

    def _experts(self, timesteps: Tensor) -> list[Any]:
        """The transformer of each step: the second one below the boundary, if there is one."""
        if self.boundary_ratio is None:
            return super()._experts(timesteps)
        boundary = self.boundary_ratio * self.scheduler.config["num_train_timesteps"]
        return [self.transformer if timestep >= boundary else self.transformer_2 for timestep in timesteps.tolist()]

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        """Combine two predictions, with the scale that the call was given for the transformer that made them."""
        scale = self._given_guidance_scale
        if self._given_guidance_scale_2 is not None and self._expert is self.transformer_2:
            scale = self._given_guidance_scale_2
        return negative + scale * (positive - negative)

    def _guidance_note(self) -> str | None:
        if self._guidance_scale <= 1:
            return None
        return (
            f"a Wan call keeps the {self._given_guidance_scale} that it was given, as published; up to 1 ends guidance"
        )

    def _encode(self, texts: list[str], max_sequence_length: int) -> Tensor:
        """Embeddings [B, S, C] of prompts with zeros behind the last token: Wan was trained without padding tokens."""
        embeds, mask = encode_t5(
            [clean_prompt(text) for text in texts],
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            max_sequence_length=max_sequence_length,
            attend_to_padding=False,
        )
        return embeds.masked_fill_(~mask[..., None], 0)

    def _latent_moments(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, c, 1, 1, 1] of what the autoencoder makes, as `latents` lie."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    # -- checks and sizes ----------------------------------------------------------------------------------------------

    def _check_guidance(self, guidance_scale: float, guidance_scale_2: float | None) -> None:
        check_finite(guidance_scale=guidance_scale)
        if guidance_scale_2 is not None:
            check_finite(guidance_scale_2=guidance_scale_2)
            if self.boundary_ratio is None:
                raise ConfigError(
                    f"guidance_scale_2 is {guidance_scale_2}, and this checkpoint has one transformer (boundary_ratio is "
                    "None): leave it out"
                )
        if self.boundary_ratio is not None and self.transformer_2 is None:
            raise ConfigError(
                f"boundary_ratio is {self.boundary_ratio}, and there is no transformer_2 for the steps below it: load the "
                "checkpoint with it, or set pipeline.boundary_ratio to None"
            )

    def _pixels_per_patch(self) -> int:
        """What height and width are multiples of."""
        return math.lcm(16, self.vae_scale_factor_spatial * max(self.transformer.config.patch_size[1:]))

    def _latent_channels(self) -> int:
        """Channels that are denoised."""
        channels: int = self.transformer.config.in_channels
        return channels

    def _latent_shape(self, size: ClipSize) -> tuple[int, int, int, int, int]:
        return (
            size.clips,
            self._latent_channels(),
            (size.num_frames - 1) // self.vae_scale_factor_temporal + 1,
            size.height // self.vae_scale_factor_spatial,
            size.width // self.vae_scale_factor_spatial,
        )


def _check_moments(config: Any) -> None:
    """Refuse numbers of an autoencoder's config that would be spread over all channels of the latents."""
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0)):
        values = getattr(config, name, None)
        if values is None:  # of another class, which is refused by its name
            return
        if len(values) != config.z_dim or not all(least < value < math.inf for value in values):
            raise ConfigError(
                f"{name} of the vae has {len(values)} numbers, {min(values, default=None)} the least; expected a finite one "
                f"for each of {config.z_dim} channels{', above 0' if least == 0 else ''}"
            )
