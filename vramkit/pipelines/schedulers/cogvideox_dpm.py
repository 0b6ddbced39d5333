"""DPM-Solver++ of second order in its stochastic form, as CogVideoX uses it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vramkit.pipelines.calling.inputs import Generators, make_noise
from vramkit.pipelines.schedulers.cogvideox import CogVideoXScheduler
from vramkit.pipelines.schedulers.common import SchedulerOutput, Sigmas

__all__ = ["CogVideoXDPMScheduler"]


class CogVideoXDPMScheduler(CogVideoXScheduler):
    """Extrapolates the clean sample from the last two predictions and adds fresh noise in every step but the last.

    Source: DPM-Solver++ (arXiv:2211.01095), SDE-DPM-Solver++(2M). Options are the fields of `CogVideoXSchedulerOptions`. The
    last prediction is kept here, so a step takes no more arguments than those of other schedulers.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._last_clean: Tensor | None = None

    def _start(self, timesteps: Tensor, sigmas: Sigmas, *, device: torch.device | str | None) -> None:
        super()._start(timesteps, sigmas, device=device)
        self._last_clean = None

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one noise level to the next.

        Args:
            model_output: what `prediction_type` says, of the shape of sample.
            timestep: an element of `timesteps`; looked up at the first step, then counted.
            sample: the noisy sample; noise is drawn in its dtype.
            generator: source of the noise, or one for each item of the batch.
            return_dict: False for a plain tuple.

        Returns:
            `.prev_sample`, in the wider of the two dtypes.
        """
        index = self._current_index(timestep)
        signal, target = self._signal(self._visited[index]), self._signal(self._aims[index])
        at, to = _half_log_snr(signal), _half_log_snr(target)
        clean = aim = self._clean(model_output, sample, signal)
        noise = make_noise(tuple(sample.shape), generator, device=sample.device, dtype=sample.dtype)
        if self._last_clean is not None and self._aims[index] >= 0:
            ratio = (at - _half_log_snr(self._signal(self._visited[index - 1]))) / (to - at)
            aim = clean + (clean - self._last_clean) / (2 * ratio)
            # The published solver draws again and drops the first noise: so do we, for the same clip from the same seed.
            noise = make_noise(tuple(sample.shape), generator, device=sample.device, dtype=sample.dtype)
        fade = math.exp(at - to)
        kept = math.sqrt((1 - target) / (1 - signal)) * fade
        spread = math.sqrt((1 - target) * (1 - fade**2))
        prev_sample = kept * sample + math.sqrt(target) * (1 - fade**2) * aim + spread * noise
        self._last_clean = clean
        self._step_index = index + 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)


def _half_log_snr(signal: float) -> float:
    """Half the logarithm of the signal-to-noise ratio, infinite for a clean sample and for pure noise."""
    if not 0 < signal < 1:
        return math.copysign(math.inf, signal - 0.5)
    return 0.5 * math.log(signal / (1 - signal))
