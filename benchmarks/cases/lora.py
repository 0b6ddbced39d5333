"""Adapters of a streamed transformer: loading one, switching between two, and what a forward takes with one.

Ours is the pipeline's own calls on our transformer; diffusers' is `load_lora_adapter` and `set_adapters` of its
transformer, on the device and under its group offloading. ``s`` is the switch.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.checkpoints import write_adapter
from benchmarks.measure import digest, host_memory, seconds_of
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject

_RANK, _SWITCHES = 32, 6
_WAYS = {
    "vramkit": ("resident", "vramkit block", "vramkit leaf"),
    "diffusers": ("resident", "diffusers leaf stream"),
}


def settings(scale: str) -> Iterator[Setting]:
    """Wan 14B of both libraries."""
    for library, ways in _WAYS.items():
        subject = Subject.of("wan-14b", scale, frames=5, library=library)
        for way in ways:
            yield Setting(case="lora", subject=str(subject), way=way, options={"subject": subject.to_json()})


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Load two adapters and switch between them."""
    yield setting.row(**switched(Subject.from_json(setting.options["subject"]), setting.way, bench))


def switched(subject: Subject, way: str, bench: Bench) -> Row:
    """Return load_adapter_s (the first), s of a switch, and the forward with an adapter beside the one without."""
    subject.prepare(bench)
    importlib.import_module("peft")  # which takes seconds that no figure contains
    row: Row = {}
    model, given = subject.load(bench), subject.inputs(bench)
    with torch.no_grad():
        with seconds_of(row, "setup_s"):
            applied = peers.apply(way, model, bench.device)
        plain, _ = bench.measure(lambda: applied.call(**given)[0])
        adapters = Adapters(model, subject.library)
        for at, file in enumerate(_files(model, bench)):
            with seconds_of(row, "load_adapter_s" if at == 0 else "second_adapter_s"):
                adapters.load(file, f"style{at}")
        seconds = []
        for at in range(_SWITCHES):
            switch: Row = {}
            with seconds_of(switch, "s"):
                adapters.use(f"style{at % 2}")
            seconds.append(switch["s"])
        figures, result = bench.measure(lambda: applied.call(**given)[0])
    row |= figures.row() | host_memory()
    return row | {
        "s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "repeats": _SWITCHES,
        "forward_s": figures.s,
        "plain_forward_s": plain.s,
        "digest": digest(result),
    }


def adapted(subject: Subject, way: str, bench: Bench) -> Adapters:
    """Return the adapters ``style0`` and ``style1`` of a transformer under a peer."""
    subject.prepare(bench)
    model = subject.load(bench)
    peers.apply(way, model, bench.device)
    adapters = Adapters(model, subject.library)
    for at, file in enumerate(_files(model, bench)):
        adapters.load(file, f"style{at}")
    return adapters


def _files(model: torch.nn.Module, bench: Bench) -> list[str]:
    rank = 2 if bench.is_smoke else _RANK
    return [str(write_adapter(bench.folder / f"adapter-{at}.safetensors", model, rank=rank, seed=at)) for at in (0, 1)]


class Adapters:
    """The calls of a library for the adapters of one transformer."""

    def __init__(self, model: Any, library: str) -> None:
        self._model = model
        self._pipeline: Any = None
        if library == "vramkit":
            from vramkit import FlowMatchEulerDiscreteScheduler, WanPipeline

            absent: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
            self._pipeline = WanPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **absent)

    def load(self, file: str, name: str) -> None:
        """Load one; it counts from now on."""
        if self._pipeline is not None:
            self._pipeline.load_lora_weights(file, adapter_name=name)
        else:
            self._model.load_lora_adapter(file, adapter_name=name, prefix="transformer")

    def use(self, name: str) -> None:
        """Let this one count alone."""
        (self._model if self._pipeline is None else self._pipeline).set_adapters(name)
