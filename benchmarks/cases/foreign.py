"""Pipelines of diffusers as its loaders make them: everything on the device, and planned for a smaller card by `fit`.

Told are the seconds of a step (s), of what comes before and behind the steps, the peaks of each, and what the plan said of
them. ``digest`` is that of the latents after the last step, or of what a transformer alone gave; ``digests`` has that of
the decoded clip too, which blended tiles change.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.bench import Bench
from benchmarks.cases.clip import predicted
from benchmarks.emulation import capped
from benchmarks.foreigners import FOREIGNERS, Foreigner
from benchmarks.measure import digest, host_memory, peaks, release_memory, seconds_of, synchronize, trouble
from benchmarks.rows import Row, Setting
from benchmarks.steps import Steps
from vramkit.memory import GIB
from vramkit.planning import Fit, fit, plan

WAYS = ("resident", "vramkit fit")


def settings(scale: str) -> Iterator[Setting]:
    """Each pipeline by each way."""
    for name, foreigner in FOREIGNERS.items():
        for way in WAYS:
            cap = None if way == "resident" else foreigner.fit_gib
            yield Setting(
                case="foreign",
                subject=f"{name} {foreigner.clip(scale)}",
                way=way,
                machine="" if cap is None else f"card {cap:g} GiB",
                options={"name": name, "card_bytes": None if cap is None else int(cap * GIB)},
            )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Load, set up, and make one clip or picture."""
    foreigner, card_bytes = FOREIGNERS[setting.options["name"]], setting.options["card_bytes"]
    folder = foreigner.write(bench, setting.options["name"])  # which no figure contains
    row: Row = {"link_gbps": bench.link_gbps}
    release_memory()
    with contextlib.ExitStack() as stack:
        if card_bytes is not None:
            row["is_capped"] = stack.enter_context(capped(bench.device, card_bytes))
        with seconds_of(row, "load_s"):
            target = foreigner.load(folder)
        given, fitted = foreigner.arguments(bench), None
        with seconds_of(row, "setup_s"):
            if card_bytes is None:
                target.to(bench.device)
            else:
                asked: Row = given if foreigner.pipeline else {"example": given}
                if bench.is_smoke:  # as much smaller as the models are
                    card_bytes = plan(target, GIB, device=bench.device, **asked).floor_bytes
                fitted = stack.enter_context(fit(target, card_bytes, device=bench.device, **asked))
        release_memory()
        row |= _made(foreigner, target, given, fitted)
    yield setting.row(**row)


def _made(foreigner: Foreigner, target: Any, given: dict[str, Any], fitted: Fit | None) -> Row:
    """Make the clip, and return the figures of its parts, and what the plan says of them."""
    steps = Steps(travelled=lambda: 0 if fitted is None else _loaded_bytes(fitted))
    if foreigner.pipeline:
        row = _called(target, given, steps)
    else:
        row = {}
        steps.begin()
        for _ in range(foreigner.steps):
            with torch.no_grad():
                steps.end(target(**given))
    row |= steps.figures()
    row["moved_bytes"] = (steps.bytes[-1] - steps.bytes[0]) // row["repeats"]
    row |= {"digest": steps.digest, **host_memory(), **trouble()}
    if fitted is not None:
        told = predicted(fitted.plan)
        if not foreigner.pipeline:  # the passes of a module alone are its steps
            told = {name.replace("forward", "denoise"): value for name, value in told.items()}
        row["notes"] = list(fitted.plan.notes)
        row |= told | {"held_bytes": sum(each.held_bytes for each in fitted.stats().values())}
        row["stores"] = {name: stats.stores for name, stats in fitted.stats().items()}
    return row


def _called(pipeline: Any, given: dict[str, Any], steps: Steps) -> Row:
    """Call a pipeline, with a clock at its seams: the first noise is drawn where texts are encoded."""
    row: Row = {}
    draw = pipeline.prepare_latents

    def drawn(*args: Any, **kwargs: Any) -> Any:
        row.update(encode_s=_since(steps), **peaks("encode_"))
        steps.begin()
        return draw(*args, **kwargs)

    with mock.patch.object(pipeline, "prepare_latents", drawn):
        steps.begin()
        made = pipeline(**given, generator=torch.Generator().manual_seed(0), callback_on_step_end=steps)
    row |= {"decode_s": _since(steps), **peaks("decode_")}
    row["digests"] = {"latents": steps.digest, "decoded": digest(made)}
    return row


def _since(steps: Steps) -> float:
    synchronize()
    return round(time.perf_counter() - steps.since, 3)


def _loaded_bytes(fitted: Fit) -> int:
    return sum(stats.loaded_bytes for stats in fitted.stats().values())
