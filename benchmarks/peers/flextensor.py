"""flextensor 0.5.0: `offload`, which looks at passes and measures some before it plans.

Those passes belong to its set-up. Its budget is for weights alone: a share of the card, the rest of which is for what
the passes need. It knows CUDA alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes, move_held

PACKAGE = "flextensor"
MODULES = ("flextensor",)
_DISCOVERY, _PROFILING = 1, 5
_SHARE = 0.25
_LEAST_BYTES = 1600 * 2**20  # two blocks of the 14B shape
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {"num_blocks": 4, "min_blocks": 2},  # as in its example for Wan
    "two blocks": {"num_blocks": 2, "min_blocks": 2},
}


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Offload the block lists of the module; the rest is put on the device, as its guide says.

    Raises:
        RuntimeError: without a CUDA device.
    """
    if device.type != "cuda":
        raise RuntimeError("flextensor pins memory and measures transfers by CUDA; there is no CUDA device")
    import flextensor

    budget = options.pop("budget_bytes")
    if budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        options["max_gpu_mem_fraction"] = min(1.0, max(_LEAST_BYTES, _SHARE * budget) / total)
    lists = _block_lists(module)
    whole = held_bytes(module)
    config = flextensor.OffloadConfig(
        gpu_device=device.index or 0,
        include_patterns=[f"{name}.*" for name in lists],
        discovery_iters=_DISCOVERY,
        profiling_iters=_PROFILING,
        **options,
    )
    _move_rest(module, lists, device)
    patched = flextensor.offload(module, config=config)

    def told() -> dict[str, Any]:
        usage = flextensor.get_gpu_memory_usage()
        return {"usage": str(usage)}

    return Applied(
        call=patched,
        moved_bytes=lambda: max(0, whole - flextensor.get_gpu_memory_usage().unmapped_tensors_bytes),
        notes=told,
        passes=flextensor.get_offload_manager().iters_before_inference + 1,
        remove=flextensor.release,
    )


def _block_lists(module: nn.Module) -> list[str]:
    """Name the outermost lists of blocks."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _move_rest(module: nn.Module, lists: list[str], device: torch.device) -> None:
    """Put what is in none of the lists on the device."""
    inside = tuple(f"{outer}." for outer in lists)
    move_held((part for name, part in module.named_modules() if not f"{name}.".startswith(inside)), device)
