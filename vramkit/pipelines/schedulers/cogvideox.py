"""What the two CogVideoX schedulers share: the noise levels of training and which of them a run visits.

Samples are mixed so that their variance is kept, x = sqrt(a) clean + sqrt(1 - a) noise, where a is the share of the signal:
near 1 at the first training timestep, 0 at the last where the checkpoint asks for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.schedulers.common import Scheduler, Sigmas, check_options

__all__ = ["CogVideoXScheduler", "CogVideoXSchedulerOptions"]

Signal = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CogVideoXSchedulerOptions:
    """The keys of a published scheduler_config.json, with diffusers' defaults.

    The clipping options are read and have no effect, here as in the published schedulers.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: None = None
    set_alpha_to_one: bool = True  # what the last step aims at: a clean sample, or the first training timestep
    steps_offset: int = 0  # added to timesteps of "leading" spacing
    prediction_type: str = "epsilon"  # the published checkpoints say "v_prediction"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0
    # Without effect:
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        check_options(
            self,
            supported={
                "beta_schedule": ("scaled_linear", "linear"),
                "trained_betas": (None,),
                "prediction_type": ("epsilon", "sample", "v_prediction"),
                "timestep_spacing": ("linspace", "leading", "trailing"),
            },
            above_zero=("num_train_timesteps", "beta_start", "beta_end", "snr_shift_scale"),
        )


class CogVideoXScheduler(Scheduler):
    """The schedule of a run; a subclass says how a step is taken.

    A step from timestep t aims at t - num_train_timesteps // steps, which need not be the next of `timesteps`: the rounding
    of the published schedulers.
    """

    options_class: ClassVar[type[CogVideoXSchedulerOptions]] = CogVideoXSchedulerOptions
    options: CogVideoXSchedulerOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._trained = trained_signal(self.options)
        self._visited: list[int] = []  # the timestep of each step
        self._aims: list[int] = []  # and the one that the step leads to; below 0 is the clean sample

    def _schedule(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> tuple[Tensor, Sigmas]:
        train_steps = self.options.num_train_timesteps
        if sigmas is not None or mu is not None:
            raise ConfigError(
                f"set_timesteps: {type(self).__name__} takes no sigmas and no mu; give num_inference_steps"
            )
        if steps > train_steps:
            raise ConfigError(f"set_timesteps: got {steps} steps, at most {train_steps} were trained")
        timesteps = self._spaced(steps)
        if timesteps[0] >= train_steps:
            raise ConfigError(
                f"set_timesteps: steps_offset={self.options.steps_offset} leads to timestep {timesteps[0]}, the last "
                f"that was trained is {train_steps - 1}; take a smaller offset"
            )
        self._visited = timesteps.tolist()
        self._aims = (timesteps - train_steps // steps).tolist()
        signals = [self._signal(timestep) for timestep in (*self._visited, self._aims[-1])]
        return torch.from_numpy(timesteps), np.sqrt(1 - np.array(signals))

    def _spaced(self, steps: int) -> NDArray[np.int64]:
        """The timesteps of a run, falling. Source: table 2 of arXiv:2305.08891."""
        train_steps, spacing = self.options.num_train_timesteps, self.options.timestep_spacing
        places: NDArray[Any]
        if spacing == "linspace":
            places = np.linspace(0, train_steps - 1, steps)[::-1]
        elif spacing == "leading":
            places = np.arange(steps)[::-1] * (train_steps // steps) + self.options.steps_offset
        else:
            places = np.arange(train_steps, 0, -train_steps / steps)[:steps].round() - 1
        timesteps: NDArray[np.int64] = places.round().astype(np.int64)
        return timesteps

    def _signal(self, timestep: int) -> float:
        """The share of the signal at a trained timestep, or where the last step ends."""
        if timestep < 0 and self.options.set_alpha_to_one:
            return 1.0
        return float(self._trained[max(0, timestep)])

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Mix a clean sample with noise to the level of a trained timestep [1] or [B], a whole number."""
        signal = torch.from_numpy(self._trained[timestep.cpu().long().numpy()]).to(sample.device, sample.dtype)
        signal = signal.view(-1, *[1] * (sample.ndim - 1))
        return signal.sqrt() * sample + (1 - signal).sqrt() * noise

    def _clean(self, model_output: Tensor, sample: Tensor, signal: float) -> Tensor:
        """The clean sample that a model output speaks of."""
        root, noise_root = math.sqrt(signal), math.sqrt(1 - signal)
        if self.options.prediction_type == "v_prediction":
            return root * sample - noise_root * model_output
        if self.options.prediction_type == "epsilon":
            return (sample - noise_root * model_output) / root
        return model_output


def trained_signal(options: CogVideoXSchedulerOptions) -> Signal:
    """The share of the signal at each training timestep, [num_train_timesteps], falling.

    The signal-to-noise ratio of the betas is divided by `snr_shift_scale` (SD3, arXiv:2403.03206), then stretched so that
    the last one is zero, if that is asked for (arXiv:2305.08891, algorithm 1).
    """
    power = 2 if options.beta_schedule == "scaled_linear" else 1
    ends = options.beta_start ** (1 / power), options.beta_end ** (1 / power)
    signal = np.cumprod(1 - np.linspace(*ends, options.num_train_timesteps) ** power)
    scale = options.snr_shift_scale
    signal = signal / (scale + (1 - scale) * signal)
    if options.rescale_betas_zero_snr:
        root = np.sqrt(signal)
        signal = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return signal
