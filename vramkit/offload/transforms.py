"""What ``torch.func`` does around an offloaded module."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch._functorch import pyfunctorch
from torch.nn.utils import stateless

__all__ = ["innermost_transform", "is_in_functional_call", "outside_transforms"]

innermost_transform = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001 (torch has no public reader)
"""Returns what runs of ``torch.func``, or None."""
_Self = TypeVar("_Self")
_Args = ParamSpec("_Args")


def outside_transforms(step: Callable[Concatenate[_Self, _Args], None]) -> Callable[Concatenate[_Self, _Args], None]:
    """Take a step outside a transform of ``torch.func`` that runs, which would take tensors of bytes for its own."""

    @functools.wraps(step)
    def run(self: _Self, *args: _Args.args, **kwargs: _Args.kwargs) -> None:
        if innermost_transform() is None:
            step(self, *args, **kwargs)
            return
        with pyfunctorch.temporarily_clear_interpreter_stack():
            step(self, *args, **kwargs)

    return cast("Callable[Concatenate[_Self, _Args], None]", run)


def is_in_functional_call() -> bool:
    """Tell whether ``torch.func.functional_call`` is on the stack of the calling thread."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code is stateless._functional_call.__code__:  # noqa: SLF001
            return True
        frame = frame.f_back
    return False
