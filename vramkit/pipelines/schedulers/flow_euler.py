"""Euler's method along the straight paths of flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vramkit.pipelines.schedulers.common import (
    Scheduler,
    SchedulerOutput,
    Sigmas,
    check_options,
    shift_sigmas,
)

__all__ = ["FlowMatchEulerDiscreteScheduler", "FlowMatchEulerOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatchEulerOptions:
    """The keys of a published scheduler_config.json, with diffusers' defaults."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False  # mu of set_timesteps instead of shift
    base_shift: float | None = 0.5  # the next four: how pipelines compute mu from the number of tokens
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        off = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
        check_options(
            self,
            supported={**dict.fromkeys(off, (False, None)), "time_shift_type": ("exponential", "linear")},
            above_zero=("num_train_timesteps", "shift"),
        )


class FlowMatchEulerDiscreteScheduler(Scheduler):
    """x += (next sigma - sigma) * flow. Source: flow matching (arXiv:2210.02747), SD3 (arXiv:2403.03206).

    Options are the fields of `FlowMatchEulerOptions`.
    """

    options_class: ClassVar[type[FlowMatchEulerOptions]] = FlowMatchEulerOptions
    options: FlowMatchEulerOptions

    def _schedule(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> tuple[Tensor, Sigmas]:
        train_steps = self.options.num_train_timesteps
        if sigmas is None:
            first, last = self._trained_range()
            levels: Sigmas = np.linspace(first * train_steps, last * train_steps, steps) / train_steps
        else:
            levels = np.asarray(sigmas, dtype=np.float32)
        shifted = torch.from_numpy(self._shifted(levels, self.options.shift, mu)).float()
        return shifted * train_steps, np.append(shifted.numpy(), np.float32(0))

    def _trained_range(self) -> tuple[float, float]:
        """Highest and lowest noise level of training; shifted already, unless the shift is dynamic."""
        ends = (
            torch.tensor([self.options.num_train_timesteps, 1], dtype=torch.float32) / self.options.num_train_timesteps
        )
        if not self.options.use_dynamic_shifting:
            ends = shift_sigmas(ends, self.options.shift)
        return ends[0].item(), ends[1].item()

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, *, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one noise level to the next.

        Args:
            model_output: predicted flow, of the shape of sample.
            timestep: an element of `timesteps`; looked up at the first step, then counted.
            sample: the noisy sample; the sum is done in fp32.
            return_dict: False for a plain tuple.

        Returns:
            `.prev_sample`, in the dtype of model_output.
        """
        index = self._current_index(timestep)
        distance = self.sigmas[index + 1] - self.sigmas[index]  # a 0-dim host tensor: no wait, no promotion
        prev_sample = (sample.float() + distance * model_output).to(model_output.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
