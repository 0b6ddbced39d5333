"""mmgp 3.8.2: `offload.all` on one transformer, unquantized, pinned, with a budget for what it keeps on the device.

Its hooks know CUDA alone; the budget of a model is in MB, of which it takes twice as much while it loads ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes

PACKAGE = "mmgp"
MODULES = ("mmgp.offload",)
WAYS: dict[str, dict[str, Any]] = {
    "pinned": {"pinnedMemory": True, "share": 0.25},
    "pageable": {"pinnedMemory": False, "share": 0.25},
}
_LEAST_MB = 800  # about a block of the 14B shape
_NAME = "transformer"


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Let it take the module as a pipeline of one transformer.

    Raises:
        RuntimeError: without a CUDA device, where its streams cannot be made.
    """
    if device.type != "cuda":
        raise RuntimeError("mmgp moves weights by CUDA streams; there is no CUDA device")
    from mmgp import offload

    whole, budget, share = held_bytes(module), options.pop("budget_bytes"), options.pop("share")
    limit_mb = _LEAST_MB if budget is None else max(_LEAST_MB, int(budget * share / 2**20))
    for part in module.modules():  # else it rounds weights and inputs of fp32
        part._lock_dtype = torch.float32  # type: ignore[assignment]
    handle = offload.all(
        {_NAME: module},
        quantizeTransformer=False,
        budgets={_NAME: limit_mb},
        verboseLevel=0,
        **options,
    )
    kept = handle.blocks_of_modules_sizes[_NAME] + sum(handle.preloaded_blocks_per_model[_NAME].values())
    return Applied(
        call=module,
        moved_bytes=lambda: max(0, whole - kept),
        notes=lambda: {"budget_mb": limit_mb, "kept_bytes": kept},
        remove=handle.release,
    )
