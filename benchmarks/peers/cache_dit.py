"""cache-dit 1.5.3: layerwise offloading, as it is and with transfers beside the computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes, move_held

PACKAGE = "cache-dit"
MODULES = ("cache_dit.offload",)
WAYS: dict[str, dict[str, Any]] = {
    "layerwise": {},
    "layerwise async": {"async_transfer": True, "transfer_buckets": 2, "prefetch_limit": True},
}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Attach its hooks to the leaves that it chooses by itself; a budget bounds what is loaded ahead.

    What modules hold beside their children is none of its leaves, and stays where it was put: on the device.
    """
    budget = options.pop("budget_bytes")
    from cache_dit.offload import layerwise_offload

    if budget is not None and "async_transfer" in options:
        options["max_inflight_prefetch_bytes"] = budget // 4
    moved = held_bytes(module)
    move_held((part for part in module.modules() if [*part.children()]), device)
    handle = layerwise_offload(module, onload_device=device, **options)
    return Applied(call=module, moved_bytes=lambda: moved, remove=handle.remove)
