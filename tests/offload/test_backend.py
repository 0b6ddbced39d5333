"""The queue of a device, with streams and events made of paper."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import vramkit
from vramkit.offload import Offload, apply_group_offloading, engine
from vramkit.offload.backend import AcceleratorBackend, _EventFence, _Events, _StreamQueue


@pytest.fixture(autouse=True)
def _strict() -> None:
    """In place of the one of all tests: a device of paper copies on the thread that computes, and reads what rests."""


class Device:
    """The form of ``torch.cuda``: notes in which stream what was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams: list[Stream] = []
        self.current = Stream("compute")
        self.made = self.asked = 0
        self.events = _Events(self._event, self._current)

    def Stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _current(self) -> Stream:
        self.asked += 1
        return self.current

    def _event(self) -> Event:
        self.made += 1
        return Event(self.log)

    def job(self, name: str, *arrivals: Any) -> Callable[[], Sequence[Any]]:
        def run() -> Sequence[Any]:
            self.log.append(f"{self.current.name}: {name}")
            return arrivals

        return run


class Stream:
    device_index = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._of = ""

    def record(self, stream: Stream) -> None:
        self._of = stream.name

    def wait(self, stream: Stream) -> None:
        self._log.append(f"{stream.name} waits for {self._of}")

    def synchronize(self) -> None: ...


class Arrival:
    def __init__(self, device: Device) -> None:
        self._device = device

    def wait(self) -> None:
        self._device.log.append(f"{self._device.current.name} waits for another rank")


def test_copies_go_on_while_what_others_send_arrives() -> None:
    device = Device()
    queue = _StreamQueue(device, torch.device("meta"), device.events)
    first = queue.submit(device.job("first", Arrival(device)), [])
    second = queue.submit(device.job("second"), [])
    first.wait()
    second.wait()
    assert device.log == [
        "stream 0: first",
        "stream 1 waits for stream 0",
        "stream 1 waits for another rank",
        "stream 0: second",
        "compute waits for stream 1",
        "compute waits for stream 0",
    ]


def test_a_queue_without_other_ranks_has_one_stream() -> None:
    device = Device()
    queue = _StreamQueue(device, torch.device("meta"), device.events)
    queue.submit(device.job("only"), [queue.submit(device.job("before"), [])]).wait()
    queue.drain()
    assert len(device.streams) == 1
    assert device.log == [
        "stream 0: before",
        "stream 0 waits for stream 0",
        "stream 0: only",
        "compute waits for stream 0",
    ]


def test_events_are_made_for_the_fences_that_are_there_and_serve_later_ones() -> None:
    device = Device()
    queue = _StreamQueue(device, torch.device("meta"), device.events)
    fences = [queue.submit(device.job("first"), ()), queue.submit(device.job("second"), ())]
    assert device.made == 2
    for _ in range(10):  # each is there until the next one has taken its place
        fences = [*fences[1:], queue.submit(device.job("next"), (_EventFence(device.events, device.current),))]
    assert device.made == 4
    assert fences[0]._event is not fences[1]._event  # type: ignore[attr-defined]


def on_paper(device: Device, blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Offload]:
    """Layers that stream one by one on a device of paper, and have run."""
    backend = AcceleratorBackend.__new__(AcceleratorBackend)
    backend.device, backend._api, backend._events = torch.device("cpu"), device, device.events
    monkeypatch.setattr(engine, "backend_for", lambda _: backend)
    # Pageable stores have a thread, and another machine may lock memory: without one, as on a device with locked memory.
    monkeypatch.setattr(backend, "queue", lambda *, threaded: _StreamQueue(device, backend.device, device.events))
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(blocks))).requires_grad_(False)
    offload = apply_group_offloading(model, "cpu", offload_type="leaf_level", unit_bytes=1)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 64))
    assert offload.stats().groups == blocks
    return model, offload


def test_a_group_takes_two_events_and_two_waits_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    device, groups = Device(), 12
    model, offload = on_paper(device, groups, monkeypatch)
    x = torch.randn(1, 64)
    device.log.clear()
    device.asked, made = 0, device.made
    with torch.no_grad():
        streamed = model(x)
    waits = [line for line in device.log if "waits" in line]
    assert sorted(set(waits)) == ["compute waits for stream 0", "stream 0 waits for compute"]
    assert len(waits) <= 2 * groups
    assert device.asked <= 2 * groups + 2  # and where the pass ends
    assert device.made == made
    offload.remove()
    assert torch.equal(streamed, model(x))


def test_a_group_takes_few_calls_of_functions_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a group takes the host on a device goes with these, which no other work on the machine changes."""
    calls = {}
    for blocks in (12, 24):
        model, offload = on_paper(Device(), blocks, monkeypatch)
        with torch.no_grad():
            calls[blocks] = _calls_of_ours(lambda model=model: model(torch.randn(1, 64)))  # type: ignore[misc]
        offload.remove()
    assert (calls[24] - calls[12]) / 12 <= 58


def _calls_of_ours(function: Callable[[], Any]) -> int:
    calls = 0
    ours = str(Path(vramkit.__file__).parent)

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(ours)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls
