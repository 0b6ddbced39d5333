"""Everything on the device: what the others are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes

PACKAGE = None
MODULES: tuple[str, ...] = ()
WAYS: dict[str, dict[str, Any]] = {"": {}}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Move the module."""
    del options  # it has none
    module.to(device)
    return Applied(call=module, notes=lambda: {"weights_bytes": held_bytes(module)})
