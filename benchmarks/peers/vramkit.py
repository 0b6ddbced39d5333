"""This library: group offloading by blocks and by leaves, from files where the weights are files, and under a budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied
from vramkit.offload import Offload, apply_group_offloading, offload_of
from vramkit.planning import fit

PACKAGE = "vramkit"
MODULES = ("torch._dynamo",)  # for `torch.compiler.disable`
_SHARE = 0.9  # of a card whose budget nobody gave
WAYS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "leaf": {"offload_type": "leaf_level"},
    "disk": {"offload_type": "leaf_level", "store": "disk"},
    "pageable": {"offload_type": "leaf_level", "store": "pageable"},
    "fit": {},
}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Offload the module; ``"fit"`` plans for the budget and for the inputs under ``"example"``."""
    budget, example = options.pop("budget_bytes"), options.pop("example", None)
    if "offload_type" in options:
        return _applied(module, apply_group_offloading(module, device, **options))
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**30
    fitted = fit(module, vram=budget or int(_SHARE * card), device=device, example=example, **options)

    def told() -> dict[str, Any]:
        return {"plan": str(fitted.plan)}

    offload = offload_of(module)
    base = Applied(call=module) if offload is None else _applied(module, offload)
    base.notes, base.remove = told, fitted.remove
    return base


def _applied(module: nn.Module, offload: Offload) -> Applied:
    def told() -> dict[str, Any]:
        stats = offload.stats()
        return {
            "groups": stats.groups, "slots": stats.slots, "slot_bytes": stats.slot_bytes, "stores": stats.stores,
            "resident_bytes": stats.resident_bytes, "locked_bytes": stats.pinned_bytes, "stall_s": round(stats.stall_s, 4),
            "demand_loads": stats.demand_loads,
        }  # fmt: skip

    return Applied(call=module, moved_bytes=lambda: offload.stats().streamed_bytes, notes=told, remove=offload.remove)
