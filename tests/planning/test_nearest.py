"""The nearest budget that a refusal names is the nearest one."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES, Stock
from foreign_pipelines import PIPELINES

from vramkit import PlanInfeasible, plan
from vramkit.memory import parse_bytes

CASES = [
    ("Wan2.1", "exact"),
    ("LTX-Video", "exact"),
    ("CogVideoX", "exact"),
    ("HunyuanVideo", "exact"),
    ("StableDiffusionPipeline", "exact"),
    ("FluxPipeline", "any"),
    ("QwenImagePipeline", "exact"),
]


@pytest.mark.parametrize(("name", "allow"), CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_nearest_budget_fits_and_a_smaller_one_does_not(name: str, allow: str, stock: Stock) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "allow": allow, "device": "cpu"}
    if name in FAMILIES:
        pipeline, call = stock.pipeline(name), {**call, "prompt": "a cat", **FAMILIES[name].clip}
    else:
        pipeline, call = PIPELINES[name].make(name), {**call, **PIPELINES[name].inputs()}
    with pytest.raises(PlanInfeasible) as refused:
        plan(pipeline, 1000, **call)
    nearest = refused.value.nearest_bytes
    printed = str(refused.value).partition("The nearest budget that fits is ")[2].partition(";")[0]
    for enough in (nearest, printed):
        assert plan(pipeline, enough, **call).peak_bytes <= parse_bytes(enough)
    with pytest.raises(PlanInfeasible) as refused:
        plan(pipeline, int(nearest * 0.98), **call)
    assert refused.value.nearest_bytes == nearest
