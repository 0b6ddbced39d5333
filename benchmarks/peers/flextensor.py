"""flextensor 0.5.0: `offload`, which looks at passes and measures some before it plans.

A budget is a share of the card. Those passes belong to its set-up. It knows CUDA alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes

PACKAGE = "flextensor"
_DISCOVERY, _PROFILING = 1, 5
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {"num_blocks": 4},
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
        options["max_gpu_mem_fraction"] = min(1.0, budget / total)
    lists = _block_lists(module)
    moved = sum(held_bytes(module.get_submodule(name)) for name in lists)
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
        moved_bytes=lambda: moved,
        notes=told,
        passes=_DISCOVERY + _PROFILING + 1,
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
    for name, part in module.named_modules():
        if not any(f"{name}.".startswith(f"{outer}.") for outer in lists):
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[key] = nn.Parameter(parameter.to(device), requires_grad=False)
            for key, buffer in part._buffers.items():
                part._buffers[key] = None if buffer is None else buffer.to(device)
