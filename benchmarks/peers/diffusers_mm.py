"""diffusers-mm 0.4.0: a manager of components, here of one; `auto` looks at the free memory."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes

PACKAGE = "diffusers-mm"
WAYS: dict[str, dict[str, Any]] = {
    "auto": {"strategy": "auto"},
    "group": {"strategy": "group_offload"},
    "block_pin": {"strategy": "block_pin"},
    "model": {"strategy": "model_offload"},
}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Register the module with a manager and let it apply its strategy.

    It is told the free memory of the device by CUDA, which does not know of an emulated card: ``"auto"`` chooses for
    the real one, and that it then runs out of memory is what its row says.
    """
    options.pop("budget_bytes")
    from diffusers_mm import ModelManager

    logging.getLogger("diffusers_mm").setLevel(logging.ERROR)
    moved = held_bytes(module)
    if device.type == "cpu":
        options["group_offload_use_stream"] = False
    manager = ModelManager(**options)
    manager.register_components({"transformer": module})
    chosen = manager.apply_offload_strategy(device)
    streams = chosen in ("group_offload", "model_offload", "block_pin")
    return Applied(
        call=module,
        moved_bytes=lambda: moved if streams else 0,
        notes=lambda: {"strategy": chosen},
        remove=manager.clear,
    )
