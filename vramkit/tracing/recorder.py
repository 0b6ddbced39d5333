"""Notes what engines do while a trace is on. Moments are points in streams, whose times are asked for at the end."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload.backend import Arrival, Copying
from vramkit.timeline import MemoryTimeline
from vramkit.tracing.recording import ENDINGS, Event, Kind, Recording

if TYPE_CHECKING:
    from vramkit.offload.backend import Backend

__all__ = ["Recorder", "Track", "check_path", "trace", "track_of"]

_ACTIVE: ContextVar[Recorder | None] = ContextVar("vramkit.trace", default=None)


class Track:
    """The events of one component."""

    def __init__(self, recorder: Recorder, component: str, backend: Backend) -> None:
        self.component, self.backend = component, backend
        self.notes: list[tuple[Kind, str, Any, Any, int, int | None]] = []
        self._recorder = recorder

    def note(  # noqa: PLR0917 (called around every unit)
        self, kind: Kind, name: str, start: Any, end: Any, size_bytes: int = 0, slot: int | None = None
    ) -> None:
        """Note what went on between two moments of the backend."""
        if self._recorder.is_on:
            self.notes.append((kind, name, start, end, size_bytes, slot))

    def copying(self, name: str, size_bytes: int, slot: int | None, fill: Copying) -> Copying:
        """Return `fill`, which runs on the queue that copies, with a note of when it did."""

        def noted() -> Sequence[Arrival]:
            start = self.backend.moment()
            arrivals = fill()
            self.note("copy", name, start, self.backend.moment(), size_bytes, slot)
            return arrivals

        return noted


class Recorder:
    """A trace that is on, from `trace`; afterwards it has the `recording`."""

    def __init__(self, timeline: MemoryTimeline) -> None:
        self.is_on = True
        self._timeline = timeline
        self._tracks: dict[tuple[int, int], tuple[Track, nn.Module]] = {}  # the module lives as long as its id counts
        self._recording: Recording | None = None

    def mark(self, name: str) -> None:
        """Note that the phase `name` begins now."""
        self._timeline.mark(name)

    @property
    def recording(self) -> Recording:
        """What was recorded.

        Raises:
            ConfigError: the trace is still on.
        """
        if self._recording is None:
            raise ConfigError("the trace is still on; ask for its recording after the `with` block")
        return self._recording

    def track(self, module: nn.Module, backend: Backend) -> Track:
        """Return where what is done for `module` is noted."""
        key = id(module), id(type(backend))
        if key not in self._tracks:
            names = [track.component for track, _ in self._tracks.values()]
            name = type(module).__name__
            count = sum(each == name or each.startswith(f"{name} ") for each in names)
            self._tracks[key] = Track(self, f"{name} {count + 1}" if count else name, backend), module
        return self._tracks[key][0]

    def finish(self) -> None:
        """Take no more notes, wait for the devices, and work out when everything was."""
        self.is_on = False
        begun_s = self._timeline.begun_s
        events: list[Event] = []
        for track, _ in self._tracks.values():
            notes = list(track.notes)
            times = track.backend.times([moment for _, _, start, end, _, _ in notes for moment in (start, end)])
            for at, (kind, name, _, _, size_bytes, slot) in enumerate(notes):
                start_s, end_s = (time_s - begun_s for time_s in times[2 * at : 2 * at + 2])
                events.append(Event(kind, track.component, name, start_s, max(start_s, end_s), size_bytes, slot))
        self._tracks.clear()
        self._recording = Recording(sorted(events, key=lambda event: event.start_s), self._timeline.trace())


@contextlib.contextmanager
def trace(
    path: str | os.PathLike[str] | None = None, *, device: str | torch.device | None = None
) -> Iterator[Recorder]:
    """Record what offloaded modules do in this block, in this thread: copies, computation, stalls, and the memory curve.

    ::

        with vramkit.trace("run.html") as traced:
            pipeline(prompt)
        print(traced.recording.summary())

    On a device nothing is waited for in the block: times come from events that are read at its end. Without a trace nothing
    is recorded and nothing is spent.

    Args:
        path: what to write when the block ends, also by an error: ``.json`` (Chrome and Perfetto), ``.html``, ``.png``.
        device: whose memory is the curve (default: the CUDA device, if there is one, else this process).

    Raises:
        ConfigError: `path` cannot be written so, or `device` is none.
        ConflictError: a trace is on already.
    """
    if path is not None:
        check_path(path)
    if _ACTIVE.get() is not None:
        raise ConflictError(
            "a trace is on already, and it would miss what another one notes; use that, or end it first"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        timeline = MemoryTimeline(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no device; give 'cuda', 'cuda:1' or 'cpu'") from error
    recorder = Recorder(timeline)
    token = _ACTIVE.set(recorder)
    try:
        with timeline:
            yield recorder
    finally:
        _ACTIVE.reset(token)
        recorder.finish()
        if path is not None:
            recorder.recording.save(path)


def track_of(module: nn.Module, backend: Backend) -> Track | None:
    """Return where to note what is done for `module` on `backend`, or None where there is no trace."""
    recorder = _ACTIVE.get()
    return None if recorder is None else recorder.track(module, backend)


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError where `path` is nothing that a trace can be written to."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"a trace was to be written to {path!r}; expected a path, or None")
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ConfigError(
            f"a trace was to be written to {str(path)!r}; expected a name that ends in {', '.join(ENDINGS)}"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"a trace was to be written to {str(path)!r}, and there is no such folder; make it first")
    if path.is_dir():
        raise ConfigError(f"a trace was to be written to {str(path)!r}, which is a folder; give the name of a file")
    try:  # permissions do not tell: the disk may be full or read-only
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise ConfigError(
            f"a trace was to be written to {str(path)!r}, and its folder takes no files ({error.strerror or error})"
        ) from error
