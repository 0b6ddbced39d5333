"""Calls into an offloaded module: which are open, and whether they still run.

A call is known by its frame. A hook that should close it does not run after Ctrl-C, and a generator may be left standing; so
a call is open only while its frame is on the stack of the thread.
"""

from __future__ import annotations

import dataclasses
import sys
from types import FrameType

from torch.nn.utils import stateless

__all__ = ["OpenCall", "frame_of_module_call", "is_in_functional_call"]

_MODULE_CALL = ("inner", "_call_impl")  # functions of torch.nn.Module that run hooks and forward


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class OpenCall:
    """A call of the module, of a part of it, or of an entry point."""

    name: str
    frame: FrameType | None
    """What runs it; None where that is unknown: it counts as running."""
    is_whole: bool = True
    """Whether its order of groups is worth learning: not where a single unit was called by itself."""

    def is_running(self) -> bool:
        """Tell whether the frame is on the stack of the calling thread."""
        if self.frame is None:
            return True
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 (the stack has no other reader that is quick enough)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
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


def is_in_functional_call() -> bool:
    """Tell whether ``torch.func.functional_call`` is on the stack of the calling thread."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code is stateless._functional_call.__code__:  # noqa: SLF001
            return True
        frame = frame.f_back
    return False
