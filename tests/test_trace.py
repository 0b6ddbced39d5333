"""What a trace records of engines, and the files that it writes."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from modules import BlockNet, mapped_copy, tokens

import vramkit
from vramkit.errors import ConfigError, ConflictError, StoreError
from vramkit.offload import apply_group_offloading
from vramkit.offload.backend import AcceleratorBackend
from vramkit.offload.group import ModuleGroup
from vramkit.timeline import Mark, Sample, Trace
from vramkit.tracing.recording import Event, Recording


@pytest.fixture
def module(tmp_path: Path) -> torch.nn.Module:
    return mapped_copy(BlockNet(6).eval(), tmp_path)


def run(module: torch.nn.Module, passes: int = 2) -> None:
    with torch.no_grad():
        for _ in range(passes):
            module(tokens(8))


def test_copies_computation_and_passes_are_recorded(module: torch.nn.Module) -> None:
    offload = apply_group_offloading(module, "cpu", offload_type="block_level")
    run(module, 1)
    before = offload.stats()
    with vramkit.trace() as traced:
        traced.mark("steps")
        run(module)
        offload.rest()  # nothing is under way any more
    stats = offload.stats()
    recording = traced.recording
    blocks = [f"blocks.{at}" for at in range(6)]
    assert [event.name for event in recording.of("pass")] == ["forward", "forward"]
    assert [event.name for event in recording.of("compute")] == blocks * 2
    copies = recording.of("copy")
    assert {event.name for event in copies} == set(blocks)
    assert {event.slot for event in copies} == {0, 1}
    assert 0 < recording.copied_bytes <= stats.loaded_bytes - before.loaded_bytes
    first, second = recording.of("pass")
    for event in recording.of("compute"):
        assert any(run.start_s <= event.start_s <= event.end_s <= run.end_s for run in (first, second))
    assert {event.component for event in recording.events} == {"BlockNet"}
    assert [mark.name for mark in recording.memory.marks] == ["steps"]
    assert 0 < recording.link_share <= 1
    offload.remove()


def test_what_computation_waits_for_is_a_stall(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = ModuleGroup.fill

    def slow(self: ModuleGroup, memory: torch.Tensor) -> Any:
        time.sleep(0.03)
        return fill(self, memory)

    offload = apply_group_offloading(module, "cpu", slots=1)
    offload.rest()
    monkeypatch.setattr(ModuleGroup, "fill", slow)
    with vramkit.trace() as traced:
        run(module, 1)
    assert traced.recording.stalled_s > 5 * 0.03
    assert offload.stats().stall_s > 5 * 0.03
    assert all(event.end_s - event.start_s >= 0.029 for event in traced.recording.of("copy"))
    offload.remove()


def test_nothing_is_recorded_without_a_trace_in_other_threads_or_after_it(module: torch.nn.Module) -> None:
    offload = apply_group_offloading(module, "cpu")
    run(module, 1)
    assert offload._engine is not None
    assert offload._engine._streamer.track is None
    with vramkit.trace() as traced:
        thread = threading.Thread(target=run, args=(module,))
        thread.start()
        thread.join()
    assert traced.recording.events == []
    with vramkit.trace() as traced:
        run(module, 1)
    count = len(traced.recording.events)
    run(module)
    assert len(traced.recording.events) == count
    assert offload._engine._streamer.track is None
    offload.remove()


def test_two_of_a_class_have_two_names(tmp_path: Path) -> None:
    modules = [mapped_copy(BlockNet(4).eval(), tmp_path) for _ in range(2)]
    offloads = [apply_group_offloading(module, "cpu") for module in modules]
    with vramkit.trace() as traced:
        for module in modules:
            run(module, 1)
    assert {event.component for event in traced.recording.events} == {"BlockNet", "BlockNet 2"}
    for offload in offloads:
        offload.remove()


def test_a_trace_is_written_also_where_the_block_fails(module: torch.nn.Module, tmp_path: Path) -> None:
    offload = apply_group_offloading(module, "cpu")
    path = tmp_path / "run.json"
    with pytest.raises(RuntimeError), vramkit.trace(path), torch.no_grad():
        module(tokens(5))
    assert json.loads(path.read_text())["traceEvents"]
    offload.remove()


def test_a_second_trace_and_no_device_are_refused() -> None:
    with vramkit.trace(), pytest.raises(ConflictError, match="on already"), vramkit.trace():
        pytest.fail("it ran")
    with pytest.raises(ConfigError, match="device='abacus'"), vramkit.trace(device="abacus"):
        pytest.fail("it ran")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run.txt", r"\.json, \.html, \.png"),
        ("none/run.json", "no such folder"),
        ("folder.json", "is a folder; give the name of a file"),
        ("/proc/run.json", "its folder takes no files"),
    ],
)
def test_a_path_of_nonsense_is_refused_before_anything_runs(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=said), vramkit.trace(tmp_path / name):
        pytest.fail("it ran")
    with pytest.raises(ConfigError, match=r"written to 5; expected a path"), vramkit.trace(5):  # type: ignore[arg-type]
        pytest.fail("it ran")
    with vramkit.trace() as traced, pytest.raises(ConfigError, match="still on"):
        _ = traced.recording
    with pytest.raises(ConfigError, match="expected a name"):
        traced.recording.save(tmp_path / "x.txt")


@pytest.mark.parametrize("ending", ["json", "html", "png"])
def test_one_that_cannot_be_written_is_told_by_name_and_leaves_nothing(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vramkit.trace() as traced:
        pass
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StoreError, match="No space left on device"):
        traced.recording.save(tmp_path / f"run.{ending}")
    assert not list(tmp_path.iterdir())


# --- what is shown


@pytest.fixture
def recording() -> Recording:
    events = [
        Event("copy", "Net", "a", 0.0, 0.1, 10**9, 0),
        Event("pass", "Net", "forward", 0.1, 0.6),
        Event("copy", "Net", "b", 0.1, 0.3, 10**9, 1),
        Event("compute", "Net", "a", 0.1, 0.2),
        Event("stall", "Net", "b", 0.2, 0.3),
        Event("stall", "Net", "c", 0.35, 0.350001),
        Event("compute", "Net", "b</script>", 0.3, 0.6),
    ]
    samples = [Sample(at / 10, at * 2**20) for at in range(8)]
    memory = Trace(kind="process memory", samples=samples, marks=[Mark(0.1, "go")], peak_bytes=7 * 2**20, seconds=0.7)
    return Recording(events, memory)


def test_the_summary_is_the_sums(recording: Recording) -> None:
    assert recording.stalled_s == pytest.approx(0.1)
    assert recording.rate_gbps == pytest.approx(2 / 0.3)
    assert recording.link_share == pytest.approx(0.2 / 0.5)
    said = recording.summary()
    for part in (
        "1 passes in 0.500 s",
        "stalled 100.0 ms",
        "2 GB copied at 6.67 GB/s",
        "link busy for 40%",
        "0.00684 GiB",
    ):
        assert part in said
    assert "0 passes" in Recording([], recording.memory).summary()


def test_the_json_is_what_perfetto_reads(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_text())
    events = found["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(names.values()) == ["Net: pass", "Net: compute", "Net: copy", "Net: stall"]
    copies = [event for event in events if event["ph"] == "X" and names[event["tid"]] == "Net: copy"]
    assert [(event["ts"], event["dur"], event["args"]) for event in copies] == [
        (0, pytest.approx(1e5), {"bytes": 10**9, "slot": 0}),
        (pytest.approx(1e5), pytest.approx(2e5), {"bytes": 10**9, "slot": 1}),
    ]
    assert [event["args"]["bytes"] for event in events if event["ph"] == "C"] == [at * 2**20 for at in range(8)]
    assert found["otherData"]["summary"] == recording.summary()


def test_the_page_needs_nothing_else_and_the_picture_is_one(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text()

    class Scripts(HTMLParser):
        found: Sequence[str] = ()
        inside = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            assert not [value for name, value in attrs if name in ("src", "href")]
            self.inside = tag == "script"

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.found = [*self.found, data]

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    scripts = Scripts()
    scripts.feed(text)
    (script,) = ["".join(scripts.found)]
    line = next(line for line in script.splitlines() if line.startswith("const data = "))
    data = json.loads(line.removeprefix("const data = ").removesuffix(";").replace("<\\/", "</"))
    assert len(data["events"]) == len(recording.events)
    assert [lane["name"] for lane in data["lanes"]] == ["Net: pass", "Net: compute", "Net: copy", "Net: stall"]
    assert script.rstrip().endswith("paint();")
    recording.save(tmp_path / "run.png")
    with PIL.Image.open(tmp_path / "run.png") as picture:
        assert picture.size[0] > 1000


def test_moments_of_a_device_are_read_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    class Timed:
        """An event on a device that begins its work 2 s after the host has asked for it."""

        def __init__(self, *, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at_s = time.perf_counter() + (0 if waited else 2)

        def synchronize(self) -> None:
            waited.append("event")

        def elapsed_time(self, later: Timed) -> float:
            return (later.at_s - self.at_s) * 1000

    api = SimpleNamespace(
        Event=Timed, current_stream=lambda index: object(), synchronize=lambda device: waited.append("device")
    )
    monkeypatch.setattr(torch, "paper", api, raising=False)
    backend = AcceleratorBackend.__new__(AcceleratorBackend)
    backend.device, backend._api = SimpleNamespace(index=0), api
    asked_s = time.perf_counter()
    moments = [backend.moment(), backend.moment()]
    assert waited == []
    times = backend.times(moments)
    assert waited == ["device", "event"]
    assert [time_s - asked_s for time_s in times] == [pytest.approx(2, abs=0.5)] * 2
