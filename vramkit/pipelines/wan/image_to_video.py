"""Wan image-to-video: `WanImageToVideoPipeline`, for checkpoints of Wan2.1 I2V and FLF2V, Wan2.2 I2V A14B and TI2V 5B.

Wan2.1 and A14B are told the image as a clip that is empty behind it, encoded and put beside the noise with a mask; Wan2.1
also as tokens of an image encoder. 5B is given the first frame itself. Shapes as in `base`, I tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.calls import pipeline_call
from vramkit.pipelines.calling.image_to_video import for_clips
from vramkit.pipelines.calling.inputs import Generators, Prompt, check_tensor
from vramkit.pipelines.calling.known import Beside, FirstFrame, Known
from vramkit.pipelines.calling.pictures import Pictures
from vramkit.pipelines.calling.pipeline import execution_device
from vramkit.pipelines.calling.text_to_video import Conditions, StepCallback, VideoOutput
from vramkit.pipelines.wan.base import ClipSize, WanVideoPipeline

__all__ = ["WanImageToVideoPipeline"]


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The images of a call as they are given."""

    first: Any
    last: Any
    embeds: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class FittedImages:
    """The same, read and checked."""

    pictures: list[Pictures]  # the first, and the last if there is one
    frames: list[Tensor]  # [N, 3, H, W] in -1 .. 1 each
    embeds: Tensor | None


class WanImageToVideoPipeline(WanVideoPipeline):
    """Image-to-video with a checkpoint of Wan2.1 (I2V, FLF2V) or Wan2.2 (I2V A14B, TI2V 5B).

    Args:
        tokenizer: T5 tokenizer of transformers.
        text_encoder: UMT5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        vae: AutoencoderKLWan.
        scheduler: UniPC or flow-match Euler.
        image_processor: CLIP image processor of transformers; it and the next are for Wan2.1.
        image_encoder: CLIP vision model of transformers.
        transformer: WanTransformer3DModel.
        transformer_2: the second expert of A14B, which runs the steps below `boundary_ratio`.
        boundary_ratio: share of the training timesteps from which on `transformer` runs; None for one transformer.
        expand_timesteps: whether the transformer is given the first frame itself, at a timestep of its own (5B).

    Raises:
        ConfigError: a `transformer_2` that would never run, or a `boundary_ratio` that is none.
    """

    optional: ClassVar[tuple[str, ...]] = ("transformer_2", "image_encoder", "image_processor")
    folders_of: ClassVar[tuple[str, ...]] = ("WanPipeline",)  # that of 5B serves both
    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "image_processor",
        "image_encoder",
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
        image_processor: Any = None,
        image_encoder: Any = None,
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
        self.image_processor = image_processor
        self.image_encoder = image_encoder

    @pipeline_call
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        image: Any,
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
        image_embeds: torch.Tensor | None = None,
        last_image: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> VideoOutput:
        """Generate clips that begin with an image.

        Args:
            image: a PIL picture, the path or address of one, an array [H, W, 3] or a tensor [3, H, W] with values in 0 .. 1;
                one for all prompts, or a list or batch with one for each. It is resized to ``height`` and ``width``.
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
            image_embeds: ready states of the image encoder [1, I, C], for checkpoints that have one; with ``last_image``
                those of both, one behind the other.
            last_image: the picture that the clips end with, in the same forms. For FLF2V, which needs it, and Wan2.2 A14B.
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
            ConfigError: arguments that do not fit, or images that the checkpoint does not take, before
                anything is computed.
            CheckpointError: a file or address that is no picture.
        """
        return self._generate(
            Images(image, last_image, image_embeds),
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

    @torch.no_grad()
    def encode_image(self, image: Any, device: torch.device | str | None = None) -> Tensor:
        """Return the states [N, I, C] of the image encoder before its last layer, for pictures in any form of a call.

        They are on ``device``, by default where the image encoder computes.
        """
        if self.image_encoder is None or self.image_processor is None:
            raise ConfigError("this pipeline has no image_encoder or image_processor: load the checkpoint with both")
        pictures = (image if isinstance(image, Pictures) else Pictures.of("image", image)).as_pil()
        pixels = self.image_processor(images=pictures, return_tensors="pt").pixel_values
        states = self.image_encoder(pixels.to(execution_device(self.image_encoder)), output_hidden_states=True)
        embeds: Tensor = states.hidden_states[-2]
        return embeds if device is None else embeds.to(device)

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _conditioned(self, conditions: Conditions, images: FittedImages, size: ClipSize) -> Conditions:
        told = {}
        if self.transformer.config.image_dim is not None:
            embeds = images.embeds
            if embeds is None:
                rows = len(images.frames[0])
                states = [self.encode_image(each) for each in images.pictures]
                embeds = torch.cat([each.expand(rows, -1, -1) for each in states], dim=1)
            told = {"encoder_hidden_states_image": for_clips(embeds, size.clips).to(self.device, self.dtype)}
        return conditions.told(self._known(images.frames, size), **told)

    def _known(self, frames: list[Tensor], size: ClipSize) -> Known:
        """What is known of the latents [B, c, f, h, w] of a clip with these first and last frames."""
        if self.expand_timesteps:
            patch = self.transformer.config.patch_size
            _, _, _, height, width = self._latent_shape(size)
            return FirstFrame(for_clips(self._encoded(frames, 1), size.clips), height // patch[1] * (width // patch[2]))
        latents = self._encoded(frames, size.num_frames)
        # The mask has a channel for each frame of a latent frame; the first of these stands for one frame in all of them.
        mask = latents.new_zeros(latents.shape[0], self.vae_scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        if len(frames) > 1:
            mask[:, -1, -1] = 1
        return Beside(for_clips(torch.cat([mask, latents], dim=1), size.clips), dim=1)

    def _encoded(self, frames: list[Tensor], count: int) -> Tensor:
        """The most likely latents [N, c, f, h, w] of so many frames, the first (and last) given and the others empty.

        They are float32 and of unit variance.
        """
        pictures, _, height, width = frames[0].shape
        shape = pictures, 3, count, height, width
        video = torch.zeros(shape, device=execution_device(self.vae), dtype=self.vae.dtype)
        for at, frame in zip((0, -1), frames, strict=False):
            video[:, :, at] = frame
        latents = self.vae.encode(video, return_dict=False)[0].mode().to(self.device, torch.float32)
        mean, std = self._latent_moments(latents)
        encoded: Tensor = (latents - mean) * (1.0 / std)  # the published pipeline rounds that way
        return encoded

    # -- checks and sizes ----------------------------------------------------------------------------------------------

    def _checked(self, images: Images, size: ClipSize) -> FittedImages:
        if self.vae is None:
            raise ConfigError("this pipeline has no vae, which encodes the image: set pipeline.vae")
        if images.first is None:
            raise ConfigError("there is no image: give the picture that the clip begins with")
        self._check_checkpoint()
        self._check_last(images.last, size)
        named = [("image", images.first)] + ([] if images.last is None else [("last_image", images.last)])
        pictures = [Pictures.of(name, given) for name, given in named]
        for (name, _), each in zip(named, pictures, strict=True):
            each.check_number(name, size.prompts)
        embeds = None if images.embeds is None else self._checked_embeds(images.embeds, size)
        if embeds is None and self.transformer.config.image_dim is not None:
            for part in ("image_encoder", "image_processor"):
                if getattr(self, part) is None:
                    raise ConfigError(f"this pipeline has no {part}: load the checkpoint with it, or give image_embeds")
        frames = [each.fitted(size.height, size.width).to(self.device) for each in pictures]
        rows = max(len(each) for each in pictures)
        frames = [each.expand(rows, -1, -1, -1) for each in frames]
        return FittedImages(pictures, frames, embeds)

    def _check_checkpoint(self) -> None:
        """Refuse transformers that were not trained on images."""
        channels, latents = self.transformer.config.in_channels, self.vae.config.z_dim
        expected = latents if self.expand_timesteps else 2 * latents + self.vae_scale_factor_temporal
        if channels != expected:
            raise ConfigError(
                f"the transformer takes {channels} channels; image-to-video needs one that takes {expected}. This is a "
                "text-to-video checkpoint: leave the image out and use WanPipeline"
            )

    def _check_last(self, last: Any, size: ClipSize) -> None:
        config = self.transformer.config
        if last is None:
            if config.pos_embed_seq_len is not None:
                raise ConfigError("this checkpoint needs last_image, the picture that the clip ends with")
            return
        if self.expand_timesteps or (config.image_dim is not None and config.pos_embed_seq_len is None):
            raise ConfigError("last_image: this checkpoint was not trained to end with a picture: leave it out")
        if size.num_frames == 1:
            raise ConfigError("last_image is given, and num_frames is 1: ask for more frames")

    def _checked_embeds(self, embeds: Tensor, size: ClipSize) -> Tensor:
        """Ready states of the image encoder [N, I, C], N one or as many as prompts."""
        config = self.transformer.config
        if config.image_dim is None:
            raise ConfigError("image_embeds is given, and this checkpoint has no image encoder: leave it out")
        check_tensor("image_embeds", embeds, ("pictures", "tokens", config.image_dim))
        shape, tokens = tuple(embeds.shape), config.pos_embed_seq_len
        if tokens is not None and 2 * shape[1] == tokens and shape[0] % 2 == 0:
            embeds = embeds.reshape(-1, tokens, shape[2])
        if embeds.shape[0] not in (1, size.prompts) or embeds.shape[1] != (tokens or shape[1]):
            raise ConfigError(
                f"image_embeds has shape {shape}; expected (1 or {size.prompts}, {tokens or 'tokens'}, {config.image_dim})"
            )
        return embeds

    def _latent_channels(self) -> int:
        channels: int = self.vae.config.z_dim if self.vae is not None else self.transformer.config.out_channels
        return channels
