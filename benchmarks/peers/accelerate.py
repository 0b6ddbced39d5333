"""accelerate: `cpu_offload`, which is sequential offloading layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes

PACKAGE = "accelerate"
MODULES = ("accelerate",)
WAYS: dict[str, dict[str, Any]] = {"cpu_offload": {}}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Attach its hooks."""
    del options  # it has none
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    moved = held_bytes(module)
    cpu_offload(module, execution_device=device)
    return Applied(call=module, moved_bytes=lambda: moved, remove=lambda: remove_hook_from_submodules(module))
