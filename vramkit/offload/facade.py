"""What an offloaded module says of itself, and what it refuses, so that code of others goes on working.

A pipeline asks a model for its device and makes latents there; calls ``to("cuda")``; copies it or saves it whole.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from vramkit import hooks
from vramkit.errors import ConflictError
from vramkit.offload.derived import derived_class

if TYPE_CHECKING:
    from vramkit.offload.engine import Engine

__all__ = ["Facade"]


class Facade:
    """The face of one offloaded module."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def attach(self, record: list[hooks.Attachment]) -> None:
        """Put it on; what takes it off again is noted in `record` first."""
        module = self._engine.module
        _listen()
        for part in module.modules():
            hooks.set_attribute(part, "_apply", self._applying(part), record)
            hooks.set_attribute(part, "__deepcopy__", self._copying(part), record)
            hooks.set_attribute(part, "__reduce_ex__", self._reducing(part), record)
        _answer_for(module, self._engine.config.device, record)

    def _applying(self, part: nn.Module) -> Callable[..., nn.Module]:
        def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:  # noqa: ARG001
            dtypes = {tensor.dtype for tensor in (*part.parameters(), *part.buffers())}
            try:
                probes = {dtype: fn(torch.empty(0, dtype=dtype, device="cpu")) for dtype in dtypes}
            except (AssertionError, RuntimeError):  # a device that this machine or this torch does not have
                probes = {dtype: torch.empty(0, dtype=dtype, device="meta") for dtype in dtypes}
            if any(probe.dtype != dtype or _is_shared(probe) for dtype, probe in probes.items()):
                raise ConflictError(
                    f"{type(part).__name__} is offloaded, so its weights cannot be cast or shared; do that inside "
                    "`with offload_of(module).edit():`, or before"
                )
            if any(probe.device.type != "cpu" for probe in probes.values()) and self._engine.owner.is_first_move():
                warnings.warn(
                    f"{type(self._engine.module).__name__} is offloaded: it computes on {self._engine.config.device} and "
                    "its weights stay where they rest; moving it does nothing",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return part

        return apply

    def _copying(self, part: nn.Module) -> Callable[[dict[int, Any]], nn.Module]:
        return lambda memo: self._copied(part, memo, share=False)

    def _reducing(self, part: nn.Module) -> Callable[[Any], Any]:
        def reduce(protocol: Any) -> Any:
            twin = self._copied(part, {}, share=True)
            # Later protocols look whether what they make has the class of `part`, which is a derived one.
            return twin.__reduce_ex__(protocol if type(twin) is type(part) else 1)

        return reduce

    def _copied(self, part: nn.Module, memo: dict[int, Any], *, share: bool) -> nn.Module:
        """Return an ordinary module: one that shares the memory of `part`, or a copy (in a pass, on the device)."""
        is_outermost = id(self) not in memo  # a part comes by here for each part below it
        memo[id(self)] = self
        if is_outermost and (share or not self._engine.is_inside()):
            self._engine.keep_writes()
            for parameter, values in self._engine.assembly.resting_values():
                memo[id(parameter)] = values if share else copy.deepcopy(values, memo)  # once for tied ones
        kind: type[nn.Module] = getattr(type(part), "offloaded_kind", type(part))
        twin = kind.__new__(kind)
        memo[id(part)] = twin
        twin.__dict__.update(copy.deepcopy(hooks.without_attachments(vars(part)), memo))
        hooks.strip(twin)
        return twin


@functools.cache
def _listen() -> None:
    """Have torch say when modules are added or replaced. Once, and for good.

    Taking a hook away changes the hooks under torch's loop over them, which is an error there: in another thread, and where
    an engine that nobody holds any more is collected in the middle of the loop.
    """
    register_module_module_registration_hook(_registered)


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    for owner in hooks.marks(parent):
        engine: Any = owner
        if hasattr(engine, "is_stale") and parent._modules.get(name) is not child:  # noqa: SLF001
            engine.is_stale |= not engine.is_inside()


class _NoForwardOfAccelerate:
    """In the place of the attribute that accelerate sets first when it begins to move a module's weights."""

    def __get__(self, module: nn.Module | None, _kind: type[nn.Module]) -> Any:
        raise AttributeError("_old_forward")

    def __set__(self, module: nn.Module, _forward: Any) -> None:
        raise _conflict("model/sequential CPU offloading", module)


class _NoHookOfAccelerate:
    """In the place of the attribute by which diffusers' group offloading asks first if others move a module's weights.

    Everybody else who asks for it learns that accelerate does not.
    """

    def __get__(self, module: nn.Module | None, _kind: type[nn.Module]) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__")  # noqa: SLF001
        if module is not None and asking == "diffusers.hooks.group_offloading":
            raise _conflict("group offloading of diffusers", module)
        raise AttributeError("_hf_hook")


def _conflict(what: str, module: nn.Module) -> ConflictError:
    return ConflictError(
        f"You are trying to apply {what} to {type(module).__name__}, whose weights vramkit moves already; call "
        "offload_of(module).remove() first, or leave its offloading as it is"
    )


def _answer_for(module: nn.Module, device: torch.device, record: list[hooks.Attachment]) -> None:
    """Let a module whose class has a property `device` (where its first parameter lies) say where it computes.

    Such modules are those of pipelines. They refuse those who begin to move their weights too, by what those ask or set
    first: ``enable_model_cpu_offload()`` of a pipeline, accelerate, group offloading of diffusers. Other modules keep their
    class, which callers may compare.
    """
    kind = type(module)
    if not isinstance(getattr(kind, "device", None), property):
        return
    answers = {
        "device": property(lambda _self: device),
        "_old_forward": _NoForwardOfAccelerate(),
        "_hf_hook": _NoHookOfAccelerate(),
    }
    derived = derived_class(kind, answers)

    def undo() -> None:
        if type(module) is derived:
            module.__class__ = kind

    record.append(hooks.Attachment(undo))
    module.__class__ = derived


def _is_shared(tensor: torch.Tensor) -> bool:
    # Torch says of every tensor of a device that it is.
    return tensor.device.type == "cpu" and bool(tensor.is_shared())  # type: ignore[no-untyped-call]
