"""Euler's method along the straight paths of flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._shift = self.options.shift

    @property
    def shift(self) -> float:
        """The shift of the noise levels, where it is not dynamic."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Shift the schedules that are made from now on by another amount; the range of training stays as it was made."""
        self._shift = shift

    def _schedule(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> tuple[Tensor, Sigmas]:
        train_steps = self.options.num_train_timesteps
        if sigmas is None:
            first, last = self._trained_range()
            levels: Sigmas = np.linspace(first * train_steps, last * train_steps, steps) / train_steps
        else:
            levels = np.asarray(sigmas, dtype=np.float32)
        shifted = torch.from_numpy(self._shifted(levels, self._shift, mu)).float()
        return shifted * train_steps, np.append(shifted.numpy(), np.float32(0))

    def _schedule_at(
        self, timesteps: Sequence[float], sigmas: Sequence[float] | None, mu: float | None
    ) -> tuple[Tensor, Sigmas]:
        """Noise levels are shifted as ever, also those that follow from the timesteps; the timesteps stay as given."""
        told = np.asarray(timesteps, dtype=np.float32)
        if sigmas is None:
            sigmas = (told / self.options.num_train_timesteps).tolist()
        _, levels = self._schedule(len(told), sigmas, mu)
        return torch.from_numpy(told), levels

    def _trained_range(self) -> tuple[float, float]:
        """Highest and lowest noise level of training; shifted already, unless the shift is dynamic."""
        ends = (
            torch.tensor([self.options.num_train_timesteps, 1], dtype=torch.float32) / self.options.num_train_timesteps
        )
        if not self.options.use_dynamic_shifting:
            ends = shift_sigmas(ends, self.options.shift)
        return ends[0].item(), ends[1].item()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one noise level to the next.

        Args:
            model_output: predicted flow, of the shape of sample.
            timestep: an element of `timesteps`; looked up at the first step, then counted.
            sample: the noisy sample; the sum is done in fp32.
            per_token_timesteps: [B, S] for tokens [B, S, C] at levels of their own, each of which goes to the next level of
                the schedule below it, against the flow: what is predicted is subtracted flow, as published.
            return_dict: False for a plain tuple.

        Returns:
            `.prev_sample`, in the dtype of model_output; with per_token_timesteps in fp32.
        """
        index = self._current_index(timestep)
        if per_token_timesteps is not None:
            levels = per_token_timesteps / self.options.num_train_timesteps  # [B, S]
            sigmas = self.sigmas.to(levels.device)[:, None, None]
            below = (sigmas * (sigmas < levels - 1e-6)).amax(dim=0)
            prev_sample = sample.float() + (levels - below)[..., None] * model_output
            self._step_index = index + 1
            return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
        distance = self.sigmas[index + 1] - self.sigmas[index]  # a 0-dim host tensor: no wait, no promotion
        prev_sample = (sample.float() + distance * model_output).to(model_output.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
