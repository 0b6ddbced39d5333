"""DDIM and DPM of CogVideoX against diffusers' over whole runs."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from vramkit.errors import ConfigError
from vramkit.pipelines.schedulers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    UniPCMultistepScheduler,
)

# scheduler/scheduler_config.json of zai-org/CogVideoX-2b; 5b differs in the last two.
PUBLISHED = {
    "_class_name": "CogVideoXDDIMScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "linspace",
}
FIVE_B = {"snr_shift_scale": 1.0, "timestep_spacing": "trailing"}
OPTIONS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": FIVE_B,
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "last trained level": {**FIVE_B, "set_alpha_to_one": False},
    "some signal at the end": {"rescale_betas_zero_snr": False},
    "epsilon": {"rescale_betas_zero_snr": False, "prediction_type": "epsilon"},
    "sample": {"prediction_type": "sample"},
    "linear betas": {"beta_schedule": "linear"},
}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def output_of(sample: torch.Tensor, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A model that is a fixed nonlinear function."""
    return (torch.sin(sample.float() + timestep.item() / 500) * 0.8).to(dtype)


def run(
    scheduler: Any, dtypes: tuple[torch.dtype, torch.dtype], generators: Any = None, begin: int = 0
) -> list[torch.Tensor]:
    """All samples of a run, whichever library the scheduler is of."""
    is_oracle = type(scheduler).__module__.startswith("diffusers")
    is_dpm = "DPM" in type(scheduler).__name__
    generator = torch.Generator().manual_seed(7) if generators is None else generators()
    sample = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtypes[0])
    samples, clean = [], None
    for index, t in list(enumerate(scheduler.timesteps))[begin:]:
        output = output_of(sample, t, dtypes[1])
        if is_oracle and is_dpm:
            back = scheduler.timesteps[index - 1] if index > begin else None
            sample, clean = scheduler.step(output, clean, t, back, sample, generator=generator)
        else:
            options = {"generator": generator} if is_dpm else {}
            sample = scheduler.step(output, t, sample, **options, return_dict=False)[0]
        sample = sample.to(dtypes[0])
        samples.append(sample)
    return samples


def pair(name: str, options: dict[str, Any], steps: int) -> tuple[Any, Any]:
    import vramkit.pipelines.schedulers as here

    made = [getattr(library, name).from_config(PUBLISHED | options) for library in (here, diffusers)]
    for scheduler in made:
        scheduler.set_timesteps(steps, device="cpu")
    return made[0], made[1]


def assert_same_run(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error <= (tolerance if a.dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
class TestSameRunAsDiffusers:
    @pytest.mark.parametrize("case", OPTIONS)
    @pytest.mark.parametrize("steps", [1, 2, 7, 50])
    def test_options(self, name: str, case: str, steps: int) -> None:
        ours, theirs = pair(name, OPTIONS[case], steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        # diffusers multiplies linear betas up in fp32.
        tolerance = 1e-4 if case == "linear betas" else 1e-6
        assert_same_run(run(ours, DTYPES[0]), run(theirs, DTYPES[0]), tolerance)

    @pytest.mark.parametrize("dtypes", DTYPES)
    def test_dtypes(self, name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        ours, theirs = pair(name, FIVE_B, 6)
        assert_same_run(run(ours, dtypes), run(theirs, dtypes))

    def test_begun_in_the_middle(self, name: str) -> None:
        ours, theirs = pair(name, FIVE_B, 6)
        assert_same_run(run(ours, DTYPES[0], begin=2), run(theirs, DTYPES[0], begin=2))

    def test_a_second_run_forgets_the_first(self, name: str) -> None:
        ours, _ = pair(name, FIVE_B, 4)
        first = run(ours, DTYPES[0])
        ours.set_timesteps(4)
        assert all(torch.equal(a, b) for a, b in zip(first, run(ours, DTYPES[0]), strict=True))

    def test_mixing_with_noise(self, name: str) -> None:
        ours, theirs = pair(name, {}, 4)
        sample, noise = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(2)).unbind(0)
        timesteps = torch.tensor([999, 321])
        torch.testing.assert_close(
            ours.scale_noise(sample, timesteps, noise), theirs.add_noise(sample, noise, timesteps)
        )


def test_dpm_draws_from_one_generator_per_item() -> None:
    ours, theirs = pair("CogVideoXDPMScheduler", FIVE_B, 5)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    assert_same_run(run(ours, DTYPES[0], generators), run(theirs, DTYPES[0], generators))


@pytest.mark.parametrize("steps", range(1, 1001, 37))
def test_trailing_steps_are_as_many_as_asked_for(steps: int) -> None:
    scheduler = CogVideoXDDIMScheduler.from_config(PUBLISHED | FIVE_B)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    assert scheduler.timesteps.min() >= 0


def test_a_step_that_rounding_would_add_is_left_out() -> None:
    """1000 / 61 in floating point leaves a rest, from which diffusers makes a 62nd step at timestep -1."""
    scheduler = CogVideoXDDIMScheduler.from_config(PUBLISHED | FIVE_B)
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 61
    assert scheduler.timesteps[-1] == 15


def test_the_position_is_found_without_reading_the_timestep() -> None:
    scheduler = CogVideoXDPMScheduler.from_config(PUBLISHED)
    scheduler.set_timesteps(4, device="meta")  # reading a value would raise
    sample = torch.ones(1, 2)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample, t, sample).prev_sample
    assert scheduler.step_index == 4


def test_config_travels_between_schedulers() -> None:
    ddim = CogVideoXDDIMScheduler.from_config(PUBLISHED, timestep_spacing="trailing")
    dpm = CogVideoXDPMScheduler.from_config(ddim.config, snr_shift_scale=2.0)
    assert (dpm.config.timestep_spacing, dpm.config.snr_shift_scale) == ("trailing", 2.0)
    assert dpm.config["_class_name"] == "CogVideoXDPMScheduler"
    theirs = diffusers.CogVideoXDPMScheduler.from_config(dict(dpm.config))
    assert theirs.config.snr_shift_scale == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CogVideoXDDIMScheduler(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        (lambda: CogVideoXDDIMScheduler(beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
        (lambda: CogVideoXDPMScheduler(trained_betas=[0.1]), "trained_betas"),
        (lambda: CogVideoXDPMScheduler(timestep_spacing="even"), "timestep_spacing='even'"),
        (lambda: CogVideoXDPMScheduler(snr_shift_scale=0.0), "snr_shift_scale=0.0, expected a number above 0"),
        (lambda: CogVideoXDPMScheduler(flow_shift=3.0), r"unknown options \['flow_shift'\]"),
        (lambda: CogVideoXDDIMScheduler.from_config(UniPCMultistepScheduler.from_config(FLOW).config), "prediction"),
        (lambda: CogVideoXDDIMScheduler().set_timesteps(1001), "got 1001 steps, at most 1000"),
        (lambda: CogVideoXDDIMScheduler().set_timesteps(2, sigmas=[1.0, 0.5]), "takes no sigmas"),
        (lambda: CogVideoXDDIMScheduler().set_timesteps(2, mu=1.0), "no mu"),
        (lambda: CogVideoXDDIMScheduler(steps_offset=900).set_timesteps(5), "steps_offset=900 leads to timestep 1700"),
        (lambda: CogVideoXDPMScheduler().step(torch.ones(1), 1.0, torch.ones(1)), "call set_timesteps"),
    ],
)
def test_what_cannot_be_used_is_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
