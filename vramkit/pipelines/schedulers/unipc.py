"""UniPC, a multistep predictor and corrector, for flow-matching models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vramkit.errors import ConfigError
from vramkit.pipelines.schedulers.common import (
    Scheduler,
    SchedulerOutput,
    Sigmas,
    check_options,
)

__all__ = ["UniPCMultistepScheduler", "UniPCOptions"]

# A first level of exactly 1 has no finite log signal-to-noise ratio.
FIRST_SIGMA_GAP = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class UniPCOptions:
    """The keys of a published scheduler_config.json, with diffusers' defaults.

    Only flow prediction on flow sigmas is supported, which has to be said: the defaults mean something else. Under it the
    betas, spacing, offset and thresholding values have no effect.
    """

    num_train_timesteps: int = 1000
    solver_order: int = 2
    prediction_type: str = "epsilon"
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    final_sigmas_type: str = "zero"
    disable_corrector: tuple[int, ...] = ()  # steps after which the next one is not corrected
    use_dynamic_shifting: bool = False  # mu of set_timesteps instead of flow_shift
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    thresholding: bool = False
    solver_p: None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    # Without effect on flow sigmas:
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Any = None
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "disable_corrector", tuple(self.disable_corrector))  # a list in JSON
        off = ("thresholding", "solver_p", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        check_options(
            self,
            supported={
                "prediction_type": ("flow_prediction",),
                "use_flow_sigmas": (True,),
                "predict_x0": (True,),
                "solver_type": ("bh1", "bh2"),
                "final_sigmas_type": ("zero", "sigma_min"),
                "time_shift_type": ("exponential", "linear"),
                **dict.fromkeys(off, (False, None)),
            },
            above_zero=("num_train_timesteps", "solver_order", "flow_shift"),
        )


def check_levels(levels: Sigmas) -> None:
    """Refuse noise levels of which two are one in fp32: the solver divides by their distance, and a clip of NaN came out."""
    narrow = levels.astype(np.float32)
    if not ((narrow > 0) & (narrow < 1)).all() or (narrow[1:] == narrow[:-1]).any():
        raise ConfigError(
            f"set_timesteps: the {len(levels)} noise levels {narrow[:3]} ... {narrow[-1:]} are not all different in fp32 "
            "and between 0 and 1; take fewer steps, a smaller shift or other sigmas"
        )


class _Interval(NamedTuple):
    """The coefficients of one step between two noise levels, fp32 scalars on the host."""

    scale: Tensor  # of the sample
    alpha: Tensor  # signal level at the target
    phi: Tensor  # e^-h - 1, h the difference of log signal-to-noise ratios
    b_h: Tensor  # B(h) of the paper
    ratios: list[Tensor]  # r_k of the earlier levels
    matrix: Tensor  # R of the paper, [order, order]
    vector: Tensor  # b of the paper, [order]


class UniPCMultistepScheduler(Scheduler):
    """Predicts with the outputs of the last steps and corrects that once the next output is there, at no extra model call.

    Source: UniPC (arXiv:2302.04867), with alpha = 1 - sigma as flow matching has it. Options are the fields of
    `UniPCOptions`.
    """

    options_class: ClassVar[type[UniPCOptions]] = UniPCOptions
    options: UniPCOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._forget()

    def _forget(self) -> None:
        self._clean: list[Tensor] = []  # predicted clean samples of the last steps, newest first
        self._last_sample: Tensor | None = None  # where the last prediction began
        self._last_order = 0

    def _schedule(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> tuple[Tensor, Sigmas]:
        train_steps = self.options.num_train_timesteps
        if sigmas is None:
            sigmas = np.linspace(1, 1 / train_steps, steps + 1)[:-1].tolist()
        levels = self._shifted(np.array(sigmas, dtype=np.float64), self.options.flow_shift, mu)
        if abs(levels[0] - 1) < FIRST_SIGMA_GAP:
            levels[0] -= FIRST_SIGMA_GAP
        check_levels(levels)
        final = 0.0 if self.options.final_sigmas_type == "zero" else levels[-1]
        return torch.from_numpy(levels * train_steps).long(), np.append(levels, final)

    def _start(self, timesteps: Tensor, sigmas: Sigmas, *, device: torch.device | str | None) -> None:
        super()._start(timesteps, sigmas, device=device)
        self._forget()

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Correct the last prediction with this output, then predict the sample at the next noise level.

        Args:
            model_output: predicted flow, of the shape of sample.
            timestep: an element of `timesteps`; looked up at the first step, then counted.
            sample: what the last step returned.
            return_dict: False for a plain tuple.

        Returns:
            `.prev_sample`, in the dtype of sample.
        """
        index = self._current_index(timestep)
        clean = sample - self.sigmas[index] * model_output
        if self._last_sample is not None and index > 0 and index - 1 not in self.options.disable_corrector:
            sample = self._correct(index, clean)
        self._clean = [clean, *self._clean][: self.options.solver_order]

        order = min(self.options.solver_order, len(self._clean))
        if self.options.lower_order_final:
            order = min(order, self.num_inference_steps - index)
        self._last_sample, self._last_order = sample, order
        prev_sample = self._predict(index, sample, order)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _predict(self, index: int, sample: Tensor, order: int) -> Tensor:
        """UniP: from level `index` to the next."""
        at = self._interval(index + 1, index, order)
        weights = torch.tensor([0.5])  # the paper's simplification at order 2
        if order > 2:
            weights = torch.linalg.solve(at.matrix[:-1, :-1], at.vector[:-1])
        return self._advance(at, sample, self._slopes(at), weights)

    def _correct(self, index: int, clean: Tensor) -> Tensor:
        """UniC: the step that led to level `index` once more, with what the model predicts there."""
        assert self._last_sample is not None
        at = self._interval(index, index - 1, self._last_order)
        weights = torch.tensor([0.5])  # the paper's simplification at order 1
        if self._last_order > 1:
            weights = torch.linalg.solve(at.matrix, at.vector)
        return self._advance(at, self._last_sample, [*self._slopes(at), clean - self._clean[0]], weights)

    def _slopes(self, at: _Interval) -> list[Tensor]:
        """Divided differences of the earlier predictions to the newest."""
        return [(earlier - self._clean[0]) / r for earlier, r in zip(self._clean[1:], at.ratios, strict=False)]

    def _advance(self, at: _Interval, sample: Tensor, slopes: list[Tensor], weights: Tensor) -> Tensor:
        """The exponential integrator with the weighted slopes."""
        # The coefficients stay 0-dim host tensors: they do not promote a half precision sample, and need no wait.
        moved = at.scale * sample - at.alpha * at.phi * self._clean[0]
        if slopes:
            weighted = torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True)])
            moved = moved - at.alpha * at.b_h * weighted.sum(0)
        return moved.to(sample.dtype)

    def _interval(self, target: int, base: int, order: int) -> _Interval:
        """Coefficients from level `base` to level `target`, all on the host."""
        alpha, sigma = 1 - self.sigmas, self.sigmas
        log_snr = alpha.log() - sigma.log()
        h = log_snr[target] - log_snr[base]
        ratios = [(log_snr[base - k] - log_snr[base]) / h for k in range(1, order)]
        phi = torch.expm1(-h)
        b_h = -h if self.options.solver_type == "bh1" else phi
        nodes = torch.stack([*ratios, torch.ones(())])
        term, factorial, vector = phi / -h - 1, 1, []
        for k in range(1, order + 1):
            vector.append(term * factorial / b_h)
            factorial *= k + 1
            term = term / -h - 1 / factorial
        matrix = torch.stack([nodes**k for k in range(order)])
        scale = sigma[target] / sigma[base]
        return _Interval(scale, alpha[target], phi, b_h, ratios, matrix, torch.stack(vector))
