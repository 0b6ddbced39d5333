"""Native module hooks: attach work around a module's forward, find it again, take it away without a trace.

Nothing here replaces ``forward``: a wrapped forward breaks ``torch.compile(fullgraph=True)`` and shadows what others attach.
One class is an exception, because it looks for hooks on itself. Methods that bypass forward hooks (``decode``, ``encode``,
``generate``) are wrapped on the instance, which `remove` undoes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

__all__ = [
    "Attachment",
    "ModuleHook",
    "attach",
    "attached",
    "hidden_from_compiler",
    "mark",
    "marks",
    "prepare",
    "set_attribute",
    "strip",
    "without_attachments",
    "wrap_method",
]

_MARK = "__vramkit_hook__"
_AROUND = "__vramkit_around__"
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

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Run after the forward, whether it returned or raised; return what takes the place of the output, or None."""


class Attachment:
    """What `attach`, `mark` and `wrap_method` return: `remove` undoes it, or what was done of it, once or more often.

    They note it in `record` before they do anything, so that an interrupt in the middle leaves nothing that nobody knows.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo the attachment; later calls do nothing."""
        if self._undo is not None:
            self._undo()
        self._undo = None


def hidden_from_compiler(function: Callable[..., Any], *, recursive: bool = True) -> Callable[..., Any]:
    """Keep `function` out of compiled graphs; what it calls too if `recursive`."""
    # Importing dynamo takes more than a second, so it happens when hooks are attached, not with `import vramkit`.
    options = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
    hidden = torch.compiler.disable(function, recursive=recursive, **options)  # type: ignore[no-untyped-call]
    return cast("Callable[..., Any]", hidden)


def prepare() -> None:
    """Import what `attach` needs. Call it before there is device memory.

    The import leaves tracebacks behind, which keep the frames of its callers and what they hold until garbage is collected.
    """
    hidden_from_compiler(prepare)


def attach(module: nn.Module, hook: ModuleHook, record: list[Attachment] | None = None) -> Attachment:
    """Run `hook` around every forward of `module`, before other pre-hooks and after the forward in any case."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return _attach_to_forward(module, hook, record)

    pre, post = hidden_from_compiler(hook.pre_forward), hidden_from_compiler(hook.post_forward)
    setattr(pre, _MARK, hook)
    setattr(post, _MARK, hook)
    attachment = _recorded(functools.partial(_take_off, module, (pre, post)), record)
    module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True)
    module.register_forward_hook(post, always_call=True)
    return attachment


def _attach_to_forward(module: nn.Module, hook: ModuleHook, record: list[Attachment] | None) -> Attachment:
    """Wrap the forward: torch's encoder layer leaves its fused kernel, and its numbers, where it sees a hook on itself."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, args, kwargs) or (args, kwargs)
        try:
            output = forward(*args, **kwargs)
        except Exception:
            hook.post_forward(module, args, None)
            raise
        replaced = hook.post_forward(module, args, output)
        return output if replaced is None else replaced

    setattr(around, _MARK, hook)
    return wrap_method(module, "forward", around, record)


HookT = TypeVar("HookT", bound=ModuleHook)


def attached(module: nn.Module, kind: type[HookT]) -> Iterator[HookT]:
    """Yield the hooks of class `kind` on this module (not on its children)."""
    functions: list[Any] = list(module._forward_pre_hooks.values())  # noqa: SLF001 (torch offers no public reader)
    wrapper = vars(module).get("forward")
    while wrapper is not None:
        functions.append(getattr(wrapper, _AROUND, None))
        wrapper = getattr(wrapper, "__wrapped__", None)
    for function in functions:
        hook = getattr(function, _MARK, None)
        if isinstance(hook, kind):
            yield hook


def mark(
    module: nn.Module, owner: object, before_state_dict: Callable[[], None], record: list[Attachment] | None = None
) -> Attachment:
    """Note on `module` that `owner` manages it, at no cost to its forward, and be told when a state dict is taken."""

    def note(*_arguments: object) -> None:
        before_state_dict()

    setattr(note, _MARK, owner)
    attachment = _recorded(functools.partial(_take_off, module, (note,)), record)
    module.register_state_dict_pre_hook(note)  # type: ignore[no-untyped-call]
    return attachment


def marks(module: nn.Module) -> Iterator[object]:
    """Yield the owners that were noted on this module by `mark`."""
    for function in module._state_dict_pre_hooks.values():  # noqa: SLF001 (torch offers no public reader)
        owner = getattr(function, _MARK, None)
        if owner is not None:
            yield owner


def wrap_method(
    module: nn.Module, name: str, around: Callable[..., Any], record: list[Attachment] | None = None
) -> Attachment:
    """Replace ``module.name`` on the instance by ``around(method, *args, **kwargs)``; the class is left alone.

    Whoever took the wrapper, or wrapped it in turn, calls `around` also after this is undone.
    """
    method = getattr(module, name)
    what = around
    around = hidden_from_compiler(around, recursive=False)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    hidden = hidden_from_compiler(wrapper, recursive=False)
    setattr(hidden, _AROUND, what)
    return set_attribute(module, name, hidden, record)


def set_attribute(
    module: nn.Module, name: str, value: Callable[..., Any], record: list[Attachment] | None = None
) -> Attachment:
    """Give the instance `module` an attribute that hides what its class has; undone unless somebody changed it since."""
    had_own = name in vars(module)
    before = vars(module).get(name)
    setattr(value, _MARK, True)

    def undo() -> None:
        if vars(module).get(name) is not value:
            return  # never put there, or somebody else's by now
        if had_own:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]

    attachment = _recorded(undo, record)
    module.__dict__[name] = value
    return attachment


def without_attachments(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module without those that `set_attribute` gave it."""
    return {name: value for name, value in attributes.items() if not hasattr(value, _MARK)}


def strip(copied: nn.Module) -> None:
    """Take everything of vramkit off a module that was copied with it."""
    for name in vars(copied).keys() - without_attachments(vars(copied)).keys():
        del copied.__dict__[name]
    held = (copied._forward_pre_hooks, copied._forward_hooks, copied._state_dict_pre_hooks)  # noqa: SLF001
    _take_off(copied, [function for each in held for function in each.values() if hasattr(function, _MARK)])


def _recorded(undo: Callable[[], None], record: list[Attachment] | None) -> Attachment:
    attachment = Attachment(undo)
    if record is not None:
        record.append(attachment)
    return attachment


def _take_off(module: nn.Module, functions: Sequence[Callable[..., Any]]) -> None:
    """Remove hooks by what they are: their handles are lost where registering them was interrupted."""
    for held in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):  # noqa: SLF001
        for key in [key for key, function in held.items() if any(function is ours for ours in functions)]:
            for notes in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):  # noqa: SLF001
                notes.pop(key, None)
            del held[key]
