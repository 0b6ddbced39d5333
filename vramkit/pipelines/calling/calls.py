"""The call of a pipeline: one at a time, without gradients, with numbers as Python has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import nn

from vramkit.offload import offload_of
from vramkit.pipelines.calling.inputs import plain_number
from vramkit.pipelines.loading.use import used

__all__ = ["pipeline_call"]

Call = TypeVar("Call", bound=Callable[..., Any])


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
                uses.enter_context(used(holder, by=type(self).__name__))
            # Not inference_mode: the slots that weights stream through are ordinary tensors.
            uses.enter_context(torch.no_grad())
            if self.together is not None:
                uses.enter_context(self.together(args, kwargs))
            return call(self, *map(plain_number, args), **{name: plain_number(value) for name, value in kwargs.items()})

    return cast("Call", wrapped)


def _keeps_state(component: Any) -> bool:
    """Whether a component remembers something between its calls; models of ours and of transformers do not by themselves."""
    if isinstance(component, nn.Module):
        return offload_of(component) is not None or type(component).__module__.partition(".")[0] == "diffusers"
    return hasattr(component, "set_timesteps")
