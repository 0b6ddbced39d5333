"""``plan``: how a model would run within a budget, without its weights and without a device."""

from __future__ import annotations

import os
from typing import Any

import torch

from vramkit.planning.calls import module_calls, pipeline_call
from vramkit.planning.examples import read_examples
from vramkit.planning.machine import device_of
from vramkit.planning.planner import Budget, Planner
from vramkit.planning.plans import Plan

__all__ = ["plan"]


def plan(
    model: Any,
    vram: int | str,
    *,
    ram: int | str | None = None,
    allow: str = "exact",
    device: torch.device | str = "cuda",
    dtype: torch.dtype | None = None,
    example: Any = None,
    **call: Any,
) -> Plan:
    """Plan a call of `model` within `vram` of device memory. Nothing is loaded, moved or changed.

    Args:
        model: what `fit` takes; or a name such as ``"wan2.1-14b"``, a checkpoint folder, or a Hugging Face repository, whose
            configs are read and no weights.
        vram: as in `fit`.
        ram: as in `fit`.
        allow: as in `fit`.
        device: where it will compute. One that is not there is assumed to be an ordinary card, and the plan says so.
        dtype: of models that are named by their configs; by default bfloat16 (float32 on the CPU).
        example: as in `fit`.
        **call: as in `fit`. With ``image=`` a folder is that of the pipeline that makes clips of an image, if there is one.

    Raises:
        PlanInfeasible: no plan fits.
        ConfigError: an argument that cannot be used, or a name that nobody knows.
        CheckpointError: a folder that holds no checkpoint.
    """
    budget = Budget(vram, ram, allow)
    where = device_of(device)
    if isinstance(model, str | os.PathLike):
        from vramkit.planning.skeletons import skeleton_of  # noqa: PLC0415 - pipelines are heavy to import

        dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        model = skeleton_of(model, dtype=dtype, with_image=call.get("image") is not None)
    planner = Planner(model, budget, where)
    if planner.is_of_pipeline:
        return planner.plan(pipeline_call(model, call, are_given=True))
    examples = read_examples(model, planner.names, example, call)
    return planner.plan(module_calls(examples, are_given=True) if examples else None)
