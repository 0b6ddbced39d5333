"""Emulated cards: torch's allocator has so much and no more. Who finishes, and how fast.

The context of the driver is not among it. Everything on the device, on the whole card, is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.emulation import capped
from benchmarks.passes import measured_pass
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject
from vramkit.memory import GIB

_CARDS_GIB = (24, 16, 12, 8, 6, 4, 3, 2)
_WAYS = [
    "resident", "vramkit fit", "vramkit leaf", "diffusers block stream", "diffusers leaf stream", "diffusers model",
    "accelerate cpu_offload", "mmgp pinned", "flextensor blocks", "diffusers-mm auto", "cache-dit layerwise async",
]  # fmt: skip


def settings(scale: str) -> Iterator[Setting]:
    """Wan 14B of diffusers at 81 frames, our own under a budget, on every card."""
    is_smoke = scale == "smoke"
    for gib in (24, 2) if is_smoke else _CARDS_GIB:
        for library, ways in (("diffusers", _WAYS), ("vramkit", ["vramkit fit"])):
            subject = Subject.of("wan-14b", scale, frames=5 if is_smoke else 81, library=library)
            for way in ways:
                yield Setting(
                    case="cards",
                    subject=str(subject),
                    way=way,
                    machine=f"card {gib} GiB",
                    options={"subject": subject.to_json(), "card_bytes": gib * GIB},
                    reference={"case": "forward"},
                )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one; what the card has no room for raises, and that is the row."""
    subject, card_bytes = Subject.from_json(setting.options["subject"]), setting.options["card_bytes"]
    subject.prepare(bench)
    with capped(bench.device, card_bytes) as is_capped:
        row = measured_pass(subject, setting.way, bench, budget_bytes=card_bytes)
    yield setting.row(is_capped=is_capped, **row)
