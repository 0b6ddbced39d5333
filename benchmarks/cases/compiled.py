"""Forwards with blocks compiled fullgraph: with every group on the device, then streamed, and recompiles while streaming.

The reference is the same compiled code with nothing to stream. Tiny, blocks are traced and run eagerly, without a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.measure import digest, seconds_of
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject
from vramkit.offload import apply_group_offloading

_RESIDENT = "vramkit block, all resident"
_EVERYTHING = 2**50


def settings(scale: str) -> Iterator[Setting]:
    """Our Wan 14B."""
    for frames in (5,) if scale == "smoke" else (5, 81):
        subject = Subject.of("wan-14b", scale, frames=frames, library="vramkit")
        for way in (_RESIDENT, "vramkit block"):
            yield Setting(
                case="compiled",
                subject=str(subject),
                way=way,
                options={"subject": subject.to_json()},
                reference={"way": _RESIDENT},
            )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Compile, then run; ``first_s`` is the first pass, which compiles."""
    from torch._dynamo.utils import counters

    subject = Subject.from_json(setting.options["subject"])
    subject.prepare(bench)
    model: Any = subject.load(bench)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, **({"backend": "eager"} if bench.is_smoke else {}))
    given, row = subject.inputs(bench), Row()
    with torch.no_grad():
        with seconds_of(row, "setup_s"):
            resident = _EVERYTHING if setting.way == _RESIDENT else 0
            offload = apply_group_offloading(model, bench.device, resident=resident)
        with seconds_of(row, "first_s"):
            model(**given)
        graphs = counters["stats"]["unique_graphs"]
        figures, result = bench.measure(lambda: model(**given)[0])
    row |= figures.row() | {"moved_bytes": offload.stats().streamed_bytes, "link_gbps": bench.link_gbps}
    row |= {"graphs": graphs, "recompiles": counters["stats"]["unique_graphs"] - graphs, "digest": digest(result)}
    offload.remove()
    yield setting.row(**row)
