"""Time and peak against frames, layers and the number of groups, to 5,000 leaf modules."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.cases.host import stack_of, timed_stack
from benchmarks.passes import measured_pass
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject

_FRAMES = (5, 9, 17, 33, 49, 65, 81, 121)
_LAYERS = (5, 10, 20, 30)
_LEAVES = (50, 200, 1000, 2500, 5000)
_WAYS = ("resident", "vramkit block", "vramkit leaf")


def settings(scale: str) -> Iterator[Setting]:
    """Frames and layers of our Wan 14B; stacks of small layers."""
    is_smoke = scale == "smoke"
    frames = [{"frames": count} for count in ((9,) if is_smoke else _FRAMES)]
    layers = [{"frames": 5 if is_smoke else 17, "layers": count} for count in ((2,) if is_smoke else _LAYERS)]
    for more in frames + layers:
        subject = Subject.of("wan-14b", scale, library="vramkit", **more)  # type: ignore[arg-type]
        for way in _WAYS:
            yield Setting(case="growth", subject=str(subject), way=way, options={"subject": subject.to_json()})
    for count in (20,) if is_smoke else _LEAVES:
        for way in _WAYS:
            yield Setting(case="growth", subject=f"{count} linear layers", way=way, options={"leaves": count})


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one."""
    if "leaves" in setting.options:
        yield setting.row(**timed_stack(stack_of(setting.options["leaves"], bench), setting.way, bench))
    else:
        yield setting.row(**measured_pass(Subject.from_json(setting.options["subject"]), setting.way, bench))
