from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vramkit.errors import CheckpointError
from vramkit.timeline import MIB, Mark, MemoryTimeline, Sample, Trace, plot


def touched(count_mib: int) -> np.ndarray:
    """Memory that is new to the process, which an allocator's need not be."""
    block = np.frombuffer(mmap.mmap(-1, count_mib * MIB), dtype=np.uint8)
    block[:] = 1
    return block


def a_trace(peak_mib: int = 100) -> Trace:
    samples = [Sample(i / 10, peak_mib * MIB * i // 10) for i in range(11)]
    return Trace(
        kind="process memory",
        samples=samples,
        marks=[Mark(0.0, "load"), Mark(0.01, "encode"), Mark(0.5, "decode")],
        peak_bytes=peak_mib * MIB,
        seconds=1.0,
    )


def test_growth_is_seen_and_what_was_there_is_not() -> None:
    before = touched(64)
    with MemoryTimeline() as timeline:
        block = touched(48)
        time.sleep(0.05)
        del block
    assert before.size == 64 * MIB
    assert 44 * MIB < timeline.peak_bytes < 60 * MIB
    assert timeline.seconds >= 0.05


def test_marks_and_samples_are_in_order() -> None:
    with MemoryTimeline(interval_s=0.001) as timeline:
        timeline.mark("first")
        time.sleep(0.02)
        timeline.mark("second")
    assert [mark.name for mark in timeline.marks] == ["first", "second"]
    assert timeline.marks[1].time_s - timeline.marks[0].time_s >= 0.02
    times = [sample.time_s for sample in timeline.samples]
    assert times == sorted(times)
    assert len(times) > 2


def test_stops_when_the_block_fails() -> None:
    timeline = MemoryTimeline()
    with pytest.raises(RuntimeError, match="inside"), timeline:
        raise RuntimeError("inside")
    count = len(timeline.samples)
    time.sleep(0.03)
    assert len(timeline.samples) == count


def test_goes_to_json_and_back(tmp_path: Path) -> None:
    with MemoryTimeline() as timeline:
        timeline.mark("only")
    timeline.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == timeline.trace()
    assert json.loads((tmp_path / "trace.json").read_text())["kind"] == "process memory"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"kind": "x", "samples": [[1]], "marks": [], "peak_bytes": 0}'])
def test_what_is_no_trace(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trace\.json is not a memory trace"):
        Trace.load(tmp_path / "trace.json")


def test_plot_draws_each_trace_in_its_colour(tmp_path: Path) -> None:
    plot({"one": a_trace()}, tmp_path / "one.png")
    plot({"one": a_trace(), "two": a_trace(40)}, tmp_path / "two.png", budget_bytes=50 * MIB, title="a title")

    def has(colour: tuple[int, int, int], path: Path) -> bool:
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        return bool((np.abs(pixels.astype(int) - colour).max(axis=1) < 8).sum() > 100)

    blue, orange = (31, 119, 180), (255, 127, 14)
    assert has(blue, tmp_path / "one.png")
    assert not has(orange, tmp_path / "one.png")
    assert has(blue, tmp_path / "two.png")
    assert has(orange, tmp_path / "two.png")


def test_plot_without_a_display_backend_or_global_state(tmp_path: Path) -> None:
    import sys

    plot({"one": a_trace()}, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_names_of_phases_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    marks = [Mark(0.01, "load"), Mark(0.02, "encode"), Mark(0.1, "denoise"), Mark(3.4, "decode"), Mark(3.41, "write")]
    one = Trace(
        kind="device memory", samples=[Sample(0, 0), Sample(5, 2**20)], marks=marks, peak_bytes=2**20, seconds=5
    )
    plot({"a": one, "b": one}, tmp_path / "x.png")
    renderer = drawn[0].canvas.get_renderer()  # type: ignore[attr-defined]
    drawn[0].draw(renderer)
    boxes = [text.get_window_extent(renderer) for text in drawn[0].axes[0].texts]
    assert len(boxes) == 10
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
    assert all(text.get_bbox_patch() is not None for text in drawn[0].axes[0].texts)  # lines pass behind
