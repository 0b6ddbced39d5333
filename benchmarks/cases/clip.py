"""Whole clips of the families: with the transformers on the device, streamed under a cap, and planned for it.

Told are the seconds of a step (s), of the step in which a second expert takes over, of the decode, and the peaks of both.
The resident run is not decoded. What slots and residents take (held_bytes) and the activations of the resident run
(activation_bytes) together are what the peak of the steps should be.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.clips import FAMILIES, Family
from benchmarks.emulation import capped
from benchmarks.measure import host_memory, peaks, release_memory, seconds_of, synchronize
from benchmarks.rows import Row, Setting
from benchmarks.steps import Steps
from vramkit.memory import GIB, module_bytes
from vramkit.offload import apply_group_offloading
from vramkit.planning import Plan, fit

WAYS = ("resident", "vramkit leaf", "vramkit fit")


def settings(scale: str) -> Iterator[Setting]:
    """Each family by each way."""
    for name, family in FAMILIES.items():
        for way in WAYS:
            cap = family.fit_gib if way == "vramkit fit" else family.cap_gib
            yield Setting(
                case="clip",
                subject=f"{name} {family.clip(scale)}",
                way=way,
                machine="" if way == "resident" else f"card {cap:g} GiB",
                options={"family": name, "card_bytes": None if way == "resident" else int(cap * GIB)},
            )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Make a clip."""
    family, way = FAMILIES[setting.options["family"]], setting.way
    card_bytes = setting.options["card_bytes"]
    row: Row = {"link_gbps": bench.link_gbps}
    family.load(bench)  # writes the files, which no figure contains
    with contextlib.ExitStack() as stack:
        if card_bytes is not None:
            row["is_capped"] = stack.enter_context(capped(bench.device, card_bytes))
        with seconds_of(row, "load_s"):
            pipeline = family.load(bench)
        with seconds_of(row, "setup_s"):
            offloads, plan = _applied(way, pipeline, family, bench, card_bytes, stack)
        steps = _denoised(pipeline, family, bench, "latent" if way == "resident" or family.vae is None else "pt")
        if way != "resident" and family.vae is not None:
            row |= {"decode_s": round(time.perf_counter() - steps.since, 3), **peaks("decode_")}
        switch = _switch_of(pipeline, family)
        row |= steps.figures(without=switch) | {"passes": family.passes}
        if switch is not None:
            row["switch_s"] = round(steps.seconds[switch], 6)
        passes = 1 if plan is not None and plan.guidance == "paired" else family.passes
        moved = passes * (offloads["transformer"].stats().streamed_bytes if "transformer" in offloads else 0)
        row |= {"moved_bytes": moved, "digest": steps.digest, **host_memory()}
        stats = [offload.stats() for offload in offloads.values()]
        row["held_bytes"] = sum(each.slots * each.slot_bytes + each.resident_bytes for each in stats)
        if way == "resident" and row["allocated_bytes"]:
            row["activation_bytes"] = row["allocated_bytes"] - sum(map(module_bytes, _transformers(pipeline)))
        if plan is not None:
            row |= predicted(plan)
    yield setting.row(**row)


def _applied(
    way: str, pipeline: Any, family: Family, bench: Bench, card_bytes: int | None, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], Plan | None]:
    if way == "resident":
        for model in _transformers(pipeline):
            model.to(bench.device)
        if family.has_image:
            pipeline.vae.to(bench.device)
        return {}, None
    if way == "vramkit fit":
        vram = GIB if bench.is_smoke else card_bytes
        assert vram is not None
        more = {"output_type": "latent"} if family.vae is None else {}
        fitted = stack.enter_context(fit(pipeline, vram=vram, device=bench.device, **family.arguments(bench), **more))
        return fitted.offloads, fitted.plan
    offloads = {}
    for name in ("transformer", "transformer_2", "vae"):
        model = getattr(pipeline, name, None)
        if model is not None:
            offloads[name] = apply_group_offloading(model, bench.device, offload_type="leaf_level")
            stack.callback(offloads[name].remove)
    if family.vae is not None:
        pipeline.vae.enable_tiling()
    return offloads, None


def predicted(plan: Plan) -> Row:
    """What the plan says of the call, to be compared with what it took."""
    row: Row = {"decoded": None if plan.decode is None else str(plan.decode), "guidance": plan.guidance}
    for phase in plan.phases:
        row |= {f"predicted_{phase.name}_bytes": phase.peak_bytes, f"predicted_{phase.name}_s": round(phase.seconds, 3)}
    return row


def _transformers(pipeline: Any) -> list[Any]:
    found = (pipeline.transformer, getattr(pipeline, "transformer_2", None))
    return [model for model in found if model is not None]


def _denoised(pipeline: Any, family: Family, bench: Bench, output_type: str) -> Steps:
    given = family.arguments(bench)
    release_memory()
    steps = Steps()
    steps.begin()
    pipeline(
        **given,
        num_inference_steps=family.steps,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        callback_on_step_end=steps,
    )
    synchronize()
    return steps


def _switch_of(pipeline: Any, family: Family) -> int | None:
    """Return the step in which the second expert runs first."""
    if not family.has_two_experts:
        return None
    pipeline.scheduler.set_timesteps(family.steps)
    boundary = pipeline.boundary_ratio * pipeline.scheduler.config["num_train_timesteps"]
    return sum(bool(timestep >= boundary) for timestep in pipeline.scheduler.timesteps.tolist())
