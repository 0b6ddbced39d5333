"""The call of a pipeline: one at a time, without gradients, with numbers as Python has them."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from vramkit.errors import ConcurrentUseError
from vramkit.offload import offload_of
from vramkit.pipelines.calling.inputs import plain_number

__all__ = ["pipeline_call"]

Call = TypeVar("Call", bound=Callable[..., Any])
_USE = "_vramkit_use"


def pipeline_call(call: Call) -> Call:
    """Make a method the call of a pipeline.

    It runs without gradients, one call at a time, and numbers of numpy and tensors of one number come to it as Python's own.
    A pipeline keeps the state of its call, and so do schedulers, offloaded models and models of diffusers, which several
    pipelines may share: a second call raises ConcurrentUseError, also one that a callback makes.
    """

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as uses:
            for holder in (self, *filter(_keeps_state, self.components.values())):
                uses.enter_context(_used(holder, by=type(self).__name__))
            # Not inference_mode: the slots that weights stream through are ordinary tensors.
            uses.enter_context(torch.no_grad())
            if self.together is not None:
                uses.enter_context(self.together(args, kwargs))
            return call(self, *map(plain_number, args), **{name: plain_number(value) for name, value in kwargs.items()})

    return cast("Call", wrapped)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Inside:
    """One call that is inside an object."""

    thread: int


class _Use:
    """Which call is inside an object; it stays with the object, and copies of that have one of their own."""

    def __init__(self) -> None:
        self._calls: dict[str, _Inside] = {}

    def take(self, call: _Inside) -> _Inside:
        """Let a call in unless another one is inside, and say which one is; no thread comes between the two."""
        return self._calls.setdefault("inside", call)

    def leave(self, call: _Inside) -> None:
        """Let a call out that is inside."""
        if self._calls.get("inside") is call:
            del self._calls["inside"]

    def __reduce__(self) -> tuple[type[_Use], tuple[()]]:
        return type(self), ()


@contextmanager
def _used(holder: Any, *, by: str) -> Iterator[None]:
    use: _Use = vars(holder).setdefault(_USE, _Use())
    call = _Inside(threading.get_ident())
    try:  # before it is taken: a Ctrl-C may come after any operation
        inside = use.take(call)
        # Models remember what they do during a step only, so a callback may use those of the call around it.
        is_free = inside is call or (isinstance(holder, nn.Module) and inside.thread == call.thread)
        if not is_free:
            raise ConcurrentUseError(
                f"{by}: the {type(holder).__name__} is in use by another call, of another thread or around this one. Run "
                "one call at a time, or give each thread a pipeline and a scheduler of its own around the same models, "
                "which must not be offloaded then: "
                f"{by}.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))"
            )
        yield
    finally:
        use.leave(call)


def _keeps_state(component: Any) -> bool:
    """Whether a component remembers something between its calls; models of ours and of transformers do not by themselves."""
    if isinstance(component, nn.Module):
        return offload_of(component) is not None or type(component).__module__.partition(".")[0] == "diffusers"
    return hasattr(component, "set_timesteps")
