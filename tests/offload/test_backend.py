"""The queue of a device, with streams and events made of paper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vramkit.offload.backend import _StreamQueue


class Device:
    """The form of ``torch.cuda``: notes in which stream what was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams: list[Stream] = []
        self.current = Stream("compute")

    def Stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(f"stream {len(self.streams)}"))
        return self.streams[-1]

    def Event(self) -> Event:
        return Event(self.log)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, index: int) -> Stream:
        return self.current

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


class Arrival:
    def __init__(self, device: Device) -> None:
        self._device = device

    def wait(self) -> None:
        self._device.log.append(f"{self._device.current.name} waits for another rank")


def test_copies_go_on_while_what_others_send_arrives() -> None:
    device = Device()
    queue = _StreamQueue(device, torch.device("meta"))
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
    queue = _StreamQueue(device, torch.device("meta"))
    queue.submit(device.job("only"), [queue.submit(device.job("before"), [])]).wait()
    queue.drain()
    assert len(device.streams) == 1
    assert device.log == [
        "stream 0: before",
        "stream 0 waits for stream 0",
        "stream 0: only",
        "compute waits for stream 0",
    ]
