"""LTX-Video with pictures and clips at any frames: `LTXConditionPipeline` and its `LTXVideoCondition`.

What is shown from the first frame on is mixed into the latents there; at other frames it becomes tokens in front of those of
the clip, with the positions of that place. Tokens are at noise levels of their own: the more a condition counts, the lower.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.calls import pipeline_call
from vramkit.pipelines.calling.image_to_video import draw_latents, for_clips
from vramkit.pipelines.calling.inputs import Generators, Prompt, check_finite, make_noise
from vramkit.pipelines.calling.known import Known, Step, timestep_of_each_token
from vramkit.pipelines.calling.pictures import Pictures
from vramkit.pipelines.calling.text_to_video import Conditions, StepCallback, VideoOutput
from vramkit.pipelines.ltx.base import Clip, LTXVideoPipeline, tokens_of

__all__ = ["LTXConditionPipeline", "LTXVideoCondition"]

_PREFIX_FRAMES = (
    2  # latent frames of a clip behind the first frame that become tokens of their own; the rest is mixed in
)
_NEARLY = 1e-6


@dataclass(frozen=True)
class LTXVideoCondition:
    """A picture, or the frames of a clip, that is shown at some frame.

    A picture is a PIL picture, the path or address of one, an array [H, W, 3] or a tensor [3, H, W] with values in 0 .. 1; a
    clip is a list of pictures, or an array or tensor of several. Both are resized to the clip that is made.
    """

    image: Any = None
    video: Any = None
    frame_index: int = 0
    strength: float = 1.0  # 0 to 1, how much it counts


@dataclass(frozen=True, slots=True)
class _Given:
    """What a call is given of its clip."""

    conditions: list[LTXVideoCondition]
    denoise_strength: float
    noise_scale: float


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """A condition that was read and checked."""

    frames: Tensor  # [1, 3, F, H, W] in -1 .. 1
    frame_index: int
    strength: float


@dataclass(frozen=True, slots=True, eq=False)
class _Checked:
    """What a call is given, read and checked."""

    shown: list[_Shown]
    denoise_strength: float
    noise_scale: float


@dataclass(slots=True, eq=False)
class _Layout:
    """The latents of a call while conditions are put in: those of the clip, and tokens in front of them."""

    latents: Tensor  # [B, c, f, h, w]
    strengths: list[float]  # of the latent frames
    tokens: list[Tensor] = field(default_factory=list)  # [B, s, c] each
    coordinates: list[Tensor] = field(default_factory=list)  # [3, s] each: frames, rows and columns of pixels
    token_strengths: list[float] = field(default_factory=list)  # of each of them


@dataclass(frozen=True, slots=True, eq=False)
class _Held(Known):
    """Runs of tokens that are known more or less: the more, the lower their timestep."""

    strengths: Tensor  # [N] fp32
    lengths: tuple[int, ...]  # tokens in each run
    extra: int  # tokens in front of those of the clip
    first: Tensor | None  # latents [B, S, c] at the beginning, where there are conditions
    noise_scale: float
    generator: Generators

    def prepared(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What counts wholly gets noise anew, which helps motion to go on from it."""
        if self.first is None or self.noise_scale <= 0:
            return latents
        noise = make_noise(tuple(latents.shape), self.generator, device=latents.device, dtype=latents.dtype)
        noised = self.first + self.noise_scale * noise * (timestep / 1000.0) ** 2
        return torch.where(self._of_tokens(self.strengths > 1.0 - _NEARLY), noised, latents)

    def inputs(self, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The latents with a timestep for each run."""
        timesteps = self._timesteps(timestep).expand(latents.shape[0], -1)
        return {"hidden_states": latents, "timestep": timesteps, "timestep_tokens": self.lengths}

    def stepped(self, step: Step, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """A step of the tokens that are noisier than what is known of them."""
        each = timestep_of_each_token(self._timesteps(timestep), self.lengths).expand(latents.shape[0], -1)
        stepped = step(-noise, timestep, latents, per_token_timesteps=each)
        return torch.where(self._of_tokens(timestep / 1000 - _NEARLY < 1.0 - self.strengths), stepped, latents)

    def finished(self, latents: Tensor) -> Tensor:
        """The tokens of the clip."""
        return latents[:, self.extra :]

    def _timesteps(self, timestep: Tensor) -> Tensor:
        """[1, N]."""
        return torch.minimum(timestep.float(), (1 - self.strengths) * 1000.0)[None]

    def _of_tokens(self, of_runs: Tensor) -> Tensor:
        """[N] -> [1, S, 1]."""
        return timestep_of_each_token(of_runs[None], self.lengths)[..., None]


class LTXConditionPipeline(LTXVideoPipeline):
    """Clips that show given pictures or clips at given frames, with an LTX-Video checkpoint (0.9.5 and later).

    Args:
        scheduler: flow-match Euler, without dynamic shifting.
        vae: AutoencoderKLLTXVideo.
        text_encoder: T5 encoder of transformers. It and the tokenizer may be None when embeds are given.
        tokenizer: T5 tokenizer of transformers.
        transformer: LTXVideoTransformer3DModel.
    """

    folders_of: ClassVar[tuple[str, ...]] = ("LTXPipeline", "LTXImageToVideoPipeline")
    gives_videos: ClassVar[bool] = True
    attends_to_padding: ClassVar[bool] = False
    schedule_arguments: ClassVar[tuple[str, ...]] = ("timesteps",)
    prompt_tokens: ClassVar[int] = 256

    @pipeline_call
    def __call__(  # noqa: PLR0917 - the order of the published one
        self,
        conditions: LTXVideoCondition | list[LTXVideoCondition] | None = None,
        image: Any = None,
        video: Any = None,
        frame_index: int | list[int] = 0,
        strength: float | list[float] = 1.0,
        denoise_strength: float = 1.0,
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
        image_cond_noise_scale: float = 0.15,
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
        max_sequence_length: int = 256,
    ) -> VideoOutput:
        """Generate clips that show given pictures, or clips, at given frames.

        Args:
            conditions: what is given, and at which frames; or the next four for it.
            image: a picture in any of the forms that `LTXVideoCondition` takes, or a list of them.
            video: the frames of a clip, or a list of clips; what is longer than the clip to make is cut.
            frame_index: the frame at which each is shown; one, or a list.
            strength: 0 to 1, how much each counts; one, or a list.
            denoise_strength: below 1, the share of the steps that ``latents`` are taken through after being noised so far.
            prompt: one prompt, or a list. Alternatively ``prompt_embeds``.
            negative_prompt: what to steer away from; used when ``guidance_scale`` > 1. Default: the empty prompt.
            height: pixels, a multiple of 32.
            width: pixels, a multiple of 32.
            num_frames: 8k + 1; other numbers are rounded down, with a warning, as the published pipeline does silently.
            frame_rate: frames per second that the motion is meant for.
            num_inference_steps: denoising steps; ignored where ``timesteps`` are given.
            timesteps: noise levels of the steps, falling, 1000 for pure noise, in place of those that first fall evenly and
                then ever faster.
            guidance_scale: weight of the prompt against the negative prompt; up to 1 means no guidance, one transformer
                pass per step instead of two.
            guidance_rescale: share, 0 to 1, of a prediction whose spread is that without guidance (arXiv:2305.08891).
            image_cond_noise_scale: share of noise that what is given with a strength of 1 gets anew in each step, falling
                with the square of the noise level.
            num_videos_per_prompt: clips per prompt.
            generator: source of the noise, or one per clip. A generator on the CPU gives the same noise everywhere.
            latents: a clip to start from, float [B, c, f, h, w], with ``denoise_strength`` below 1.
            prompt_embeds: ready text embeddings [B, T, C].
            prompt_attention_mask: [B, T], ones for the tokens of ``prompt_embeds`` that count.
            negative_prompt_embeds: the same for the negative prompt, as is the next.
            negative_prompt_attention_mask: [B, T].
            decode_timestep: for a decoder with ``timestep_conditioning``: the noise level, 0 to 1, from which it denoises
                (checkpoints were published with 0.05 and 0.03); one, or one for each clip.
            decode_noise_scale: share of noise that is mixed into the latents before; by default ``decode_timestep``.
            output_type: ``"np"`` float32 [B, F, H, W, C] in 0 .. 1, ``"pt"`` [B, F, C, H, W] in 0 .. 1, ``"pil"``
                lists of pictures, ``"latent"`` float32 [B, c, f, h, w], not decoded.
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
            CheckpointError: a file or address that is no picture.
        """
        if conditions is None:
            conditions = _conditions_of(image, video, frame_index, strength)
        elif image is not None or video is not None:
            raise ConfigError("both conditions and image or video are given: give the conditions alone")
        listed = conditions if isinstance(conditions, list) else [conditions]
        return self._generate(
            _Given(listed, denoise_strength, image_cond_noise_scale),
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

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _scheduled(self, steps: int, timesteps: Sequence[float] | None, given: _Checked, clip: Clip) -> Tensor:
        times = linear_quadratic_timesteps(steps) if timesteps is None else timesteps
        self.scheduler.set_timesteps(timesteps=times, device=self.device)
        count = len(times)
        set_to: Tensor = self.scheduler.timesteps
        return set_to[max(count - min(int(count * given.denoise_strength), count), 0) :]

    def _started(
        self, given: _Checked, conditions: Conditions, latents: Tensor | None, timesteps: Tensor, clip: Clip
    ) -> tuple[Tensor, Conditions]:
        video = make_noise((clip.clips, self._channels(), *clip.grid), clip.generator, device=self.device)
        if latents is not None:
            sigma = self.scheduler.sigmas[len(self.scheduler.timesteps) - len(timesteps)]
            video = sigma * video + (1 - sigma) * latents.to(self.device, torch.float32)
        layout = _Layout(video, [0.0] * clip.grid[0])
        for shown in given.shown:
            self._put_in(layout, shown, clip)
        started = torch.cat([*layout.tokens, tokens_of(layout.latents)], dim=1)
        coordinates = torch.cat([*layout.coordinates, self._coordinates(clip.grid)], dim=1)
        coordinates[0] *= 1.0 / clip.frame_rate
        in_frame = clip.grid[1] * clip.grid[2]
        strengths = layout.token_strengths + [each for each in layout.strengths for _ in range(in_frame)]
        runs = [(strength, len(list(run))) for strength, run in groupby(strengths)]
        known = _Held(
            torch.tensor([strength for strength, _ in runs], device=self.device),
            tuple(length for _, length in runs),
            len(layout.token_strengths),
            started.clone() if given.shown else None,
            given.noise_scale,
            clip.generator,
        )
        return started, conditions.told(known, video_coords=coordinates.expand(clip.clips, -1, -1))

    def _put_in(self, layout: _Layout, shown: _Shown, clip: Clip) -> None:
        """Mix a condition into the latents where it lies, and what of it goes in front as tokens."""
        latents = self._normalized(draw_latents(self.vae, shown.frames, clip.generator, clip.clips))
        begin = 0
        if shown.frame_index > 0:
            begin = shown.frame_index // self._rate + _PREFIX_FRAMES
            latents, prefix = latents[:, :, _PREFIX_FRAMES:], latents[:, :, :_PREFIX_FRAMES]
            self._put_in_front(layout, prefix, shown, clip)
        place = slice(begin, begin + latents.shape[2])
        layout.latents[:, :, place] = torch.lerp(layout.latents[:, :, place], latents, shown.strength)
        layout.strengths[place] = [shown.strength] * latents.shape[2]

    def _put_in_front(self, layout: _Layout, latents: Tensor, shown: _Shown, clip: Clip) -> None:
        shape = (1 if not isinstance(clip.generator, list) else clip.clips, *latents.shape[1:])
        noise = for_clips(make_noise(shape, clip.generator, device=self.device), clip.clips)
        tokens = tokens_of(torch.lerp(noise, latents, shown.strength))
        coordinates = self._coordinates((latents.shape[2], *clip.grid[1:]))
        coordinates[0] += shown.frame_index
        layout.tokens.append(tokens)
        layout.coordinates.append(coordinates)
        layout.token_strengths += [shown.strength] * tokens.shape[1]

    def _coordinates(self, grid: tuple[int, int, int]) -> Tensor:
        """Frames, rows and columns of pixels [3, S] fp32 at which latents begin, the first of which stands for one frame."""
        axes = [torch.arange(count, device=self.device, dtype=torch.float32) for count in grid]
        scales = self._rate, self.vae_spatial_compression_ratio, self.vae_spatial_compression_ratio
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        places *= places.new_tensor(scales)[:, None]
        places[0] = (places[0] + 1 - self._rate).clamp_(min=0)
        return places

    # -- checks --------------------------------------------------------------------------------------------------------

    def _latent_shape(self, clip: Clip) -> tuple[int, ...]:
        return clip.clips, self._channels(), *clip.grid

    def _checked(self, given: _Given, clip: Clip, latents: Tensor | None) -> _Checked:
        check_finite(denoise_strength=given.denoise_strength, image_cond_noise_scale=given.noise_scale)
        if "per_token_timesteps" not in inspect.signature(self.scheduler.step).parameters:
            raise ConfigError(
                f"the scheduler's {type(self.scheduler).__name__}.step takes no per_token_timesteps: take "
                "pipeline.scheduler = vramkit.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)"
            )
        if not 0 <= given.denoise_strength <= 1:
            raise ConfigError(f"denoise_strength is {given.denoise_strength}; expected a number from 0 to 1")
        if (given.denoise_strength < 1) != (latents is not None):
            raise ConfigError(
                f"denoise_strength is {given.denoise_strength}, and latents are {'not ' if latents is None else ''}given: "
                "below 1 it says how far given latents are noised, and at 1 nothing of them would be left"
            )
        if given.conditions and self.vae is None:
            raise ConfigError("this pipeline has no vae, which encodes conditions: set pipeline.vae")
        shown = [self._checked_condition(at, condition, clip) for at, condition in enumerate(given.conditions)]
        return _Checked(shown, given.denoise_strength, given.noise_scale)

    def _checked_condition(self, at: int, condition: LTXVideoCondition, clip: Clip) -> _Shown:
        """Read the pictures of a condition, as many as there is room for."""
        name, index, strength = f"conditions[{at}]", condition.frame_index, condition.strength
        if (condition.image is None) == (condition.video is None):
            raise ConfigError(f"{name} has both image and video, or neither: give one of the two")
        check_finite(**{f"{name}.strength": strength})
        if not 0 <= strength <= 1:
            raise ConfigError(f"{name}.strength is {strength}; expected a number from 0 to 1")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < clip.num_frames:
            raise ConfigError(
                f"{name}.frame_index is {index!r}; expected a frame of the clip, 0 to {clip.num_frames - 1}"
            )
        pictures = Pictures.of(name, condition.video if condition.image is None else condition.image)
        if condition.image is not None:
            pictures.check_number(name, 1)
        room = min(len(pictures), clip.num_frames - index)
        count = (room - 1) // self._rate * self._rate + 1
        frames = pictures.fitted(clip.height, clip.width)[:count]
        return _Shown(frames.transpose(0, 1)[None].to(self.device), index, float(strength))


def linear_quadratic_timesteps(steps: int, *, slow: float = 0.025) -> list[float]:
    """Timesteps that fall evenly by `slow` of the range in the first half of the steps, and then as a parabola to the end.

    Source: Movie Gen (arXiv:2410.13720), as LTX-Video has it.
    """
    if steps < 2:
        return [1000.0]
    even = steps // 2
    curved = steps - even
    rest = even - slow * steps
    square = rest / (even * curved**2)
    slope = slow / even - 2 * rest / curved**2
    base = square * even**2
    falls = [step * slow / even for step in range(even)]
    falls += [square * step**2 + slope * step + base for step in range(even, steps)]
    levels = torch.tensor([1.0 - fall for fall in falls])
    timesteps: list[float] = (levels * 1000).tolist()
    return timesteps


def _conditions_of(image: Any, video: Any, frame_index: Any, strength: Any) -> list[LTXVideoCondition]:
    """The conditions that a call names by its other arguments; all of a list, where the published call takes the first."""
    images = image if isinstance(image, list) else [] if image is None else [image]
    # A list of lists or batches is several clips, one of pictures a single one.
    is_several = isinstance(video, list) and all(isinstance(v, list) or getattr(v, "ndim", 3) == 4 for v in video)
    videos = [] if video is None else video if is_several else [video]
    if images and videos:
        raise ConfigError("both image and video are given: name each in conditions")
    shown = [{"image": each} for each in images] or [{"video": each} for each in videos]
    options = []
    for name, given in (("frame_index", frame_index), ("strength", strength)):
        each = given if isinstance(given, list) else [given] * len(shown)
        if len(each) != len(shown):
            raise ConfigError(
                f"{name} has {len(each)} entries for {len(shown)} pictures or clips; give one, or as many"
            )
        options.append(each)
    return [
        LTXVideoCondition(**what, frame_index=index, strength=how_much)
        for what, index, how_much in zip(shown, *options, strict=True)
    ]
