"""A device that runs out of memory in a step: an offloaded transformer lets go of what it can, and the step is repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, frames

from vramkit.offload import apply_group_offloading


@pytest.fixture(params=["Wan2.1", "HunyuanVideo"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def failing_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the second call of the last layer of a model find no memory; returns what happened."""
    called, layer = [], model.proj_out
    forward = layer.forward

    def try_to(x: torch.Tensor) -> torch.Tensor:
        called.append("call")
        if len(called) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        result: torch.Tensor = forward(x)
        return result

    monkeypatch.setattr(layer, "forward", try_to)
    return called


def test_a_step_is_made_again_with_less_on_the_device(
    family: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = FAMILIES[family].clip
    expected = frames(pipeline, **clip)
    offload = apply_group_offloading(pipeline.transformer, "cpu", slots=3, resident="1GiB", offload_type="leaf_level")
    failing_once(pipeline.transformer, monkeypatch)
    with pytest.warns(RuntimeWarning, match="no room for .* another try"):
        result = frames(pipeline, **clip)
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected))
    assert offload.stats().slots <= 2
    offload.remove()


def test_without_offloading_nothing_is_tried_again(family: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = failing_once(pipeline.transformer, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        frames(pipeline, **FAMILIES[family].clip)
    assert len(called) == 2
