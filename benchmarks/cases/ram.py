"""Emulated small RAM: a balloon takes the rest, page cache included; weights that no longer fit are read anew.

Give a `--folder` on a disk: files in /dev/shm are RAM themselves. A process that the system ends is a row that says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.emulation import crowded
from benchmarks.passes import measured_pass
from benchmarks.rows import Row, Setting
from benchmarks.subjects import Subject
from vramkit.memory import GIB, MIB

_LEFT_GIB = (64, 32, 16, 8)
_WAYS = ("vramkit leaf", "vramkit disk", "vramkit pageable", "diffusers leaf stream low-cpu", "accelerate cpu_offload")


def settings(scale: str) -> Iterator[Setting]:
    """Wan 14B at 33 frames, with so much RAM left."""
    for left in _LEFT_GIB[-1:] if scale == "smoke" else _LEFT_GIB:
        subject = Subject.of("wan-14b", scale, frames=5 if scale == "smoke" else 33)
        for way in _WAYS:
            yield Setting(
                case="ram",
                subject=str(subject),
                way=way,
                machine=f"RAM {left} GiB",
                options={"subject": subject.to_json(), "left_bytes": left * GIB},
                reference={"case": "forward"},
            )


def measure(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Measure one."""
    subject = Subject.from_json(setting.options["subject"])
    subject.prepare(bench)
    if not bench.is_smoke:
        with contextlib.suppress(OSError):  # where there is too little in the end, this process is what the system ends
            Path("/proc/self/oom_score_adj").write_text("1000")
    most = 16 * MIB if bench.is_smoke else None
    with crowded(setting.options["left_bytes"], most_bytes=most) as left:
        row = measured_pass(subject, setting.way, bench)
    yield setting.row(left_bytes=left, **row)
