"""What the schedulers share: a config that can be handed from one to another, the schedule's bookkeeping, the output."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from vramkit.errors import ConfigError
from vramkit.pipelines.calling.inputs import plain_number
from vramkit.pipelines.loading.absent import Absent
from vramkit.pipelines.loading.arguments import other_arguments, refuse_saving
from vramkit.pipelines.loading.folders import read_json
from vramkit.pipelines.loading.options import FrozenConfig, make_options

__all__ = [
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "check_options",
    "check_steps",
    "dynamic_shift",
    "shift_sigmas",
    "stretch_to_terminal",
]

CONFIG_NAME = "scheduler_config.json"

Sigmas = NDArray[np.floating[Any]]


class SchedulerOutput(NamedTuple):
    """What a step returns; also answers to [0]."""

    prev_sample: Tensor


class SchedulerConfig(FrozenConfig):
    """The options of a scheduler.

    Options that belong to other schedulers are kept, so that a config survives being handed around. It is a dict, which is
    what ``from_config`` of other libraries asks for.
    """

    way = "type(scheduler).from_config(scheduler.config, option=value) makes another scheduler"


class Scheduler(ABC):
    """A schedule of noise levels and the rule that goes from one to the next.

    The levels rest on the host as fp32 (`sigmas`, one more than steps) and the position in them is counted there, so that a
    step never waits for the device. A subclass sets `options_class`, a frozen dataclass of the published options that checks
    itself, and computes `_schedule` and `step`.
    """

    options_class: ClassVar[type[Any]]
    order: ClassVar[int] = 1
    init_noise_sigma: ClassVar[float] = 1.0

    def __init__(self, **options: Any) -> None:
        self.options = make_options(self.options_class, options, owner=type(self).__name__)
        self.config = SchedulerConfig({"_class_name": type(self).__name__, **dataclasses.asdict(self.options)})
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self.num_inference_steps = 0
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._host_timesteps: list[float] = []

    # -- configs -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler from the config of any scheduler, with some options changed.

        Options of the config that this scheduler does not have are kept in `.config` and not used.

        Raises:
            ConfigError: an override that this scheduler does not have, or a value that it cannot use.
        """
        known = {field.name for field in dataclasses.fields(cls.options_class)}
        used = {key: value for key, value in config.items() if key in known}
        scheduler = cls(**{**used, **overrides})
        others = {key: value for key, value in config.items() if key not in known and not key.startswith("_")}
        scheduler.config = SchedulerConfig({**others, **scheduler.config})
        return scheduler

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """A scheduler from the scheduler_config.json of a folder or hub repository.

        Beside options that are changed, ``overrides`` may say where it is: ``revision``, ``cache_dir``, ``token``,
        ``local_files_only``, ``force_download``.
        Options of a file for this class that it does not have are named in a warning.

        Raises:
            CheckpointError: the file is missing or not a JSON object.
            ConfigError: as in from_config.
        """
        from vramkit.pipelines.loading.hub import DOWNLOAD  # noqa: PLC0415 - a scheduler from a config needs no hub

        overrides = other_arguments(f"{cls.__name__}.from_pretrained", overrides)
        where = {name: overrides.pop(name) for name in ("revision", "cache_dir", *DOWNLOAD) if name in overrides}
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **where)
        known = {field.name for field in dataclasses.fields(cls.options_class)}
        others = [key for key in config if key not in known and not key.startswith("_")]
        if others and config.get("_class_name") == cls.__name__:  # those of another class have options of their own
            named = ", ".join(f"{key}={config[key]!r}" for key in others)
            warnings.warn(
                f"{pretrained_model_name_or_path}: {cls.__name__} does not know {named}; passed over",
                UserWarning,
                stacklevel=2,
            )
        return cls.from_config(config, **overrides)

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **where: Any
    ) -> dict[str, Any]:
        """The scheduler_config.json of a folder, for `from_config`; where it is, by the arguments of `from_pretrained`."""
        from vramkit.pipelines.loading.hub import local_folder  # noqa: PLC0415

        pattern = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        return read_json(
            local_folder(pretrained_model_name_or_path, subfolder=subfolder, allow_patterns=[pattern], **where)
            / CONFIG_NAME
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **others: Any) -> None:
        """Write scheduler_config.json into a folder, which is made if it is missing; `others` as a model takes them."""
        from vramkit.offload.disk import staged_folder  # noqa: PLC0415 - a scheduler needs no engine

        refuse_saving(others)
        with staged_folder(save_directory) as stage:
            (stage / CONFIG_NAME).write_text(json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n")

    save_config = Absent("save_pretrained(folder) writes it")
    register_to_config = Absent("a config is not changed: from_config(config, option=value) makes another scheduler")
    push_to_hub = Absent("save_pretrained(folder), then `hf upload`")
    get_velocity = Absent("it is for training")

    # -- schedule ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Timesteps of training."""
        train_steps: int = self.options.num_train_timesteps
        return train_steps

    @property
    def step_index(self) -> int | None:
        """Steps done; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step that `set_begin_index` chose to start at; None where the first timestep says it."""
        return self._begin_index

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """The step of a timestep of the schedule; of repeated ones the second."""
        return self._index_of(timestep)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at this step, without a look at the timestep that the first call of step is given."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is: flow models take it unscaled."""
        del timestep
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Mix a clean sample with noise to the level of a timestep [1] or [B]: sigma * noise + (1 - sigma) * sample."""
        if self._begin_index is not None:
            levels = self.sigmas[self._step_index if self._step_index is not None else self._begin_index][None]
        else:
            levels = self.sigmas[[self._index_of(t) for t in timestep]]
        sigma = levels.to(sample.device, sample.dtype).view(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise` by its other name, with the arguments in that one's order."""
        return self.scale_noise(original_samples, timesteps, noise)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Make the schedule of a run and forget the last one.

        Args:
            num_inference_steps: how many steps; may be left out where sigmas are given.
            device: where `timesteps` are put; the sigmas stay on the host.
            sigmas: noise levels from 1 downwards, before they are shifted; evenly spaced ones without it.
            mu: the shift, if the scheduler shifts dynamically.
            timesteps: what the model is told in each step, as it is; only Euler takes them.

        Raises:
            ConfigError: neither steps nor sigmas nor timesteps, several but of different number, or mu missing.
        """
        steps = check_steps(plain_number(num_inference_steps), sigmas, timesteps)
        if timesteps is None:
            told, levels = self._schedule(steps, sigmas, mu)
        else:
            told, levels = self._schedule_at(timesteps, sigmas, mu)
        self._start(told, levels, device=device)

    @abstractmethod
    def _schedule(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> tuple[Tensor, Sigmas]:
        """Timesteps [steps] and noise levels [steps + 1], both shifted."""

    def _schedule_at(
        self, timesteps: Sequence[float], sigmas: Sequence[float] | None, mu: float | None
    ) -> tuple[Tensor, Sigmas]:
        """The same with given timesteps."""
        raise ConfigError(
            f"set_timesteps: {type(self).__name__} takes no timesteps, which follow from its noise levels; give "
            "num_inference_steps"
        )

    @abstractmethod
    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, *, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one noise level to the next."""

    def _shifted(self, levels: Sigmas, shift: float, mu: float | None) -> Sigmas:
        """Noise levels shifted as the options say: by mu when the shift is dynamic, else by `shift`."""
        if self.options.use_dynamic_shifting:
            if mu is None:
                raise ConfigError("set_timesteps: this scheduler shifts dynamically (use_dynamic_shifting), give mu")
            levels = dynamic_shift(levels, mu, kind=self.options.time_shift_type)
        else:
            levels = shift_sigmas(levels, shift)
        terminal = self.options.shift_terminal
        return stretch_to_terminal(levels, terminal) if terminal else levels

    def _start(self, timesteps: Tensor, sigmas: Sigmas, *, device: torch.device | str | None) -> None:
        """Take a new schedule, one more sigma than timesteps, and go to its beginning."""
        self.sigmas = torch.from_numpy(sigmas.astype(np.float32))
        self.timesteps = timesteps.to(device)
        self.num_inference_steps = len(timesteps)
        self._host_timesteps = timesteps.tolist()
        self._step_index = self._begin_index = None

    def _index_of(self, timestep: Tensor | float) -> int:
        """The step of a timestep; of repeated ones the second, so that a run begun in the middle skips none."""
        if isinstance(timestep, Tensor) and _is_view(timestep, self.timesteps):
            wanted = self._host_timesteps[timestep.storage_offset()]  # no wait for the device
        else:
            wanted = float(timestep)
        found = [i for i, t in enumerate(self._host_timesteps) if t == wanted]
        if not found:
            raise ConfigError(f"timestep {wanted} is not in the schedule; pass one of scheduler.timesteps")
        return found[1] if len(found) > 1 else found[0]

    def _current_index(self, timestep: Tensor | float) -> int:
        """The step to do now; looked up at the first step only."""
        if self.num_inference_steps == 0:
            raise ConfigError(f"{type(self).__name__}: call set_timesteps before step")
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._index_of(timestep)
        if self._step_index >= self.num_inference_steps:
            raise ConfigError(f"all {self.num_inference_steps} steps are done; call set_timesteps for another run")
        return self._step_index


def check_options(options: Any, *, supported: Mapping[str, Sequence[Any]], above_zero: Sequence[str]) -> None:
    """Raise ConfigError for the first option that is too small or not supported."""
    for name in above_zero:
        value = getattr(options, name)
        if not 0 < value <= sys.float_info.max:  # written so that NaN fails too, and integers that no float holds
            raise ConfigError(f"scheduler option {name}={str(value)[:40]}, expected a number above 0")
    for name, values in supported.items():
        value = getattr(options, name)
        if value not in values:
            expected = " or ".join(repr(v) for v in values)
            raise ConfigError(f"scheduler option {name}={value!r} is not supported, expected {expected}")


def shift_sigmas(sigmas: Any, shift: float) -> Any:
    """Move noise levels towards 1, for large samples: shift s / (1 + (shift - 1) s). Source: SD3 (arXiv:2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: Sigmas, mu: float, *, kind: str) -> Sigmas:
    """Move noise levels by an amount mu that depends on the size of the sample; kind is exponential or linear."""
    amount = math.exp(mu) if kind == "exponential" else mu
    shifted: Sigmas = amount / (amount + (1 / sigmas - 1))
    return shifted


def stretch_to_terminal(sigmas: Sigmas, terminal: float) -> Sigmas:
    """Stretch the distances from 1 so that the last level is `terminal`. Source: LTX-Video (arXiv:2501.00103).

    A single step from pure noise has no distance to stretch and stays as it is (the published one divides by zero).
    """
    distances = 1 - sigmas
    if distances[-1] == 0:
        return sigmas
    stretched: Sigmas = 1 - distances / (distances[-1] / (1 - terminal))
    return stretched


def check_steps(
    num_inference_steps: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None = None
) -> int:
    """How many steps are asked for.

    Raises:
        ConfigError: none, or not as many as there are sigmas and timesteps.
    """
    given = {"sigmas": sigmas, "timesteps": timesteps}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if num_inference_steps is not None:
        counts = {"steps": num_inference_steps, **counts}
    if not counts:
        raise ConfigError("set_timesteps: give num_inference_steps or sigmas")
    if len({*counts.values()}) > 1:
        several = " but ".join(f"{count} {name}" for name, count in counts.items())
        raise ConfigError(f"set_timesteps: {several}; leave one out")
    steps = next(iter(counts.values()))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"set_timesteps: got {steps!r} steps, expected a whole number of at least 1")
    return steps


def _is_view(timestep: Tensor, timesteps: Tensor) -> bool:
    """Whether a timestep is an element of the schedule, by where it lies rather than by its value."""
    same_storage = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
    return same_storage and timestep.numel() == 1 and timestep.dtype == timesteps.dtype
