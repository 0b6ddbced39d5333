"""What happened in a run: copies, computation and stalls over the memory curve."""

from vramkit.tracing.recorder import Recorder, trace
from vramkit.tracing.recording import Event, Recording

__all__ = ["Event", "Recorder", "Recording", "trace"]
