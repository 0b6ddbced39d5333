"""The two transformers of Wan2.2 A14B: which runs when, how much it is guided, and how it makes room for the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from checkpoints import edit_json, load_oracle
from families import compare, frames

from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading, offload_of

SMALL = families.FAMILIES["Wan2.2 A14B"].clip
load = partial(families.load, "Wan2.2 A14B")


@pytest.fixture
def family() -> str:
    return "Wan2.2 A14B"


def watched(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the passes of both transformers, and what is asked of their handles but by components that take turns."""
    events: list[str] = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipeline, name)
        model.register_forward_hook(lambda *_, name=name: events.append(name))
        if (offload := offload_of(model)) is not None:
            for step in ("rest", "prefetch"):
                real = getattr(offload, step)
                monkeypatch.setattr(
                    offload,
                    step,
                    lambda real=real, note=f"{step} {name}", **how: (events.extend([] if how else [note]), real(**how))[
                        1
                    ],
                )
    return events


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale_2": None},
        {"guidance_scale": 3.5, "guidance_scale_2": 1.0, "negative_prompt": "dark"},
        {"guidance_scale": 1.0, "guidance_scale_2": 7.0},  # the first alone says whether there is guidance
    ],
    ids=str,
)
def test_guidance_of_each_is_that_of_diffusers(changes: dict[str, Any], pipeline: Any, oracle: Any) -> None:
    compare(pipeline, oracle, **SMALL | changes)


@pytest.mark.parametrize("boundary", [0.0, 0.6, 1.0])
def test_boundaries(boundary: float, copied: Path) -> None:
    edit_json(copied / "model_index.json", boundary_ratio=boundary)
    ours = load(copied)
    compare(ours, load_oracle(copied), **SMALL)
    assert ours.config["boundary_ratio"] == boundary


def test_steps_run_one_after_the_other_and_the_second_is_loading_before_its_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(folder)
    for model in (pipeline.transformer, pipeline.transformer_2):
        apply_group_offloading(model, "cpu", offload_type="leaf_level", store="disk")
    events, loads = watched(pipeline, monkeypatch), []
    before = offload_of(pipeline.transformer_2).stats().loads

    def note_loads(model: Any, *_: Any) -> None:
        if "transformer_2" not in events and not loads:
            loads.append(offload_of(model).stats().loads)

    pipeline.transformer_2.register_forward_pre_hook(note_loads, prepend=True)
    frames(pipeline, **SMALL, num_inference_steps=4)
    first, second = events.index("rest transformer"), events.index("prefetch transformer_2")
    assert events[:first] == ["transformer"] * first
    assert first % 2 == 0  # both passes of its last step are over
    assert second == first + 1
    assert events[second + 1 :] == ["transformer_2"] * (len(events) - second - 1)
    assert len(events) == 2 * 4 + 2
    assert loads == [before + offload_of(pipeline.transformer_2).stats().slots]


def test_on_demand_one_of_them_is_on_the_device(folder: Path, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = load(folder)
    offloaded.enable_model_cpu_offload("cpu")
    events = watched(offloaded, monkeypatch)
    np.testing.assert_array_equal(frames(offloaded, **SMALL), frames(pipeline, **SMALL))
    assert "rest transformer" in events


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"transformer_2": None}, {}, "boundary_ratio is 0.875, and there is no transformer_2"),
        ({"boundary_ratio": None}, {"guidance_scale_2": 3.0}, "guidance_scale_2 is 3.0, and this checkpoint has one"),
        ({}, {"guidance_scale_2": float("inf")}, "guidance_scale_2 is inf"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], arguments: dict[str, Any], message: str, idle: Any) -> None:
    for name, value in changes.items():
        setattr(idle, name, value)
    with pytest.raises(ConfigError, match=message):
        idle("a cat", **SMALL | arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary_ratio": None}, "it would never run"),
        ({"boundary_ratio": 1.5}, "0 to 1"),
        ({"boundary_ratio": "a"}, "'a'"),
    ],
)
def test_wrong_boundaries_are_refused(options: dict[str, Any], message: str, pipeline: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        type(pipeline)(**pipeline.components, **options)
