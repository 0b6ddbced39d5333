"""One forward of the transformers at their published shapes, by every way; everything on the device comes first."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import peers
from benchmarks.bench import Bench
from benchmarks.passes import measured_pass
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject

_OURS = ["resident", "vramkit block", "vramkit leaf"]
_FEW = [*_OURS, "diffusers leaf stream"]
_FRAMES = (5, 33, 81)
_OTHERS = ("wan-5b", "hunyuan", "ltx", "cogvideox-2b", "cogvideox-5b")


def settings(scale: str) -> Iterator[Setting]:
    """Wan 14B of diffusers by every way, our own by ours, the other families by a few."""
    for frames in (5,) if scale == "smoke" else _FRAMES:
        for library, ways in (("diffusers", peers.ways()), ("vramkit", _OURS)):
            subject = Subject.of("wan-14b", scale, frames=frames, library=library)
            yield from settings_of("forward", subject, ways)
    if scale != "smoke":
        yield from settings_of("forward", _large(), _OURS)
    for network in _OTHERS:
        yield from settings_of("forward", Subject.of(network, scale), _FEW)


def settings_of(case: str, subject: Subject, ways: list[str]) -> Iterator[Setting]:
    """One setting for each way."""
    for way in ways:
        yield Setting(case=case, subject=str(subject), way=way, options={"subject": subject.to_json()})


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one."""
    subject = Subject.from_json(setting.options["subject"])
    yield setting.row(**measured_pass(subject, setting.way, bench))


def _large() -> Subject:
    from benchmarks.networks import Clip

    return Subject(network="wan-14b", clip=Clip(720, 1280, 81), library="vramkit")
