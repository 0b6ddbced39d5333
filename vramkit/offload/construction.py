"""Build a module without memory for its parameters, and with everything else that its constructor computes."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vramkit import tensors
from vramkit.errors import CheckpointError

__all__ = ["parameters_on_meta"]

_LARGE_BYTES = 16 * 2**20


class _Became(dict[int, tuple["weakref.ref[nn.Parameter]", nn.Parameter]]):
    """What each parameter became, by its id while it lives, since one may be registered in several modules."""

    most: float = math.inf  # of them


_INSIDE: ContextVar[_Became | None] = ContextVar("vramkit.parameters_on_meta", default=None)


@contextlib.contextmanager
def parameters_on_meta(*, most: int | None = None) -> Iterator[None]:
    """Put the parameters of modules that are constructed inside on the meta device, and nothing else.

    ``torch.device("meta")`` takes the values of everything: also of buffers that no checkpoint holds (tables of rotary
    embeddings, masks) and of tensors kept as plain attributes, which only the constructor can compute. Here it computes
    them, and a parameter loses its memory when it is registered. Until then ``torch.empty`` and zeros have touched none, and
    initializing a parameter on the meta device does nothing, so a model takes no more RAM than its buffers, and a parameter
    may be larger than RAM; one that is computed first, as in ``nn.Parameter(torch.randn(...))``, takes its size for that
    moment. Tied parameters stay tied; subclasses of Parameter and what is noted on one are kept.

    It concerns the thread that is inside, may be nested, and works with any class, through ``Model(config)`` of transformers
    and ``Model.from_config(config)`` of diffusers too. `load_mapped` then gives the module its weights. What a constructor
    computes *from* parameters has no values either, and is named there.

    Args:
        most: parameters that there may be; a damaged config may ask for more than a day's construction.

    Raises:
        CheckpointError: more than `most` parameters are registered.
    """
    _listen()
    became = _INSIDE.get()
    if became is None:
        became = _Became()
        became.most = math.inf if most is None else most
    token = _INSIDE.set(became)
    try:
        with _Frugal():
            yield
    finally:
        _INSIDE.reset(token)


class _Frugal(TorchFunctionMode):
    """Lets memory be touched only when somebody uses what it holds, and does without where there is not enough."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros:
            return _zeros(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if func is not torch.empty or "DefaultCPUAllocator" not in str(error):
                raise
        # Too large for anything but a parameter; if it is not one, load_mapped says so.
        return func(*args, **{**kwargs, "device": "meta"})


def _zeros(*size: Any, **options: Any) -> torch.Tensor:
    """Do as ``torch.zeros``, which writes all of its memory; the system's own zeros are there when they are first read."""
    device = options.get("device") or torch.get_default_device()
    if torch.device(device).type != "cpu" or options.keys() - {"size", "dtype", "device", "requires_grad"}:
        return torch.zeros(*size, **options)
    bare = torch.zeros(*size, **{**options, "device": "meta"})
    if bare.nbytes < _LARGE_BYTES:
        return torch.zeros(*size, **options)
    try:
        memory = torch.from_numpy(np.zeros(bare.nbytes, dtype=np.uint8))
    except MemoryError:
        return bare
    return memory.view(bare.dtype).view(bare.shape).requires_grad_(bare.requires_grad)


@functools.cache
def _listen() -> None:
    """Have torch say when parameters are registered. Once, and for good.

    Taking the hook away again would change the hooks under another thread's loop over them, which is an error there. And a
    TorchFunctionMode, which belongs to a thread, does not see that a tensor becomes a parameter.
    """
    register_module_parameter_registration_hook(_registered)


def _registered(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:  # a parameter, or None to keep it
    became = _INSIDE.get()
    if became is None or parameter.device.type == "meta" or nn.parameter.is_lazy(parameter):
        return None
    known = became.get(id(parameter))
    if known is not None and known[0]() is parameter:
        return known[1]
    if len(became) >= became.most:
        raise CheckpointError(f"there are more than {became.most} parameters, several times what there can be")
    bare = _without_values(parameter)
    became[id(parameter)] = (weakref.ref(parameter), bare)
    return bare


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    if hasattr(parameter, "__tensor_flatten__"):
        data = tensors.rebuild(parameter, [leaf.to("meta") for leaf in tensors.leaves(parameter)])
    else:  # ``.to("meta")`` of a class of its own may do anything
        data = torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta")
    return cast("nn.Parameter", tensors.as_owned(data, like=parameter).requires_grad_(parameter.requires_grad))
