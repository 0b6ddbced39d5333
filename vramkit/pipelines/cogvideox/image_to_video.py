"""CogVideoX image-to-video: `CogVideoXImageToVideoPipeline`, for CogVideoX-5b-I2V and CogVideoX1.5-5B-I2V."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.calls import pipeline_call
from vramkit.pipelines.calling.image_to_video import draw_latents
from vramkit.pipelines.calling.inputs import Generators, Prompt
from vramkit.pipelines.calling.known import Beside
from vramkit.pipelines.calling.pictures import Pictures
from vramkit.pipelines.calling.text_to_video import Conditions, StepCallback, VideoOutput
from vramkit.pipelines.cogvideox.base import CogVideoXVideoPipeline

__all__ = ["CogVideoXImageToVideoPipeline"]

_OFS = 2.0  # what checkpoints with such an embedding were trained with


class CogVideoXImageToVideoPipeline(CogVideoXVideoPipeline):
    """Image-to-video with a CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V checkpoint.

    Args:
        tokenizer: T5 tokenizer of transformers.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        vae: AutoencoderKLCogVideoX.
        transformer: CogVideoXTransformer3DModel.
        scheduler: CogVideoXDDIMScheduler or CogVideoXDPMScheduler.
    """

    @pipeline_call
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        image: Any,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 49,
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
        """Generate clips that begin with an image.

        Args:
            image: a PIL picture, the path or address of one, an array [H, W, 3] or a tensor [3, H, W] with values in 0 .. 1;
                one for all prompts, or a list or batch with one for each. It is resized to ``height`` and ``width``.
            prompt: one prompt, or a list. Alternatively ``prompt_embeds``.
            negative_prompt: what to steer away from; used when ``guidance_scale`` > 1. Default: the empty prompt.
            height: pixels, a multiple of 16. Default: what the checkpoint was trained on, as for the next.
            width: pixels, a multiple of 16.
            num_frames: 8k or 8k + 1. Other multiples of 4, and these plus 1, make 8k or 8k + 1 frames as in the published
                pipeline, with a warning.
            num_inference_steps: denoising steps.
            timesteps: must be None: the schedulers of this family space their timesteps by themselves.
            guidance_scale: weight of the prompt against the negative prompt; up to 1 means no guidance, one transformer
                pass per step instead of two.
            use_dynamic_cfg: vary the guidance scale from step to step, as published.
            num_videos_per_prompt: clips per prompt. The published pipeline reads it and makes one.
            eta: for schedulers of diffusers that take it, such as DDIMScheduler.
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
            ConfigError: arguments that do not fit, or a checkpoint without channels for an image, before anything is
                computed.
            CheckpointError: a file or address that is no picture.
        """
        return self._generate(
            image,
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            use_dynamic_cfg=use_dynamic_cfg,
            num_videos_per_prompt=num_videos_per_prompt,
            eta=eta,
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

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _checked(self, image: Any, prompts: int, height: int, width: int) -> Tensor:
        if self.vae is None:
            raise ConfigError("this pipeline has no vae, which encodes the image: set pipeline.vae")
        channels, latents = self.transformer.config.in_channels, self.vae.config.latent_channels
        if channels != 2 * latents:
            raise ConfigError(
                f"the transformer takes {channels} channels; image-to-video needs one that takes {2 * latents}. Use "
                "CogVideoXPipeline, without an image, for text-to-video checkpoints"
            )
        if image is None:
            raise ConfigError("there is no image: give the picture that the clip begins with")
        pictures = Pictures.of("image", image)
        pictures.check_number("image", prompts)
        return pictures.fitted(height, width).to(self.device, self.dtype)

    def _conditioned(self, conditions: Conditions, image: Tensor, shape: tuple[int, ...]) -> Conditions:
        latents = (
            draw_latents(self.vae, image, self._drawn["generator"], shape[0])
            .transpose(1, 2)
            .to(self.device, self.dtype)
        )
        scale = self.vae.config.scaling_factor
        known = torch.zeros(shape, dtype=self.dtype, device=self.device)
        known[:, :1] = 1 / scale * latents if self.vae.config.invert_scale_latents else scale * latents
        told = {}
        if self.transformer.config.ofs_embed_dim is not None:
            told["ofs"] = torch.full((1,), _OFS, dtype=self.dtype, device=self.device)
        return conditions.told(Beside(known, dim=2), **told)

    def _latent_channels(self) -> int:
        channels: int = self.transformer.config.in_channels // 2
        return channels
