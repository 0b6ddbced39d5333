"""One forward of the text encoders, in bf16, by every way."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import peers
from benchmarks.cases.forward import measure, settings_of
from benchmarks.rows import Setting
from benchmarks.subjects import Subject

__all__ = ["measure", "settings"]


def settings(scale: str) -> Iterator[Setting]:
    """UMT5-XXL by every way, T5-XXL by ours."""
    few = ["resident", "vramkit block", "vramkit leaf"]
    for network, ways in (("umt5-xxl", peers.ways()), ("t5-xxl", few)):
        yield from settings_of("encode", Subject.of(network, scale), ways)
