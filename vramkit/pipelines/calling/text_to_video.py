"""What text-to-video pipelines share: the state of a call, guidance, the denoising loop, callbacks, decoding.

A family adds its components, its own arguments and how it encodes prompts; what differs in a step it overrides:
`_guided` (how two predictions are combined) and `_step` (how the scheduler is asked).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, cast, get_args

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.offload import offload_of
from vramkit.pipelines.calling.decoding import decode_in_memory
from vramkit.pipelines.calling.inputs import (
    check_choices,
    check_positive,
    check_prompts,
    check_scheduler,
    check_size,
    warn_caller,
)
from vramkit.pipelines.calling.known import Known, timestep_of_each_token
from vramkit.pipelines.calling.pipeline import Pipeline, execution_device, hand_over
from vramkit.pipelines.calling.video import OUTPUT_TYPES, VideoProcessor, postprocess_video
from vramkit.pipelines.loading.modeling import Model
from vramkit.pipelines.loading.options import refuse_arguments

__all__ = ["Conditions", "StepCallback", "TextToVideoPipeline", "VideoOutput", "wanted_tensors"]

# (pipeline, step, timestep, tensors) -> replacements for the tensors
StepCallback: TypeAlias = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
# (phase, what it begins with): see `TextToVideoPipeline.on_phase`
PhaseObserver: TypeAlias = Callable[..., None]
Guidance: TypeAlias = Literal["in turn", "paired"]
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
_ATTENTION_KWARGS: Mapping[str, str] = MappingProxyType(
    {"scale": "set_adapters(names, adapter_weights) weighs adapters, at no cost"}
)


class VideoOutput(NamedTuple):
    """What a call returns: ``.frames`` and ``[0]`` are the same."""

    frames: Any  # by output_type: array [B, F, H, W, C], tensor [B, F, C, H, W], B lists of pictures, latents

    def __getitem__(self, key: Any) -> Any:
        return self.frames if key == "frames" else tuple(self)[key]

    def to_tuple(self) -> tuple[Any]:
        """Return the plain tuple."""
        return (self.frames,)


@dataclasses.dataclass(frozen=True, slots=True)
class Conditions:
    """What the transformer is told beside latents and timestep: keyword arguments, with the text [B, S, C] by its name.

    ``negative`` says the same of the negative prompt, under the same names, and is None without guidance; ``shared`` is
    told alike with either. ``known`` is what of the clip there is before it is denoised.
    """

    positive: Mapping[str, Any]
    negative: Mapping[str, Any] | None = None
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    known: Known = dataclasses.field(default_factory=Known, kw_only=True)

    def tensors(self, wanted: Sequence[str], *, joined: bool) -> dict[str, Any]:
        """Those of the texts that are wanted, named as callbacks do.

        ``joined`` puts both, the negative first, under the name of the prompt.

        Raises:
            ConfigError: both are wanted as one tensor and have other lengths.
        """
        positive = self.positive["encoder_hidden_states"]
        negative = None if self.negative is None else self.negative["encoder_hidden_states"]
        if joined and negative is not None and "prompt_embeds" in wanted:
            if positive.shape[1] != negative.shape[1]:
                raise ConfigError(
                    f"prompt_embeds of callbacks are both texts as one tensor, and these have {positive.shape[1]} and "
                    f"{negative.shape[1]} tokens: pad them to one length, or leave prompt_embeds out of "
                    "callback_on_step_end_tensor_inputs"
                )
            positive = torch.cat([negative, positive])
        texts = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        return {name: texts[name] for name in wanted if name in texts}

    def replaced(self, changed: Mapping[str, Any], *, joined: bool) -> Conditions:
        """Return the same with the text that a callback gave back under the names of `tensors`.

        Where both are joined, the negative one by itself does not count. Half of both is the prompt alone: what scripts give
        back that end the guidance.

        Raises:
            ConfigError: what was given back does not fit.
        """
        positive, negative = changed.get("prompt_embeds"), changed.get("negative_prompt_embeds")
        unguided = self.negative is None
        if joined and isinstance(positive, Tensor) and not unguided:
            unguided = len(positive) == len(self.positive["encoder_hidden_states"])
            negative, positive = (None, positive) if unguided else positive.tensor_split(2)
        elif joined:
            negative = None
        return dataclasses.replace(
            self,
            positive=_with_text(self.positive, positive, name="prompt_embeds"),
            negative=None if unguided else _with_text(self.negative or {}, negative, name="negative_prompt_embeds"),
        )

    def told(self, known: Known, **both: Any) -> Conditions:
        """Return the same with what is known of the clip, and with arguments of both passes."""
        return dataclasses.replace(self, shared={**self.shared, **both}, known=known)


def _with_text(condition: Mapping[str, Any], text: Any, *, name: str) -> Mapping[str, Any]:
    """Return a condition with another text; None keeps the one that it has."""
    before = condition["encoder_hidden_states"]
    if text is None or text is before:
        return condition
    shape = tuple(text.shape) if isinstance(text, Tensor) else None
    # Where there is a mask it says which tokens count, so there have to be as many; else texts may have any length.
    has_mask = condition.get("encoder_attention_mask") is not None
    fits = shape is not None and len(shape) == 3 and (shape[0], shape[2]) == (before.shape[0], before.shape[2])
    if not fits or (has_mask and tuple(before.shape) != shape):
        raise ConfigError(
            f"a callback gave back {name} of shape {shape or type(text).__name__}; expected {tuple(before.shape)}"
        )
    return {**condition, "encoder_hidden_states": text.to(before)}


def wanted_tensors(callback: StepCallback | None, named: Sequence[str] | None) -> tuple[str, ...]:
    """Say which tensors a callback is given: those that the call names, or that the callback object itself asks for.

    Raises:
        ConfigError: the callback cannot be called.
    """
    if callback is not None and not callable(callback):
        raise ConfigError(
            f"callback_on_step_end is a {type(callback).__name__}; expected a function of pipeline, step, timestep, tensors"
        )
    return tuple(getattr(callback, "tensor_inputs", named) or ())


class Branches(Protocol):
    """Ranks that run the branches of guidance; see `vramkit.distributed.branches`."""

    def predictions(
        self, predict: Callable[..., Sequence[Tensor]], positive: Mapping[str, Any], negative: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return what `predict` gives for the prompt and for the negative one."""


class _CheckedError(Exception):
    """Ends a call whose arguments are all right, before it computes."""


class TextToVideoPipeline(Pipeline):
    """A pipeline with a transformer, a scheduler and a video VAE, whose call turns prompts into clips."""

    transformer: Any
    scheduler: Any
    vae: Any

    fps: ClassVar[float] = 16.0  # frames per second of the clips that the checkpoints were trained on
    vae_in_fp32: ClassVar[bool] = False  # whether the published VAE loses detail in 16 bits
    joins_texts: ClassVar[bool] = False  # whether callbacks are given both texts of guidance as prompt_embeds
    text_width: ClassVar[str] = "text_embed_dim"  # the option of the transformer that counts the channels of a text
    schedule_arguments: ClassVar[tuple[str, ...]] = ()  # what set_timesteps is asked beside the number of steps
    predictions: ClassVar[tuple[str, ...]] = ()  # what the transformer makes, as schedulers name it; () for anything

    def __init__(self) -> None:
        super().__init__()
        self._guidance_scale = 1.0
        self._given_guidance_scale = 1.0  # what the call was given; callbacks may change the other
        self._attention_kwargs: dict[str, Any] | None = None
        self._num_timesteps = 0
        self._current_timestep: Any = None
        self._expert: Any = None  # the transformer of the step in progress
        self._interrupt = False
        self._guidance: Guidance = "in turn"
        self._sizes: dict[str, Any] = {}
        self.branches: Branches | None = None
        """Ranks that predict for one of the two prompts each; None: this one predicts for both."""
        self.on_phase: PhaseObserver | None = None
        """Called as a call reaches each phase, with its name and what it begins with, by name: "encode" with the sizes and
        counts that the call has, given or by default; "denoise"; "decode" with what `decode_latents` is given."""

    @property
    def guidance(self) -> Guidance:
        """How a step with guidance runs the transformer on the two prompts; the results are the same, bit by bit.

        "in turn", which is the default, one after the other. "paired" layer by layer, both passing through each while it
        is there: weights that are streamed travel once per step and not twice, for the memory of one more token stream.
        Pair them where streaming the weights takes longer than computing, as it does with short clips.

        Raises:
            ConfigError: another value, when it is set; a transformer that cannot pair, when the pipeline is called.
        """
        return self._guidance

    @guidance.setter
    def guidance(self, value: Guidance) -> None:
        check_choices("guidance", [value], get_args(Guidance))
        self._guidance = value

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the call in progress."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress runs the transformer on the negative prompt too."""
        return self._guidance_scale > 1.0

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """The attention arguments of the call in progress."""
        return self._attention_kwargs

    @property
    def video_processor(self) -> VideoProcessor:
        """Turns decoded video into arrays, tensors or pictures."""
        return VideoProcessor()

    @property
    def num_timesteps(self) -> int:
        """How many steps the call in progress takes."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep being computed, None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set it to True from a step callback to skip the remaining steps and decode what is there."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def device(self) -> torch.device:
        """The device on which the transformer computes (the first module's when there is none)."""
        return super().device if self.transformer is None else execution_device(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype (the VAE's when there is none, float32 without either)."""
        model = self.transformer if self.transformer is not None else self.vae
        dtype: torch.dtype = torch.float32 if model is None else model.dtype
        return dtype

    def check(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse what a call with these arguments would refuse, and compute nothing: weights may be on the meta device.

        Returns:
            The sizes and counts that the call would have, given or by default: height, width, num_frames,
            num_inference_steps and others.

        Raises:
            ConfigError: as the call does.
        """

        def stop(_phase: str, **_given: Any) -> None:
            raise _CheckedError

        observer, self.on_phase = self.on_phase, stop
        together, self.together = self.together, None  # each rank may look for itself
        try:
            self(*args, **kwargs)
        except _CheckedError:
            pass
        finally:
            self.on_phase, self.together = observer, together
        return dict(self._sizes)

    def __call__(self, *args: Any, **kwargs: Any) -> VideoOutput:
        """Generate clips; a family says what from."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is called")

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents, as the denoising loop leaves them, into video [B, 3, F, H, W] in -1 .. 1."""
        raise AttributeError(f"{type(self).__name__} does not say how its latents are decoded")

    # -- steps of a call -----------------------------------------------------------------------------------------------

    def _check_call(
        self, *, height: int, width: int, multiple: int, output_type: str, wanted: tuple[str, ...], **counts: Any
    ) -> None:
        """Refuse what no call can use; ``counts`` are whole numbers of at least one, ``multiple`` is in pixels."""
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ConfigError(f"this pipeline has no {name}: load the checkpoint with it, or set pipeline.{name}")
        check_scheduler(self.scheduler, self.schedule_arguments, self.predictions)
        if self.vae is None and output_type != "latent":
            raise ConfigError('this pipeline has no vae: ask for output_type="latent", or set pipeline.vae')
        if self._guidance == "paired" and "others" not in inspect.signature(self.transformer.forward).parameters:
            raise ConfigError(
                f'guidance is "paired", but the forward of {type(self.transformer).__name__} does not take several texts '
                '(no argument `others`): set pipeline.guidance = "in turn"'
            )
        check_positive(height=height, width=width, **counts)
        check_size(height, width, multiple=multiple)
        check_choices("output_type", [output_type], (*OUTPUT_TYPES, "latent"))
        check_choices("callback_on_step_end_tensor_inputs", wanted, CALLBACK_TENSORS)
        self._sizes = {"height": height, "width": width, **counts}

    def _check_prompts(self, *texts: Any) -> int:
        """Return how many prompts there are; see `check_prompts`."""
        return check_prompts(*texts, channels=getattr(self.transformer.config, self.text_width, None))

    def _enter(self, phase: str, **given: Any) -> None:
        """Tell the observer that a phase begins."""
        if self.on_phase is not None:
            self.on_phase(phase, **given)

    def _begin(self, *, guidance_scale: float, attention_kwargs: dict[str, Any] | None) -> None:
        """Set the state that properties show, at the beginning of a call."""
        if not isinstance(attention_kwargs, Mapping | None):
            raise ConfigError(f"attention_kwargs is a {type(attention_kwargs).__name__}; expected a dict or None")
        if isinstance(self.transformer, Model) and attention_kwargs:
            given = {name: value for name, value in attention_kwargs.items() if (name, value) != ("scale", 1)}
            refuse_arguments("attention_kwargs", given, _ATTENTION_KWARGS)
            attention_kwargs = None
        self._guidance_scale = self._given_guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False

    def _denoise(
        self,
        latents: Tensor,
        conditions: Conditions,
        *,
        callback: StepCallback | None,
        wanted: tuple[str, ...],
        timesteps: Tensor | None = None,
    ) -> Tensor:
        """Walk the latents (float32) from noise to the clip, along the timesteps of the scheduler, or given ones."""
        self._enter("denoise")
        timesteps = self.scheduler.timesteps if timesteps is None else timesteps
        self._num_timesteps = len(timesteps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # timesteps may repeat: the first one does not say where the run begins
        experts = self._experts(timesteps)
        if callback is not None:
            conditions.tensors(wanted, joined=self.joins_texts)  # refused before the first step
        try:
            with self.progress_bar(total=self._num_timesteps) as bar:
                for step, timestep in enumerate(timesteps):
                    if self._interrupt:
                        break
                    self._current_timestep, self._expert = timestep, experts[step]
                    latents = conditions.known.prepared(latents, timestep)
                    noise = self._predict_noise(latents, timestep, conditions)
                    if step + 1 < len(experts):
                        hand_over(experts[step], experts[step + 1])
                    latents = conditions.known.stepped(self._step, noise, timestep, latents)
                    if callback is not None:
                        latents, conditions = self._call_back(callback, wanted, step, timestep, latents, conditions)
                    bar.update()
        finally:
            self._current_timestep = self._expert = None
        return conditions.known.finished(latents)

    def _experts(self, timesteps: Tensor) -> list[Any]:
        """The transformer of each step."""
        return [self.transformer] * len(timesteps)

    def _call_back(  # noqa: PLR0917
        self,
        callback: StepCallback,
        wanted: tuple[str, ...],
        step: int,
        timestep: Tensor,
        latents: Tensor,
        conditions: Conditions,
    ) -> tuple[Tensor, Conditions]:
        """Return what a callback makes of the latents and of the text after a step."""
        given = conditions.tensors(wanted, joined=self.joins_texts)
        if "latents" in wanted:
            given["latents"] = latents
        scale = self._guidance_scale
        answer = callback(self, step, timestep, {**given})
        if not isinstance(answer, Mapping | None):
            raise ConfigError(
                f"a callback gave back a {type(answer).__name__}; expected a dict of the tensors to go on with, or None"
            )
        returned = given | {**(answer or {})}  # what is given may be changed in place
        if self._guidance_scale != scale and (note := self._guidance_note()):
            warn_caller(f"_guidance_scale was set to {self._guidance_scale} in a callback: {note}")
        moved = returned.get("latents", latents)
        if not isinstance(moved, Tensor) or moved.shape != latents.shape:
            shape = getattr(moved, "shape", type(moved).__name__)
            raise ConfigError(f"a callback gave back latents of shape {shape}; expected {tuple(latents.shape)}")
        return moved, conditions.replaced(returned, joined=self.joins_texts)

    def _guidance_note(self) -> str | None:
        """Say what a guidance scale that a callback has set does, where that is not what one would expect."""
        return None

    def _predict_noise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Run the transformer on the prompt and, with guidance, on the negative prompt; see `guidance`."""
        inputs = conditions.known.inputs(latents, timestep)
        inputs["hidden_states"] = inputs["hidden_states"].to(self.dtype)
        if "timestep_tokens" in inputs and not getattr(self._expert, "takes_timestep_runs", False):  # not one of ours
            inputs["timestep"] = timestep_of_each_token(inputs["timestep"], inputs.pop("timestep_tokens"))

        def predict(told: Mapping[str, Any], *others: Mapping[str, Any]) -> Sequence[Tensor]:
            expert = partial(
                self._expert,
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
                **inputs,
                **conditions.shared,
                **told,
                **({"others": others} if others else {}),
            )
            try:
                return cast("Sequence[Tensor]", expert())
            except torch.OutOfMemoryError:  # of several ranks, the error ends all
                if offload_of(self._expert) is None or self.together is not None:
                    raise
            # What is offloaded has let go of what it could, and here nothing holds the tensors of the first try.
            return cast("Sequence[Tensor]", expert())

        if not self.do_classifier_free_guidance:  # a callback may have ended it
            return predict(conditions.positive)[0]
        if conditions.negative is None:
            raise ConfigError(
                f"the guidance scale is {self._guidance_scale} and there is no negative prompt: a callback raised it in a "
                "call that began without guidance (begin above 1 and set it to 1 in the callback), or gave back "
                "prompt_embeds without the negative half (set pipeline._guidance_scale to 1 as well)"
            )
        if self.branches is not None:
            positive, negative = self.branches.predictions(predict, conditions.positive, conditions.negative)
        elif self._guidance == "paired":
            positive, negative = predict(conditions.positive, conditions.negative)
        else:
            (positive,), (negative,) = predict(conditions.positive), predict(conditions.negative)
        return self._guided(positive, negative, timestep)

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        """Combine the predictions for the prompt and for the negative prompt."""
        return negative + self._guidance_scale * (positive - negative)

    def _step(self, noise: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Tensor:
        """Take one step of the scheduler."""
        stepped: Tensor = self.scheduler.step(noise, timestep, latents, return_dict=False, **options)[0]
        return stepped

    def _finish(self, latents: Tensor, output_type: str, **decoding: Any) -> VideoOutput:
        """Decode, with what else `decode_latents` takes, unless latents are wanted; let the last model leave the device.

        Raises:
            DecodeMemoryError: the device has no memory for it; the error holds the latents.
        """
        if output_type == "latent":
            frames: Any = latents
        else:
            self._enter("decode", latents=latents, **decoding)
            video = decode_in_memory(
                partial(self.decode_latents, latents, **decoding),
                latents,
                vae=self.vae,
                generator=decoding.get("generator"),
            )
            frames = postprocess_video(video, output_type)
        self.maybe_free()
        return VideoOutput(frames)
