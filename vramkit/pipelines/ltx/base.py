"""What the LTX-Video pipelines share: components, prompts, latents as tokens, the steps of a call.

Shapes: B clips, C channels, F frames, H x W pixels; small letters are latent sizes (f, h, w), S = f h w tokens, T prompt
tokens. Mirrors the calls of diffusers' pipelines: the same folder, seed and arguments give the same clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vramkit.errors import ConfigError
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
from vramkit.pipelines.calling.prompts import encode_t5
from vramkit.pipelines.calling.text_to_video import (
    Conditions,
    StepCallback,
    TextToVideoPipeline,
    VideoOutput,
    wanted_tensors,
)
from vramkit.pipelines.networks.text_masks import text_lengths

__all__ = ["Clip", "LTXVideoPipeline", "tokens_of"]

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


@dataclass(frozen=True, slots=True)
class Clip:
    """What a call makes: of prompts so many clips of a size, and where their noise comes from."""

    prompts: int
    clips: int  # B
    height: int
    width: int
    num_frames: int
    grid: Grid
    frame_rate: float
    generator: Generators


class LTXVideoPipeline(TextToVideoPipeline):
    """An LTX-Video checkpoint.

    Args:
        scheduler: flow-match Euler.
        vae: AutoencoderKLLTXVideo.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        tokenizer: T5 tokenizer of transformers.
        transformer: LTXVideoTransformer3DModel.
    """

    gives_videos: ClassVar[bool] = False  # whether latents that are asked for are no tokens
    attends_to_padding: ClassVar[bool] = True  # whether the text encoder looks at the padding behind a prompt
    prompt_tokens: ClassVar[int] = 128  # what prompts are padded to and cut at unless a call says otherwise
    component_names: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")
    fps: ClassVar[float] = 25.0
    joins_texts: ClassVar[bool] = True
    text_width: ClassVar[str] = "caption_channels"
    predictions: ClassVar[tuple[str, ...]] = ("flow_prediction",)
    schedule_arguments: ClassVar[tuple[str, ...]] = ("sigmas", "mu")

    def __init__(self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.scheduler = scheduler
        self.vae = vae
        self.vae_spatial_compression_ratio: int = self.vae.spatial_compression_ratio if vae is not None else 32
        self.vae_temporal_compression_ratio: int = self.vae.temporal_compression_ratio if vae is not None else 8
        self._guidance_rescale = 0.0

    @property
    def guidance_rescale(self) -> float:
        """How much of the spread of the prompt's own prediction the call in progress restores."""
        return self._guidance_rescale

    @torch.no_grad()
    def encode_prompt(  # noqa: PLR0917 - the order of the published one
        self,
        prompt: Prompt,
        negative_prompt: Prompt = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return embeddings [B, T, C] and masks [B, T], bool, of prompts and negative prompts.

        The order is embeddings, mask, negative embeddings, negative mask; the last two are None without guidance. What is
        given passes through. Each prompt stands ``num_videos_per_prompt`` times in a row. Results are on ``device``, where
        the pipeline computes unless it is given, embeddings in ``dtype``, by default that of the text encoder.
        """
        prompts = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text = _Text("prompt", prompt, prompt_embeds, prompt_attention_mask)
        negative = _Text("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        for each in (text, negative) if do_classifier_free_guidance else (text,):
            self._check_text(each)
        tokens = self.prompt_tokens if max_sequence_length is None else int(max_sequence_length)

        def encode(each: _Text) -> tuple[Tensor, Tensor]:
            embeds, mask = self._encode(each, prompts, int(num_videos_per_prompt), tokens, dtype)
            return embeds.to(device or self.device), mask.to(device or self.device)

        return *encode(text), *(encode(negative) if do_classifier_free_guidance else (None, None))

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

    def _generate(
        self,
        given: Any = None,
        *,
        prompt: Prompt,
        negative_prompt: Prompt,
        height: int,
        width: int,
        num_frames: int,
        frame_rate: float,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        guidance_scale: float,
        guidance_rescale: float,
        num_videos_per_prompt: int,
        generator: Generators,
        latents: Tensor | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        decode_timestep: float | Sequence[float],
        decode_noise_scale: float | Sequence[float] | None,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        max_sequence_length: int,
    ) -> VideoOutput:
        """The call, of which what is `given` of the clip makes another one."""
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
        if timesteps is not None:
            timesteps = falling_numbers("timesteps", timesteps, most=1000, to_zero=False)
        num_frames = whole_latent_frames(num_frames, factor=self._rate, down=True)
        grid = self._grid(height, width, num_frames)
        prompts = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        clips = prompts * num_videos_per_prompt
        clip = Clip(prompts, clips, height, width, num_frames, grid, frame_rate, generator)
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
        check_noise(self._latent_shape(clip), generator, latents, device=self.device)
        given = self._checked(given, clip, latents)

        self._begin(guidance_scale=guidance_scale, attention_kwargs=attention_kwargs)
        self._guidance_rescale = guidance_rescale
        self._enter("encode", **self._sizes)
        conditions = self._conditions(texts, prompts, num_videos_per_prompt, max_sequence_length, grid, frame_rate)
        times = self._scheduled(num_inference_steps, timesteps, given, clip)
        latents, conditions = self._started(given, conditions, latents, times, clip)
        latents = self._denoise(latents, conditions, callback=callback_on_step_end, wanted=wanted, timesteps=times)
        if output_type != "latent" or self.gives_videos:
            latents = latents.transpose(1, 2).reshape(clips, -1, *grid)
        return self._finish(latents, output_type, generator=generator, **decoding)

    def _checked(self, given: Any, clip: Clip, latents: Tensor | None) -> Any:
        """Refuse what is given of the clip and cannot be used, before anything is computed."""
        return given

    def _scheduled(self, steps: int, timesteps: Sequence[float] | None, given: Any, clip: Clip) -> Tensor:
        """Set the scheduler and return the timesteps of the call."""
        levels = _noise_levels(steps) if timesteps is None else [timestep / 1000 for timestep in timesteps]
        self.scheduler.set_timesteps(sigmas=levels, mu=self._shift(math.prod(clip.grid)), device=self.device)
        set_to: Tensor = self.scheduler.timesteps
        return set_to

    def _started(
        self, given: Any, conditions: Conditions, latents: Tensor | None, timesteps: Tensor, clip: Clip
    ) -> tuple[Tensor, Conditions]:
        """Latents [B, S, c] at the first timestep, and what the transformer is told with what is known of the clip."""
        return self._noise_tokens(clip) if latents is None else latents.to(self.device, torch.float32), conditions

    def _noise_tokens(self, clip: Clip) -> Tensor:
        """Noise [B, S, c], drawn in the order of a video."""
        noise = make_noise((clip.clips, self._channels(), *clip.grid), clip.generator, device=self.device)
        return tokens_of(noise)

    def _normalized(self, latents: Tensor) -> Tensor:
        """Latents [B, c, f, h, w] of the autoencoder, float32 and of unit variance."""
        latents = latents.to(self.device, torch.float32)
        mean, std = (each.view(1, -1, 1, 1, 1).to(latents) for each in (self.vae.latents_mean, self.vae.latents_std))
        scaled: Tensor = (latents - mean) * self.vae.config.scaling_factor / std
        return scaled

    def _latent_shape(self, clip: Clip) -> tuple[int, ...]:
        """That of latents which a call may be given."""
        return clip.clips, math.prod(clip.grid), self._channels()

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
                {"encoder_hidden_states": embeds.to(self.dtype), "encoder_attention_mask": text_lengths(mask) or mask}
            )
        return Conditions(*told, shared=sizes)

    def _encode(
        self,
        text: _Text,
        prompts: int,
        copies: int,
        max_sequence_length: int,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, C], new ones in the text encoder's dtype, and masks [B, T], bool, on the device."""
        embeds, mask = text.embeds, text.mask
        if embeds is None:
            embeds, mask = encode_t5(
                text.prompts(prompts),
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
                max_sequence_length=max_sequence_length,
                attend_to_padding=self.attends_to_padding,
            )
            embeds = embeds.to(dtype or self.text_encoder.dtype)
        assert mask is not None
        embeds, mask = embeds.to(self.device), mask.to(self.device).bool()
        return embeds.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        positive, negative = positive.float(), negative.float()
        guided = super()._guided(positive, negative, timestep)
        if self._guidance_rescale <= 0:
            return guided
        dims = tuple(range(1, positive.ndim))
        spread = positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        return self._guidance_rescale * (guided * spread) + (1 - self._guidance_rescale) * guided

    def _step(self, noise: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Tensor:
        return super()._step(
            noise.float(), timestep, latents, **options
        )  # the scheduler returns the dtype of the prediction

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
        elif text.mask is None:
            raise ConfigError(
                f"{text.name}_attention_mask is None; expected {tuple(text.embeds.shape[:2])}, ones for the tokens of "
                f"{text.name}_embeds that count"
            )
        else:
            check_tensor(f"{text.name}_attention_mask", text.mask, text.embeds.shape[:2], floating=False)


def tokens_of(video: Tensor) -> Tensor:
    """Latents [B, c, f, h, w] as tokens [B, S, c]."""
    return video.flatten(2).transpose(1, 2)


def _noise_levels(steps: int) -> Sequence[float]:
    """Even noise levels from 1 to 1 / steps, before they are shifted."""
    levels: list[float] = np.linspace(1.0, 1 / steps, steps).tolist()
    return levels


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
