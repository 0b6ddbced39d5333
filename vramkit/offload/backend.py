"""Devices behind one small interface: memory for slots, a queue that copies beside the computation, and fences between.

On an accelerator the queue is a stream of its own and fences are its events, so the host never waits. On the CPU the same
engine runs one tier lower: slots are RAM, the queue is one worker thread, and a fence is waited for by the computing thread.
Stores that must touch bytes on the host first (disk, staging) run their fills on the worker thread on every device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch

from vramkit.offload.workers import Job, Workers

__all__ = [
    "AcceleratorBackend",
    "Arrival",
    "Backend",
    "CopyQueue",
    "Copying",
    "CpuBackend",
    "Fence",
    "accelerator_for",
    "backend_for",
]


class Fence(Protocol):
    """A point in a queue of work."""

    def wait(self, stream: Any = None) -> float:
        """Let what is issued from now on to `stream` (None: to the one that computes) start after this point.

        Returns the seconds that the host was held up.
        """

    def synchronize(self) -> None:
        """Hold the host until this point is reached."""


class Arrival(Protocol):
    """Bytes that others send."""

    def wait(self) -> None:
        """Let the current stream wait for them, or the host where there are no streams."""


Copying: TypeAlias = Callable[[], Sequence[Arrival]]


class CopyQueue(Protocol):
    """Copies in order, beside the computation."""

    def submit(self, job: Copying, after: Iterable[Fence]) -> Fence:
        """Run `job` after all that was submitted and after the fences.

        The result is passed when the job is done and what it returned has arrived. Later jobs need not wait for arrivals.
        """

    def drain(self) -> None:
        """Hold the host until everything submitted is done, whether it failed or not. Closed: nothing to do."""

    def close(self) -> None:
        """Drain and end the queue. It may be called again, also after a call that was interrupted."""


class Backend(Protocol):
    """One device that computes."""

    device: torch.device

    def memory(self, size_bytes: int) -> torch.Tensor:
        """Return uninitialized device memory as a 1-D uint8 tensor, never an inference tensor."""

    def queue(self, *, threaded: bool) -> CopyQueue:
        """Return a new copy queue; a `threaded` one runs its jobs on a thread of its own."""

    def trim(self) -> None:
        """Give freed memory that an allocator keeps back to the device."""

    def fence(self) -> Fence:
        """Return a fence at the end of what the calling thread has issued so far on its current stream."""

    def moment(self) -> Any:
        """Return that point in time, for `times`."""

    def times(self, moments: Sequence[Any]) -> list[float]:
        """Wait for the device, and return when `moments` were, in seconds of ``time.perf_counter``."""


def backend_for(device: torch.device) -> Backend:
    """Return the backend of `device`."""
    return CpuBackend() if device.type == "cpu" else AcceleratorBackend(device)


def accelerator_for(device: torch.device) -> torch.device:
    """Return where to convert weights that rest on `device`: an accelerator does in seconds what takes a CPU minutes.

    That is the accelerator, if there is one, for weights in host memory, and `device` itself for others.
    """
    if device.type != "cpu" or not torch.accelerator.is_available():
        return device
    return torch.accelerator.current_accelerator() or device


class _Passed:
    """A fence that was passed long ago: computation on the CPU is done when it is issued."""

    def wait(self, stream: Any = None) -> float:
        return 0.0

    def synchronize(self) -> None:
        pass


class _JobFence:
    """A job of a worker thread, and on an accelerator the event that the job recorded last."""

    def __init__(self, job: Job[Fence]) -> None:
        self._job = job

    def wait(self, stream: Any = None) -> float:
        if self._job.is_done:
            return self._job.result().wait(stream)
        start = time.perf_counter()
        fence = self._job.result()
        return time.perf_counter() - start + fence.wait(stream)

    def synchronize(self) -> None:
        self._job.result().synchronize()


class _WorkerQueue:
    """Jobs on one thread, each inside `inner` (the copy stream of an accelerator, or nothing)."""

    def __init__(self, inner: CopyQueue) -> None:
        self._inner = inner
        self._worker = Workers("vramkit-copy")
        self._worker.start()  # now, because a thread that cannot be had is an error of applying

    def submit(self, job: Copying, after: Iterable[Fence]) -> Fence:
        return _JobFence(self._worker.submit(partial(self._inner.submit, job, tuple(after))))

    def drain(self) -> None:
        self._worker.drain()
        self._inner.drain()

    def close(self) -> None:
        self._worker.close()
        self._inner.close()


class _DirectQueue:
    """Jobs run where they are submitted: what a worker thread does on the CPU."""

    def submit(self, job: Copying, after: Iterable[Fence]) -> Fence:
        for fence in after:
            fence.synchronize()
        for arrival in job():
            arrival.wait()
        return _Passed()

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


class CpuBackend:
    """The CPU as a device: slots in RAM, one worker thread as the copy stream."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def memory(self, size_bytes: int) -> torch.Tensor:
        """Return RAM that is taken page by page when it is first written."""
        with torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")  # whatever the default device is

    def trim(self) -> None:
        """Do nothing: freed memory of this size goes back by itself."""

    def queue(self, *, threaded: bool) -> CopyQueue:
        """Return a queue on a worker thread, so that reading goes on while the caller computes."""
        return _WorkerQueue(_DirectQueue())

    def fence(self) -> Fence:
        """Return a passed fence: what the CPU was asked to compute is done."""
        return _Passed()

    def moment(self) -> Any:
        """Return the time."""
        return time.perf_counter()

    def times(self, moments: Sequence[Any]) -> list[float]:
        """Return them as they are."""
        return list(moments)


class _Events:
    """Events of one device, by the calls of torch that take the host least: those of ``torch.cuda`` are Python.

    The event of a fence that nobody has any more is recorded anew: what was told to wait for it waits for the old record.
    """

    def __init__(self, make: Callable[[], Any], current_stream: Callable[[], Any]) -> None:
        self.current_stream = current_stream
        self.make = make
        self.spare: list[Any] = []

    @classmethod
    def of(cls, device: torch.device) -> _Events:
        # Devices go by their index: torch takes 15 us to look one up, as long as the copy of a group takes to issue.
        # What `torch.accelerator.current_stream` ends with, of which a group needs two.
        current = partial(torch._C._accelerator_getStream, device.index)  # noqa: SLF001
        return cls(partial(torch.Event, device, enable_timing=False), current)


class _EventFence:
    def __init__(self, events: _Events, stream: Any) -> None:
        self._events = events
        try:
            self._event = events.spare.pop()  # one step: fences of other threads come and go, too
        except IndexError:
            self._event = events.make()
        self._event.record(stream)

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._events.spare.append(self._event)

    def wait(self, stream: Any = None) -> float:
        self._event.wait(self._events.current_stream() if stream is None else stream)
        return 0.0

    def synchronize(self) -> None:
        self._event.synchronize()


class _StreamQueue:
    """A stream of its own: jobs issue asynchronous copies, fences are events, nothing waits on the host.

    A second stream waits for what arrives from others, so that the link goes on with the next job.
    """

    def __init__(self, api: Any, device: torch.device, events: _Events) -> None:
        self._api = api
        self._device = device
        self._events = events
        self._stream = api.Stream(device=device)
        self._arrivals: Any = None  # a stream, where there are any
        self._enters_itself = hasattr(self._stream, "__enter__")  # which takes torch 1 us instead of 10

    def submit(self, job: Copying, after: Iterable[Fence]) -> Fence:
        with self._stream if self._enters_itself else self._api.stream(self._stream):
            for fence in after:
                fence.wait(self._stream)
            arrivals = job()
            issued = _EventFence(self._events, self._stream)
        if not arrivals:
            return issued
        self._arrivals = self._arrivals or self._api.Stream(device=self._device)
        with self._arrivals if self._enters_itself else self._api.stream(self._arrivals):
            issued.wait(self._arrivals)
            for arrival in arrivals:
                arrival.wait()
            return _EventFence(self._events, self._arrivals)

    def drain(self) -> None:
        self._stream.synchronize()
        if self._arrivals is not None:
            self._arrivals.synchronize()

    def close(self) -> None:
        self.drain()


class AcceleratorBackend:
    """A device with streams and events of the ``torch.cuda`` form; ``torch.xpu`` has the same one and is untested."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._api = getattr(torch, device.type)
        self._events = _Events.of(device)

    def memory(self, size_bytes: int) -> torch.Tensor:
        """Return device memory from torch's caching allocator."""
        with torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def trim(self) -> None:
        """Empty the cache of the allocator, from which a larger piece than those that it keeps could not be served."""
        self._api.empty_cache()

    def queue(self, *, threaded: bool) -> CopyQueue:
        """Return a queue on a new stream, driven by a worker thread when asked for."""
        queue = _StreamQueue(self._api, self.device, self._events)
        return _WorkerQueue(queue) if threaded else queue

    def fence(self) -> Fence:
        """Record an event on the stream that computes now."""
        return _EventFence(self._events, self._events.current_stream())

    def moment(self) -> Any:
        """Record an event that knows its time."""
        event = self._api.Event(enable_timing=True)
        event.record(self._api.current_stream(self.device.index))
        return event

    def times(self, moments: Sequence[Any]) -> list[float]:
        """Ask how long before now each event was: an event knows the time only by another one."""
        self._api.synchronize(self.device)
        now = self.moment()
        now.synchronize()
        now_s = time.perf_counter()
        return [now_s - moment.elapsed_time(now) / 1000 for moment in moments]
