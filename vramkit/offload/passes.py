"""Calls into an offloaded module: which are open, and whether they still run.

A call is known by its frame. A hook that should close it does not run after Ctrl-C, and a generator may be left standing; so
a call is open only while its frame is on the stack of the thread.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from types import FrameType

__all__ = ["Calls", "OpenCall", "frame_of_module_call"]

_MODULE_CALL = ("inner", "_call_impl")  # functions of torch.nn.Module that run hooks and forward


@dataclasses.dataclass(slots=True, eq=False)
class OpenCall:
    """A call of the module, of a part of it, or of an entry point."""

    name: str
    frame: FrameType | None
    """What runs it; None where that is unknown: it counts as running."""
    is_whole: bool = True
    """Whether its order of groups is worth learning: not where a single unit was called by itself."""
    _depth: int = dataclasses.field(default=1, init=False)
    """How far up the stack the frame was when it was found last: mostly by the neighbour of whoever asks now."""

    def is_running(self) -> bool:
        """Tell whether the frame is on the stack of the calling thread."""
        sought = self.frame
        if sought is None:
            return True
        try:
            if sys._getframe(self._depth) is sought:  # noqa: SLF001 (one step; each step of a walk makes an object)
                return True
        except ValueError:  # the stack is not that deep
            pass
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 (the stack has no other reader that is quick enough)
        depth = 1
        while frame is not None:
            if frame is sought:
                self._depth = depth
                return True
            depth, frame = depth + 1, frame.f_back
        return False


def frame_of_module_call() -> FrameType | None:
    """Return the frame of the innermost call of an ``nn.Module``."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        code = frame.f_code
        if code.co_name in _MODULE_CALL and code.co_filename.endswith("module.py"):
            return frame
        frame = frame.f_back
    return None


class Calls:
    """The calls of one module that are open, all in one thread. Whoever changes them sees to it that nobody else does."""

    def __init__(self) -> None:
        self.thread: int | None = None
        """The one that they run in; it stays theirs until it is set free."""
        self.open: list[OpenCall] = []
        """Those that were begun and not ended, running or torn off; outermost first."""
        self._armed: list[OpenCall] = []  # methods that run, and become calls when they need weights

    @property
    def are_elsewhere(self) -> bool:
        """Whether they run in another thread than the calling one."""
        return self.thread is not None and self.thread != threading.get_ident()

    def is_running_here(self) -> bool:
        """Tell whether the calling thread is in one. Each group comes by here."""
        if self.thread == threading.get_ident():
            for call in reversed(self.open):
                if call.is_running():
                    return True
        return False

    def is_inside(self) -> bool:
        """Tell whether the calling thread is in one, or in a method that is one as soon as it needs weights."""
        if self.are_elsewhere:
            return False
        return self.are_running() or any(map(OpenCall.is_running, reversed(self._armed)))

    def is_idle(self) -> bool:
        """Tell whether none runs: those that were torn off are not on the stack of the thread that they ran in."""
        return not self.are_elsewhere and not self.are_running()

    def are_running(self) -> bool:
        """Tell whether one is on the stack of the calling thread."""
        return any(map(OpenCall.is_running, reversed(self.open)))

    def armed(self) -> OpenCall | None:
        """Return the outermost method that runs and may become one."""
        return next((call for call in self._armed if call.is_running()), None)

    def begin(self, call: OpenCall) -> None:
        """Note that `call` begins in the calling thread."""
        self.thread = threading.get_ident()
        self.open.append(call)

    def end(self, name: str) -> OpenCall | None:
        """End the innermost one by that name, and what is open inside it; None where there is none in this thread."""
        at = next((at for at in reversed(range(len(self.open))) if self.open[at].name == name), None)
        if at is None or self.thread != threading.get_ident():
            return None
        call = self.open[at]
        del self.open[at:]
        return call

    def arm(self, call: OpenCall) -> None:
        """Note a method that runs, and may become one."""
        self._armed = [*(other for other in self._armed if other.is_running()), call]

    def disarm(self, call: OpenCall) -> bool:
        """Forget what `arm` has noted; tell whether it has become one that is still open."""
        self._armed = [other for other in self._armed if other is not call]
        return any(open_call.frame is call.frame for open_call in self.open)

    def drop_torn(self) -> bool:
        """Forget those that no longer run; tell if there were any."""
        running = [call for call in self.open if call.is_running()]
        is_torn = len(running) < len(self.open)
        self.open = running
        return is_torn
