"""What text-to-video pipelines share: the state of a call, guidance, the denoising loop, callbacks, decoding.

A family adds its components, its own arguments and how it encodes prompts; what differs in a step it overrides:
`_guided` (how two predictions are combined) and `_step` (how the scheduler is asked).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.inputs import check_choices, check_positive, check_size
from vramkit.pipelines.pipeline import Pipeline, execution_device
from vramkit.pipelines.video import OUTPUT_TYPES, postprocess_video

__all__ = ["Conditions", "StepCallback", "TextToVideoPipeline", "VideoOutput", "wanted_tensors"]

# (pipeline, step, timestep, tensors) -> replacements for the tensors
StepCallback: TypeAlias = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class VideoOutput(NamedTuple):
    """What a call returns: ``.frames`` and ``[0]`` are the same."""

    frames: Any  # by output_type: array [B, F, H, W, C], tensor [B, F, C, H, W], B lists of pictures, latents


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the transformer is told beside latents and timestep: keyword arguments, with the text [B, S, C] by its name.

    ``negative`` is what it is told in the second pass of guidance, None without guidance.
    """

    positive: Mapping[str, Any]
    negative: Mapping[str, Any] | None = None

    def tensors(self) -> dict[str, Any]:
        """Name the text as callbacks do."""
        negative = None if self.negative is None else self.negative["encoder_hidden_states"]
        return {"prompt_embeds": self.positive["encoder_hidden_states"], "negative_prompt_embeds": negative}

    def replaced(self, changed: Mapping[str, Any]) -> Conditions:
        """Return the same with the text that a callback gave back."""
        positive, negative = dict(self.positive), None if self.negative is None else dict(self.negative)
        if "prompt_embeds" in changed:
            positive["encoder_hidden_states"] = changed["prompt_embeds"]
        if negative is not None and "negative_prompt_embeds" in changed:
            negative["encoder_hidden_states"] = changed["negative_prompt_embeds"]
        return Conditions(positive, negative)


def wanted_tensors(callback: StepCallback | None, named: Sequence[str] | None) -> tuple[str, ...]:
    """Say which tensors a callback is given: those that the call names, or that the callback object itself asks for."""
    return tuple(getattr(callback, "tensor_inputs", named) or ())


class TextToVideoPipeline(Pipeline):
    """A pipeline with a transformer, a scheduler and a video VAE, whose call turns prompts into clips."""

    transformer: Any
    scheduler: Any
    vae: Any

    fps: ClassVar[float] = 16.0  # frames per second of the clips that the checkpoints were trained on
    vae_in_fp32: ClassVar[bool] = False  # whether the published VAE loses detail in 16 bits

    def __init__(self) -> None:
        super().__init__()
        self._guidance_scale = 1.0
        self._attention_kwargs: dict[str, Any] | None = None
        self._num_timesteps = 0
        self._current_timestep: Any = None
        self._interrupt = False

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
        """The transformer's dtype (float32 when there is none)."""
        dtype: torch.dtype = self.transformer.dtype if self.transformer is not None else torch.float32
        return dtype

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
        if self.vae is None and output_type != "latent":
            raise ConfigError('this pipeline has no vae: ask for output_type="latent", or set pipeline.vae')
        check_positive(height=height, width=width, **counts)
        check_size(height, width, multiple=multiple)
        check_choices("output_type", [output_type], (*OUTPUT_TYPES, "latent"))
        check_choices("callback_on_step_end_tensor_inputs", wanted, CALLBACK_TENSORS)

    def _begin(self, *, guidance_scale: float, attention_kwargs: dict[str, Any] | None) -> None:
        """Set the state that properties show, at the beginning of a call."""
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False

    def _denoise(
        self, latents: Tensor, conditions: Conditions, *, callback: StepCallback | None, wanted: tuple[str, ...]
    ) -> Tensor:
        """Walk the latents (float32) from noise to the clip, along the timesteps that the scheduler was set to."""
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=self._num_timesteps) as bar:
            for step, timestep in enumerate(timesteps):
                if self._interrupt:
                    break
                self._current_timestep = timestep
                noise = self._predict_noise(latents, timestep, conditions)
                latents = self._step(noise, timestep, latents)
                if callback is not None:
                    tensors = {"latents": latents, **conditions.tensors()}
                    changed = callback(self, step, timestep, {name: tensors[name] for name in wanted}) or {}
                    latents = changed.get("latents", latents)
                    conditions = conditions.replaced(changed)
                bar.update()
        self._current_timestep = None
        return latents

    def _predict_noise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Run the transformer once, or twice with guidance; one after the other, which needs half the memory."""

        def predict(condition: Mapping[str, Any]) -> Tensor:
            noise: Tensor = self.transformer(
                hidden_states=latents.to(self.dtype),
                timestep=timestep.expand(latents.shape[0]),
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
                **condition,
            )[0]
            return noise

        positive = predict(conditions.positive)
        if conditions.negative is None:
            return positive
        return self._guided(positive, predict(conditions.negative), timestep)

    def _guided(self, positive: Tensor, negative: Tensor, timestep: Tensor) -> Tensor:
        """Combine the predictions for the prompt and for the negative prompt."""
        return negative + self._guidance_scale * (positive - negative)

    def _step(self, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """Take one step of the scheduler."""
        stepped: Tensor = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return stepped

    def _finish(self, latents: Tensor, output_type: str, **decoding: Any) -> VideoOutput:
        """Decode, with what else `decode_latents` takes, unless latents are wanted; let the last model leave the device."""
        if output_type == "latent":
            frames: Any = latents
        else:
            frames = postprocess_video(self.decode_latents(latents, **decoding), output_type)
        self.maybe_free()
        return VideoOutput(frames)
