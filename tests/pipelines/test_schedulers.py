"""The schedulers against diffusers' over whole runs."""

import copy
import json
import pickle
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

# scheduler/scheduler_config.json of the published Wan2.1 T2V checkpoints.
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
LTX = {
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
    "use_dynamic_shifting": True,
}


def trajectory(scheduler, steps, sample_dtype, output_dtype, **schedule):
    """All samples of a run whose model is a fixed nonlinear function."""
    if steps is not None:
        scheduler.set_timesteps(steps, device="cpu", **schedule)
    sample = torch.randn(1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).to(sample_dtype)
    samples = []
    for t in scheduler.timesteps:
        flow = (torch.sin(3 * sample.float()) + sample.float() * (t.item() / 1000)).to(output_dtype)
        sample = scheduler.step(flow, t, sample, return_dict=False)[0]
        samples.append(sample)
    return samples


def assert_same_run(ours, ref, dtypes, steps, tolerance=1e-6, **schedule):
    got = trajectory(ours, steps, *dtypes, **schedule)
    expected = trajectory(ref, steps, *dtypes, **schedule)
    assert torch.equal(ours.timesteps, ref.timesteps)
    assert torch.equal(ours.sigmas, ref.sigmas)
    assert len(got) == len(expected) == len(ours.timesteps)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error <= (tolerance if dtypes[0] == torch.float32 else 0.01)


DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_unipc_runs_like_diffusers(steps, shift, dtypes):
    ours = UniPCMultistepScheduler.from_config(WAN, flow_shift=shift)
    ref = diffusers.UniPCMultistepScheduler.from_config(WAN, flow_shift=shift)
    assert_same_run(ours, ref, dtypes, steps)


@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},  # diffusers: nan at a last sigma of zero
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"disable_corrector": [0, 1]},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"shift_terminal": 0.1},
    ],
    ids=str,
)
def test_unipc_options(options):
    ours = UniPCMultistepScheduler.from_config(WAN, **options)
    ref = diffusers.UniPCMultistepScheduler.from_config(WAN, **options)
    # Higher orders solve a small fp32 system, whose rounding depends on the library.
    assert_same_run(ours, ref, DTYPES[0], 8, tolerance=1e-5 if options.get("solver_order") == 3 else 1e-6)


def test_unipc_dynamic_shift():
    ours = UniPCMultistepScheduler.from_config(WAN, use_dynamic_shifting=True)
    ref = diffusers.UniPCMultistepScheduler.from_config(WAN, use_dynamic_shifting=True)
    assert_same_run(ours, ref, DTYPES[0], 6, mu=1.3)
    with pytest.raises(ConfigError, match="give mu"):
        ours.set_timesteps(3)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_euler_runs_like_diffusers(steps, shift, dtypes):
    ours = FlowMatchEulerDiscreteScheduler(shift=shift)
    ref = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    assert_same_run(ours, ref, dtypes, steps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_euler_dynamic_shift_and_terminal(kind):
    ours = FlowMatchEulerDiscreteScheduler.from_config(LTX, time_shift_type=kind)
    ref = diffusers.FlowMatchEulerDiscreteScheduler.from_config(LTX, time_shift_type=kind)
    assert_same_run(ours, ref, DTYPES[0], 7, mu=1.2)
    with pytest.raises(ConfigError, match="give mu"):
        ours.set_timesteps(3)


@pytest.mark.parametrize(
    ("ours", "ref"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=2.0), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)),
        (UniPCMultistepScheduler.from_config(WAN), diffusers.UniPCMultistepScheduler.from_config(WAN)),
    ],
    ids=["euler", "unipc"],
)
def test_given_sigmas(ours, ref):
    sigmas = [1.0, 0.8, 0.3]
    ours.set_timesteps(sigmas=sigmas)
    ref.set_timesteps(sigmas=torch.tensor(sigmas, dtype=torch.float64).numpy())
    assert_same_run(ours, ref, DTYPES[0], None)


def test_a_second_run_forgets_the_first():
    scheduler = UniPCMultistepScheduler.from_config(WAN)
    first = trajectory(scheduler, 4, *DTYPES[0])
    second = trajectory(scheduler, 4, *DTYPES[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("steps", [3, 900])
def test_a_run_may_begin_in_the_middle(steps):
    """900 steps repeat timesteps, of which diffusers takes the second."""
    ours, ref = UniPCMultistepScheduler.from_config(WAN), diffusers.UniPCMultistepScheduler.from_config(WAN)
    ours.set_timesteps(steps)
    ref.set_timesteps(steps)
    sample = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(1))
    for index in (0, 2):
        ours._step_index = ref._step_index = None
        a = ours.step(sample, ours.timesteps[index], sample).prev_sample
        b = ref.step(sample, ref.timesteps[index], sample).prev_sample
        assert ours.step_index == ref.step_index
        torch.testing.assert_close(a, b)


def test_the_first_step_is_found_without_reading_the_timestep():
    scheduler = UniPCMultistepScheduler.from_config(WAN)
    scheduler.set_timesteps(4, device="meta")  # reading a value would raise
    sample = torch.ones(1, 2)
    for t in scheduler.timesteps:
        sample = scheduler.step(sample, t, sample).prev_sample
    assert scheduler.step_index == 4
    with pytest.raises(ConfigError, match="all 4 steps are done"):
        scheduler.step(sample, scheduler.timesteps[0], sample)


@pytest.mark.parametrize("begin", [None, 2])
def test_scale_noise(begin):
    ours, ref = FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sample, noise = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(2)).unbind(0)
    for scheduler in (ours, ref):
        scheduler.set_timesteps(5)
        if begin is not None:
            scheduler.set_begin_index(begin)
    t = ours.timesteps[1:2].repeat(2)
    assert torch.equal(ours.scale_noise(sample, t, noise), ref.scale_noise(sample, t, noise))
    assert ours.scale_model_input(sample) is sample
    assert ours.init_noise_sigma == 1.0


def test_config_travels_between_schedulers(tmp_path):
    euler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    unipc = UniPCMultistepScheduler.from_config(WAN | {"shift": 2.0}, flow_shift=5.0)
    assert unipc.config.flow_shift == unipc.config["flow_shift"] == 5.0
    assert unipc.config.get("shift") == 2.0
    assert unipc.config["_class_name"] == "UniPCMultistepScheduler"
    assert FlowMatchEulerDiscreteScheduler.from_config(unipc.config).config.shift == 2.0
    assert (
        FlowMatchEulerDiscreteScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config).config.shift
        == 1
    )
    back = UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler.from_config(unipc.config).config)
    assert back.config.flow_shift == 5.0
    euler.save_pretrained(tmp_path / "scheduler")
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler").config == euler.config
    assert (
        diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.shift == 7.0
    )
    with pytest.raises(AttributeError, match="no option 'nonsense'"):
        _ = euler.config.nonsense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniPCMultistepScheduler.from_config(WAN, shift=3.0), r"unknown options \['shift'\]"),
        (UniPCMultistepScheduler, "prediction_type='epsilon' is not supported, expected 'flow_prediction'"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, predict_x0=False), "predict_x0=False"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, use_karras_sigmas=True), "use_karras_sigmas=True"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, solver_type="heun"), "solver_type='heun'"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, solver_order=0), "solver_order=0"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, solver_order="2"), "option solver_order='2', expected int"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, flow_shift=0.0), "flow_shift=0.0, expected a number above 0"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, flow_shift=float("nan")), "flow_shift=nan"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, flow_shift=None), "flow_shift=None"),
        (lambda: UniPCMultistepScheduler.from_config(WAN, flow_shift=10**400), "flow_shift=1000.*, expected a number"),
        (lambda: FlowMatchEulerDiscreteScheduler(shift=-3.0), "shift=-3.0"),
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (lambda: FlowMatchEulerDiscreteScheduler(time_shift_type="cubic"), "time_shift_type='cubic'"),
        (lambda: FlowMatchEulerDiscreteScheduler().set_timesteps(), "num_inference_steps or sigmas"),
        (lambda: FlowMatchEulerDiscreteScheduler().set_timesteps(0), "at least 1"),
        (lambda: FlowMatchEulerDiscreteScheduler().set_timesteps(2, sigmas=[1.0]), "2 steps but 1 sigmas"),
        (lambda: FlowMatchEulerDiscreteScheduler().step(torch.ones(1), 1.0, torch.ones(1)), "call set_timesteps"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_timestep_outside_the_schedule():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ConfigError, match="not in the schedule"):
        scheduler.step(torch.ones(1), 17.0, torch.ones(1))


def test_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no scheduler_config\.json"):
        UniPCMultistepScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        UniPCMultistepScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        UniPCMultistepScheduler.from_pretrained(tmp_path)


def test_timesteps_and_shift_of_euler_are_those_of_diffusers():
    for given in (
        {"timesteps": [900.0, 500.0, 500.0]},
        {"timesteps": [900.0, 500.0], "sigmas": [0.8, 0.3]},
        {"sigmas": np.array([0.8, 0.3]), "num_inference_steps": np.int64(2)},
    ):
        ours, ref = (
            kind(shift=3.0) for kind in (FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler)
        )
        for scheduler in (ours, ref):
            scheduler.set_shift(7.0)
            scheduler.set_timesteps(device="cpu", **given)
        assert ours.shift == ref.shift == 7.0
        assert torch.equal(ours.timesteps, ref.timesteps)
        assert torch.equal(ours.sigmas, ref.sigmas)
    with pytest.raises(ConfigError, match="2 sigmas but 1 timesteps"):
        ours.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1.0])
    with pytest.raises(ConfigError, match="takes no timesteps"):
        UniPCMultistepScheduler.from_config(WAN).set_timesteps(timesteps=[900])


def test_names_of_diffusers():
    ours, ref = UniPCMultistepScheduler.from_config(WAN), diffusers.UniPCMultistepScheduler.from_config(WAN)
    sample, noise = torch.ones(2, 3), torch.zeros(2, 3)
    for scheduler in (ours, ref):
        scheduler.set_timesteps(900, "cpu")
    t = ref.timesteps[1]
    assert ours.index_for_timestep(t) == ref.index_for_timestep(t)
    assert len(ours) == len(ref) == 1000
    assert ours.begin_index is ref.begin_index is None
    assert torch.equal(ours.add_noise(sample, noise, t.repeat(2)), ref.add_noise(sample, noise, t.repeat(2)))
    assert type(ours.step(sample, t, sample, False)) is tuple


def test_a_config_is_a_dict_that_is_not_written():
    config = UniPCMultistepScheduler.from_config(WAN).config
    assert diffusers.UniPCMultistepScheduler.from_config(config).config.flow_shift == config.flow_shift
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config == dict(config)
    for write in (
        lambda: config.update(flow_shift=1.0),
        lambda: config.__setitem__("flow_shift", 1.0),
        lambda: setattr(config, "flow_shift", 1.0),
    ):
        with pytest.raises(ConfigError, match="from_config"):
            write()


@pytest.mark.parametrize("sigmas", [[1.0, 1.0, 0.5], [0.9, 0.5, 0.5], [0.9, 0.0]])
def test_noise_levels_that_unipc_cannot_divide_by(sigmas):
    """Diffusers makes NaN of them."""
    ref = diffusers.UniPCMultistepScheduler.from_config(WAN)
    ref.set_timesteps(sigmas=np.array(sigmas))
    ref.set_begin_index(0)
    sample = torch.ones(1, 2)
    for t in ref.timesteps:
        sample = ref.step(sample * 0.5, t, sample).prev_sample
    assert not sample.isfinite().any()
    with pytest.raises(ConfigError, match="not all different in fp32"):
        UniPCMultistepScheduler.from_config(WAN).set_timesteps(sigmas=sigmas)


def test_options_of_newer_files_are_named(tmp_path: Path) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0, "newer": 1, "_diffusers_version": "9"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"FlowMatchEulerDiscreteScheduler does not know newer=1; passed over"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert (scheduler.config["shift"], scheduler.config["newer"]) == (5.0, 1)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config | {"_class_name": "HeunDiscreteScheduler"}))
    FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)  # another class has options of its own
