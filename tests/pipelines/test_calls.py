"""What every call of a pipeline is: one at a time, numbers of any kind, schedulers of any origin, schedules that repeat."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import families
import numpy as np
import pytest
import torch
from families import FAMILIES, Stock, compare, frames, relative_error

import vramkit
from vramkit.errors import ConcurrentUseError, ConfigError
from vramkit.pipelines.loading.registry import PIPELINES

CLIP = FAMILIES["Wan2.1"].clip | {"output_type": "latent", "num_inference_steps": 2}


@pytest.fixture
def family() -> str:
    return "Wan2.1"


def own_scheduler(pipe: Any) -> Any:
    return type(pipe.scheduler).from_config(pipe.scheduler.config)


class TestOneAtATime:
    @pytest.mark.parametrize("shared", ["pipeline", "scheduler"])
    def test_two_threads(self, shared: str, pipeline: Any) -> None:
        other = pipeline if shared == "pipeline" else type(pipeline)(**pipeline.components)
        other.set_progress_bar_config(disable=True)
        expected = frames(pipeline, **CLIP)
        inside, done = threading.Event(), threading.Event()
        made: list[Any] = []

        def wait(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            inside.set()
            assert done.wait(30)
            return {}

        first = threading.Thread(target=lambda: made.append(frames(pipeline, **CLIP, callback_on_step_end=wait)))
        first.start()
        assert inside.wait(30)
        try:
            with pytest.raises(ConcurrentUseError, match=r"in use by another call.*from_pipe"):
                frames(other, **CLIP, prompt="a dog")
            for change in (pipeline.unload_lora_weights, pipeline.disable_lora, pipeline.fuse_lora):
                with pytest.raises(ConcurrentUseError, match=f"{change.__name__} of a .* of another thread"):
                    change()
        finally:
            done.set()
            first.join()
        assert torch.equal(made[0], expected)
        assert torch.equal(frames(other, **CLIP), expected)  # free again

    def test_a_callback_that_calls_its_pipeline(self, pipeline: Any) -> None:
        def again(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe("a dog", **CLIP)
            return {}

        with pytest.raises(ConcurrentUseError):
            frames(pipeline, **CLIP, callback_on_step_end=again)
        frames(pipeline, **CLIP)  # an exception frees it

    def test_pipelines_around_the_same_models_run_beside_each_other(self, pipeline: Any) -> None:
        other = type(pipeline).from_pipe(pipeline, scheduler=own_scheduler(pipeline))
        expected = frames(pipeline, **CLIP)

        def nested(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert torch.equal(frames(other, **CLIP), expected)
            return {}

        other.set_progress_bar_config(disable=True)
        assert torch.equal(frames(pipeline, **CLIP, callback_on_step_end=nested), expected)

    def test_models_that_are_offloaded_are_not_shared_by_threads(self, folder: Path) -> None:
        pipeline = families.load("Wan2.1", folder)
        pipeline.enable_model_cpu_offload("cpu")  # a model that comes takes the place of the one that runs
        other = type(pipeline).from_pipe(pipeline, scheduler=own_scheduler(pipeline))
        other.set_progress_bar_config(disable=True)
        expected, said = frames(pipeline, **CLIP), []

        def meanwhile() -> None:
            with pytest.raises(ConcurrentUseError, match="which must not be offloaded") as caught:
                frames(other, **CLIP)
            said.append(caught.value)

        def begin(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
            return {}

        assert torch.equal(frames(pipeline, **CLIP, callback_on_step_end=begin), expected)
        assert len(said) == CLIP["num_inference_steps"]
        assert torch.equal(frames(other, **CLIP), expected)

    @pytest.mark.parametrize("name", ["HunyuanVideo", "Wan2.1 image-to-video"])  # which ask encoders for their states
    def test_pipelines_are_pickled_after_a_call(self, name: str, stock: Stock) -> None:
        make = partial(frames, **FAMILIES[name].clip, num_inference_steps=1, output_type="latent")
        pipeline = stock.pipeline(name)
        expected = make(pipeline)
        for copied in (pickle.loads(pickle.dumps(pipeline)), copy.deepcopy(pipeline), pipeline):
            assert torch.equal(make(copied), expected)

    def test_copies_of_a_scheduler_are_free(self, pipeline: Any) -> None:
        copies: list[Any] = []

        def take(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not copies:
                copies.extend([copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))])
            return {}

        expected = frames(pipeline, **CLIP, callback_on_step_end=take)
        for scheduler in copies:
            pipeline.scheduler = scheduler
            assert torch.equal(frames(pipeline, **CLIP), expected)

    @pytest.mark.parametrize("name", PIPELINES)
    def test_every_pipeline_is_called_so(self, name: str) -> None:
        kind = getattr(importlib.import_module(PIPELINES[name]), name)
        assert kind.__call__.__code__.co_filename == vramkit.pipelines.calling.calls.__file__


class TestArguments:
    def test_numbers_of_numpy_and_tensors(self, pipeline: Any) -> None:
        given = {"height": np.int64(32), "num_frames": torch.tensor(5), "num_inference_steps": np.int32(2)}
        plain = frames(pipeline, **CLIP, guidance_scale=3.0)
        for scale in (np.float32(3), torch.tensor(3.0), np.array(3.0)):
            assert torch.equal(frames(pipeline, **CLIP | given, guidance_scale=scale), plain)
        with pytest.raises(ConfigError, match=r"num_frames is 5.5"):
            frames(pipeline, **CLIP | {"num_frames": np.float64(5.5)})

    def test_by_position(self, pipeline: Any) -> None:
        generator = families.seeded()
        made = pipeline("a cat", "blurry", 32, 48, 5, 2, 4.0, None, 1, generator, None, None, None, "latent", False)
        expected = pipeline(
            "a cat", "blurry", **CLIP | {"max_sequence_length": 512}, guidance_scale=4.0, generator=families.seeded()
        )
        assert torch.equal(made[0], expected["frames"])
        assert expected.to_tuple()[0] is expected[0] is expected.frames

    def test_a_scale_of_one_changes_nothing(self, pipeline: Any) -> None:
        assert torch.equal(frames(pipeline, **CLIP, attention_kwargs={"scale": 1.0}), frames(pipeline, **CLIP))

    def test_attention_arguments(self, idle: Any) -> None:
        with pytest.raises(ConfigError, match=r"attention_kwargs: scale=0.5 is not taken; set_adapters"):
            idle("a cat", **CLIP, attention_kwargs={"scale": 0.5})
        with pytest.raises(ConfigError, match="attention_kwargs has no argument 'nonsense'"):
            idle("a cat", **CLIP, attention_kwargs={"nonsense": 1})


class TestSchedules:
    def test_repeated_timesteps(self, pipeline: Any, oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = 12
        for pipe in (pipeline, oracle):
            shifted = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=100.0)
            monkeypatch.setattr(pipe, "scheduler", shifted)
        compare(pipeline, oracle, **CLIP | {"num_inference_steps": steps})
        assert pipeline.scheduler.timesteps[0] == pipeline.scheduler.timesteps[1]
        assert pipeline.scheduler.step_index == oracle.scheduler.step_index == steps

    def test_repeated_noise_levels(self, stock: Stock) -> None:
        ours, theirs = stock.pipeline("HunyuanVideo"), stock.oracle("HunyuanVideo")
        clip = FAMILIES["HunyuanVideo"].clip | {"output_type": "latent"}
        compare(ours, theirs, **clip, sigmas=[1.0, 1.0, 0.7, 0.7, 0.2])

    def test_repeated_timesteps_of_a_call(self, stock: Stock) -> None:
        make = partial(frames, stock.pipeline("LTX-Video"), **FAMILIES["LTX-Video"].clip, output_type="latent")
        once, twice = (
            make(timesteps=torch.tensor([1000, 600, 300])),
            make(timesteps=np.array([1000, 1000, 600, 600, 300])),
        )
        assert relative_error(once, twice) <= 1e-6  # steps of no length
        with pytest.raises(ConfigError, match="expected falling numbers"):
            make(timesteps=[600, 700])

    @pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
    def test_schedulers_of_diffusers(self, name: str, pipeline: Any) -> None:
        pipeline.scheduler = getattr(vramkit, name).from_config(pipeline.scheduler.config)
        expected = frames(pipeline, **CLIP)
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        assert relative_error(frames(pipeline, **CLIP), expected) <= 1e-5
        pipeline.scheduler = getattr(vramkit, name).from_config(pipeline.scheduler.config)
        assert torch.equal(frames(pipeline, **CLIP), expected)

    def test_a_scheduler_of_diffusers_that_draws_noise(self, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, theirs = stock.pipeline("CogVideoX"), stock.oracle("CogVideoX")
        for pipe in (ours, theirs):
            monkeypatch.setattr(pipe, "scheduler", diffusers.DDIMScheduler.from_config(pipe.scheduler.config))
        compare(ours, theirs, **FAMILIES["CogVideoX"].clip, eta=1.0, output_type="latent")

    def test_schedulers_that_are_driven_otherwise(self, idle: Any, stock: Stock) -> None:
        for scheduler, message in (
            (diffusers.CogVideoXDPMScheduler(), "step asks for old_pred_original_sample, timestep_back"),
            (diffusers.EulerDiscreteScheduler(), "noise of deviation 157"),
        ):
            idle.scheduler = scheduler
            with pytest.raises(ConfigError, match=message):
                idle("a cat", **CLIP)
        ltx = stock.pipeline("LTX-Video")
        ltx.scheduler = diffusers.CogVideoXDDIMScheduler()
        with pytest.raises(ConfigError, match="set_timesteps takes no sigmas and no mu"):
            frames(ltx, **FAMILIES["LTX-Video"].clip)
