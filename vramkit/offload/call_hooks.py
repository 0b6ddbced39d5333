"""What runs around calls of an offloaded module, of its parts and of its units."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterator
from types import FrameType, GeneratorType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.autograd import forward_ad

from vramkit import hooks
from vramkit.errors import ConflictError, TrainingError
from vramkit.offload.arguments import any_requires_grad, with_tensors
from vramkit.offload.group import ModuleGroup

if TYPE_CHECKING:
    from vramkit.offload.engine import Call, Engine

__all__ = ["EncoderHook", "GroupHook", "PartHook", "PassHook", "wrap_entry_points"]

# Classes whose methods keep books (load, save, adapt, configure) and do not compute.
_BOOKKEEPERS = (
    "torch.",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
    "diffusers.configuration_utils",
    "diffusers.loaders",
    "diffusers.models.cache_utils",
    "diffusers.models.modeling_utils",
    "huggingface_hub.",
    "peft.",
    "vramkit.pipelines.loading.modeling",
)


class PassHook(hooks.ModuleHook):
    """Opens and closes a pass around the forward of the offloaded module."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Open the pass and move the inputs."""
        if module is not self.engine.module:
            _refuse_copy(module)
        self.engine = self.engine.owner.current_engine() or self.engine
        self.engine.begin("forward")
        return self.engine.moved(args, kwargs)

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Close the pass.

        Give weights that are returned as they rest from the device, and run each step of a generator in a pass.
        """
        self.engine.end("forward")
        return _given(output, self.engine, "forward")


class PartHook(hooks.ModuleHook):
    """Makes a pass of a part that is called by itself."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._may_have_begun = False

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Outside a pass, open one and move the inputs."""
        before, self._may_have_begun = self._may_have_begun, True  # also where it raises in the middle
        if not self._engine.begin_if_outside(self._name, is_whole=True):
            self._may_have_begun = before
            return None
        return self._engine.moved(args, kwargs)

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the pass if this part opened it."""
        if self._may_have_begun:
            self._engine.end(self._name)
            self._may_have_begun = False


class GroupHook(hooks.ModuleHook):
    """Acquires and releases one group around the modules that enter it.

    The group is released after the last of them. Which one that is, is taken from the definition and corrected by what runs.
    """

    def __init__(self, engine: Engine, group: ModuleGroup) -> None:
        self.group = group
        self.entries = set(group.entries)
        self._engine = engine
        self._name = f"unit {group.name}"
        self._last: nn.Module | None = group.entries[-1] if group.entries else None
        self._recent: nn.Module | None = None  # left since the group was acquired
        self._running = 0
        self._has_begun = False  # a pass, because it was called by itself

    @property
    def is_running(self) -> bool:
        """Whether one of its modules runs."""
        return self._running > 0

    def learn_last(self) -> None:
        """Take the module that was left most recently for the last one of a pass."""
        self._last, self._recent = self._recent or self._last, None

    def end_pass(self) -> None:
        """Learn the last one, and forget those that seem to run: a KeyboardInterrupt skipped what follows their forward."""
        self._last = self._recent or self._last
        self._recent, self._running, self._has_begun = None, 0, False

    def forget(self) -> None:
        """Forget a pass that was torn off."""
        self._recent, self._running, self._has_begun = None, 0, False

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Have the group on the device."""
        if module not in self.entries:
            _refuse_copy(module)
        if (torch.is_grad_enabled() and any_requires_grad((args, kwargs))) or forward_ad._current_level >= 0:  # noqa: SLF001
            raise TrainingError(
                f"an input of {self.group.name or type(module).__name__} asks for gradients, which would pass through "
                "streamed weights that are overwritten by then; detach() it, use torch.no_grad(), or remove() the offloading"
            )
        engine = self._engine
        is_by_itself = engine.begin_if_outside(self._name, is_whole=False)
        if is_by_itself:
            self._has_begun = True
        if not _may_be_skipped(module):  # else the group is acquired when a weight of it is read
            engine.enter(self.group, module)
        self._running += 1
        return engine.moved(args, kwargs) if is_by_itself else None

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let the group go after its last module."""
        if module not in self.entries or not self._running:
            return
        self._running -= 1
        self._recent = module
        if not self._running:
            self._engine.leave(self.group, is_last=module is self._last)
            if self._has_begun:
                self._has_begun = False
                self._engine.end(self._name)


class EncoderHook(hooks.ModuleHook):
    """Has the first layer of torch's encoder on the device before the encoder looks at its weights.

    The encoder packs padded sequences only where they are ordinary tensors, which those at rest are not.
    """

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the weights, as somebody who needs them does."""
        assert isinstance(module, nn.TransformerEncoder)
        for parameter in module.layers[0].parameters():
            parameter.detach()


def _refuse_copy(module: nn.Module) -> NoReturn:
    raise ConflictError(
        f"this {type(module).__name__} is a copy of an offloaded module and shares its hooks; "
        "copy after remove(), or build a second model"
    )


def _may_be_skipped(module: nn.Module) -> bool:
    """Whether a block cache of diffusers put another forward on `module`, which decides if the real one runs."""
    registry = module.__dict__.get("_diffusers_hook")
    return registry is not None and any(hasattr(hook, "new_forward") for hook in registry.hooks.values())


def wrap_entry_points(module: nn.Module, engine: Engine, record: list[hooks.Attachment]) -> None:
    """Make passes of the methods of `module` that run it without calling it.

    Those that the config names are passes from beginning to end. Other public methods of the model's own classes, whatever
    they do, are passes from when they first need weights.
    """
    named = ("forward", *engine.config.entry_points)
    found = [name for name in _own_methods(type(module)) if name not in named]
    for name in named:
        hooks.wrap_method(module, name, _as_a_pass(engine, name), record)
    for name in found:
        hooks.wrap_method(module, name, _armed(engine, name), record)


def _own_methods(kind: type) -> Iterator[str]:
    """Yield the public methods that model code defines: not those of torch, nor of a library's base classes."""
    seen = {name for base in kind.__mro__ if _keeps_books(base) for name in vars(base)}
    for base in kind.__mro__:
        is_of_guard = "offloaded_kind" in vars(base)  # whose methods are those of the next one
        if not is_of_guard and not _keeps_books(base):
            for name, member in vars(base).items():
                if name not in seen and not name.startswith("_") and inspect.isfunction(member):
                    yield name
                seen.add(name)


def _keeps_books(kind: type) -> bool:
    return kind is object or f"{kind.__module__}.".startswith(_BOOKKEEPERS)


def _as_a_pass(engine: Engine, name: str) -> Callable[..., Any]:
    def begin(current: Engine, frame: FrameType) -> bool:
        if name == "forward" and current.is_inside():
            return False
        current.begin(name, frame=frame)
        return True

    return _around(engine, name, begin, lambda current, has_begun: current.end(name) if has_begun else None)


def _armed(engine: Engine, name: str) -> Callable[..., Any]:
    return _around(
        engine, name, lambda current, frame: current.arm(name, frame), lambda current, call: current.disarm(call)
    )


def _around(
    engine: Engine, name: str, begin: Callable[[Engine, FrameType], Any], end: Callable[[Engine, Any], None]
) -> Callable[..., Any]:
    """Return what `hooks.wrap_method` puts around a method; the compiler sees the method alone."""

    @hooks.hidden_from_compiler
    def before(frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Engine | None, Any, Call]:
        current = engine.owner.current_engine()
        if current is None:  # the offloading was removed, and somebody still has the wrapper
            return None, None, (args, kwargs)
        return current, begin(current, frame), current.moved(args, kwargs)

    @hooks.hidden_from_compiler
    def after(current: Engine | None, state: Any) -> None:
        if current is not None:
            end(current, state)

    @hooks.hidden_from_compiler
    def given(output: Any, current: Engine | None) -> Any:
        return output if current is None else _given(output, current, name)

    def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current, state, (args, kwargs) = before(sys._getframe(), args, kwargs)  # noqa: SLF001 (see `passes`)
        try:
            return given(method(*args, **kwargs), current)
        finally:
            after(current, state)

    return around


def _given(output: Any, engine: Engine, name: str) -> Any:
    if isinstance(output, GeneratorType):
        return _in_passes(output, engine, name)
    return with_tensors(output, engine.given)


def _in_passes(steps: Generator[Any, Any, Any], engine: Engine, name: str) -> Generator[Any, Any, Any]:
    """Run each step of a generator in a pass of its own: between two steps the device may be used for other calls.

    Those may leave another engine, or none.
    """
    given: Any = None
    while True:
        current = engine.owner.current_engine()
        if current is not None:
            current.begin(name, frame=sys._getframe())  # noqa: SLF001 (see `passes`)
        try:
            value = steps.send(given)
            if current is not None:
                value = with_tensors(value, current.given)
        except StopIteration as stop:
            return stop.value
        finally:
            if current is not None:
                current.end(name)
        given = yield value
