"""diffusers-mm 0.4.0: a manager of components, here of one; `auto` looks at the free memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes, resting_bytes

PACKAGE = "diffusers-mm"
MODULES = ("diffusers_mm", "diffusers.hooks.group_offloading")
WAYS: dict[str, dict[str, Any]] = {
    "auto": {"strategy": "auto"},
    "group": {"strategy": "group_offload"},
    "block_pin": {"strategy": "block_pin"},
    "model": {"strategy": "model_offload"},
}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Register the module with a manager and let it apply its strategy."""
    budget = options.pop("budget_bytes")
    from diffusers_mm import ModelManager

    if device.type == "cpu":
        options["group_offload_use_stream"] = False
    elif budget is not None:
        options |= _for_card(budget, device)
    moved = held_bytes(module)
    manager = ModelManager(**options)
    manager.register_components({"transformer": module})
    chosen = manager.apply_offload_strategy(device)
    return Applied(
        call=module,
        moved_bytes=lambda: moved if device.type == "cpu" else resting_bytes(module, device),
        notes=lambda: {"strategy": chosen},
        remove=manager.clear,
    )


def _for_card(budget_bytes: int, device: torch.device) -> dict[str, Any]:
    """Tell it of an emulated card, by its own options: CUDA, which it asks for the free memory, knows of the real one.

    What the real card has more is room that it has to leave free beside weights, and its factor grows by as much as that.
    """
    from diffusers_mm import ModelManager

    free, _total = torch.cuda.mem_get_info(device)
    wanted = max(1, min(free, budget_bytes - torch.cuda.memory_reserved(device)))
    return {
        "auto_block_pin_working_set_gb": ModelManager.AUTO_BLOCK_PIN_WORKING_SET_GB + (free - wanted) / 2**30,
        "auto_model_offload_factor": ModelManager.AUTO_MODEL_OFFLOAD_FACTOR * free / wanted,
    }
