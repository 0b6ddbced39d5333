"""DDIM as CogVideoX uses it: each step goes straight towards the clean sample that the model speaks of."""

from __future__ import annotations

import math

from torch import Tensor

from vramkit.pipelines.schedulers.cogvideox import CogVideoXScheduler
from vramkit.pipelines.schedulers.common import SchedulerOutput

__all__ = ["CogVideoXDDIMScheduler"]


class CogVideoXDDIMScheduler(CogVideoXScheduler):
    """x' = sqrt(a') clean + sqrt(1 - a') noise, with the clean sample and the noise that are predicted at x.

    Source: DDIM (arXiv:2010.02502) without randomness. Options are the fields of `CogVideoXSchedulerOptions`.
    """

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, *, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one noise level to the next.

        Args:
            model_output: what `prediction_type` says, of the shape of sample.
            timestep: an element of `timesteps`; looked up at the first step, then counted.
            sample: the noisy sample.
            return_dict: False for a plain tuple.

        Returns:
            `.prev_sample`, in the wider of the two dtypes.
        """
        index = self._current_index(timestep)
        signal, target = self._signal(self._visited[index]), self._signal(self._aims[index])
        clean = self._clean(model_output, sample, signal)
        kept = math.sqrt((1 - target) / (1 - signal))
        prev_sample = kept * sample + (math.sqrt(target) - math.sqrt(signal) * kept) * clean
        self._step_index = index + 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
