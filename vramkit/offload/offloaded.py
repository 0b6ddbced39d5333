"""Which modules are offloaded, and by whom."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from vramkit import hooks
from vramkit.errors import ConflictError
from vramkit.offload.call_hooks import PassHook
from vramkit.offload.config import refuse_no_module
from vramkit.offload.engine import Engine
from vramkit.offload.handle import Offload

__all__ = ["editable", "offload_of", "refuse_part_of_offloaded"]


def offload_of(module: nn.Module) -> Offload | None:
    """Return the handle of an offloaded `module`, or None.

    Raises:
        ConfigError: it is no module.
    """
    refuse_no_module(module)
    for hook in hooks.attached(module, PassHook):
        if isinstance(hook.engine.owner, Offload):
            return hook.engine.owner
    return None


@contextlib.contextmanager
def editable(module: nn.Module) -> Iterator[None]:
    """Open every offloaded part of `module` for changes: `Offload.edit` of whatever is offloaded, itself or below it."""
    with contextlib.ExitStack() as stack:
        for part in list(module.modules()):
            offload = offload_of(part)
            if offload is not None:
                stack.enter_context(offload.edit())
        yield


def refuse_part_of_offloaded(module: nn.Module) -> None:
    """Raise ConflictError where a part of `module` belongs to a larger module that is offloaded."""
    covered = {part for root in module.modules() if offload_of(root) is not None for part in root.modules()}
    for name, part in module.named_modules():
        if part not in covered and any(isinstance(owner, Engine) for owner in hooks.marks(part)):
            raise ConflictError(
                f"{name or type(module).__name__} belongs to a larger module that is offloaded; change it inside "
                "`with offload_of(that module).edit():`, or change that module"
            )
