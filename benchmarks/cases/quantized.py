"""Forwards with weights in fewer bits, resident and streamed, ours and diffusers', with the decibels between them and bf16.

The seconds to load contain the quantizing. The result in bf16 is kept in the folder of the checkpoints by the first row.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.passes import measured_pass
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject

_OURS = ("bf16", "fp8", "fp8-mm", "nf4", "int8")
_THEIRS = ("bf16", "fp8", "nf4")
_FRAMES = (5, 81)


def settings(scale: str) -> Iterator[Setting]:
    """Wan 14B by kinds of weights."""
    for frames in (5,) if scale == "smoke" else _FRAMES:
        for library, kinds, ways in (
            ("vramkit", _OURS, ("resident", "vramkit block", "vramkit leaf")),
            ("diffusers", _THEIRS, ("resident", "diffusers leaf stream", "vramkit leaf")),
        ):
            for weights in kinds:
                subject = Subject.of("wan-14b", scale, frames=frames, library=library, weights=weights)
                for way in ways:
                    yield Setting(
                        case="quantized", subject=str(subject), way=way, options={"subject": subject.to_json()}
                    )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one."""
    subject = Subject.from_json(setting.options["subject"])
    name = f"bf16 {subject.clip}"
    is_reference = (subject.weights, subject.library, setting.way) == ("bf16", "vramkit", "resident")
    told = {"keep": name} if is_reference else {"compare": name}
    yield setting.row(**measured_pass(subject, setting.way, bench, **told))  # type: ignore[arg-type]
