"""Native module hooks: attach work around a module's forward, find it again, take it away without a trace.

Nothing here replaces ``forward``: a wrapped forward breaks ``torch.compile(fullgraph=True)`` and shadows what others attach.
Methods that bypass forward hooks (``decode``, ``encode``, ``generate``) are wrapped on the instance, which `remove` undoes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

__all__ = ["Attachment", "ModuleHook", "attach", "attached", "mark", "marks", "prepare", "wrap_method"]

_MARK = "__vramkit_hook__"
_REASON = (
    "vramkit moves weights here, which a compiled graph cannot contain. Offload at block level and compile the blocks "
    "(`for block in model.blocks: block.compile(fullgraph=True)`), or compile without fullgraph."
)


class ModuleHook:
    """Work around one module's forward. Subclasses override what they need.

    ``pre_forward`` may return new ``(args, kwargs)``; ``post_forward`` also runs when the forward raised an ``Exception``
    (output is then None), but not after a ``KeyboardInterrupt``: whatever it undoes must also be undone elsewhere.
    """

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before the forward; return replaced arguments, or None to leave them as they are."""

    def post_forward(self, module: nn.Module) -> None:
        """Run after the forward, whether it returned or raised."""


class Attachment:
    """What `attach` and `wrap_method` return: `remove` undoes it, once or more often."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo the attachment; later calls do nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def _hidden_from_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    # Importing dynamo takes more than a second, so it happens when hooks are attached, not with `import vramkit`.
    options = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
    return cast("Callable[..., Any]", torch.compiler.disable(function, **options))  # type: ignore[no-untyped-call]


def prepare() -> None:
    """Import what `attach` needs. Call it before there is device memory.

    The import leaves tracebacks behind, which keep the frames of its callers and what they hold until garbage is collected.
    """
    _hidden_from_compiler(prepare)


def attach(module: nn.Module, hook: ModuleHook) -> Attachment:
    """Run `hook` around every forward of `module`, before other pre-hooks and after the forward in any case."""

    def before(mod: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return hook.pre_forward(mod, args, kwargs)

    def after(mod: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        hook.post_forward(mod)

    pre, post = _hidden_from_compiler(before), _hidden_from_compiler(after)
    setattr(pre, _MARK, hook)
    handles = (
        module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True),
        module.register_forward_hook(post, always_call=True),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return Attachment(undo)


HookT = TypeVar("HookT", bound=ModuleHook)


def attached(module: nn.Module, kind: type[HookT]) -> Iterator[HookT]:
    """Yield the hooks of class `kind` on this module (not on its children)."""
    for function in module._forward_pre_hooks.values():  # noqa: SLF001 (torch offers no public reader)
        hook = getattr(function, _MARK, None)
        if isinstance(hook, kind):
            yield hook


def mark(module: nn.Module, owner: object, before_state_dict: Callable[[], None]) -> Attachment:
    """Note on `module` that `owner` manages it, at no cost to its forward, and be told when a state dict is taken."""

    def note(*_arguments: object) -> None:
        before_state_dict()

    setattr(note, _MARK, owner)
    handle = module.register_state_dict_pre_hook(note)  # type: ignore[no-untyped-call]
    return Attachment(handle.remove)


def marks(module: nn.Module) -> Iterator[object]:
    """Yield the owners that were noted on this module by `mark`."""
    for function in module._state_dict_pre_hooks.values():  # noqa: SLF001 (torch offers no public reader)
        owner = getattr(function, _MARK, None)
        if owner is not None:
            yield owner


def wrap_method(module: nn.Module, name: str, around: Callable[..., Any]) -> Attachment:
    """Replace ``module.name`` on the instance by ``around(method, *args, **kwargs)``; the class is left alone."""
    method = getattr(module, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    had_own = name in vars(module)
    module.__dict__[name] = _hidden_from_compiler(wrapper)

    def undo() -> None:
        if had_own:
            module.__dict__[name] = method
        else:
            module.__dict__.pop(name, None)

    return Attachment(undo)
