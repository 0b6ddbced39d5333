"""diffusers: group offloading by blocks and leaves with its options, layerwise casting on top, whole models in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers import Applied, held_bytes

PACKAGE = "diffusers"
MODULES = ("diffusers.hooks",)
_BLOCK: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
_LEAF: dict[str, Any] = {"offload_type": "leaf_level"}
_STREAM: dict[str, Any] = {"use_stream": True}
WAYS: dict[str, dict[str, Any]] = {
    "block": _BLOCK,
    "block stream": _BLOCK | _STREAM,
    "leaf": _LEAF,
    "leaf stream": _LEAF | _STREAM,
    "leaf stream record": _LEAF | _STREAM | {"record_stream": True, "non_blocking": True},
    "leaf stream low-cpu": _LEAF | _STREAM | {"low_cpu_mem_usage": True},
    "casting leaf stream": _LEAF | _STREAM | {"storage_dtype": torch.float8_e4m3fn},
    "model": {},
}
_SKIPPED = ("patch_embedding", "condition_embedder", "norm", "proj_out$")


def apply(module: nn.Module, device: torch.device, options: dict[str, Any]) -> Applied:
    """Attach its hooks. Streams are left out on the CPU, where it refuses them."""
    options.pop("budget_bytes")
    if "offload_type" not in options:
        return _model_offload(module, device)
    from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

    storage = options.pop("storage_dtype", None)
    if storage is not None:
        apply_layerwise_casting(module, storage, torch.bfloat16, skip_modules_pattern=_SKIPPED)
    moved = held_bytes(module)
    if device.type == "cpu":
        options = {name: value for name, value in options.items() if name in ("offload_type", "num_blocks_per_group")}
    apply_group_offloading(module, onload_device=device, offload_device=torch.device("cpu"), **options)
    return Applied(call=module, moved_bytes=lambda: moved, remove=lambda: _remove(module))


def _remove(module: nn.Module) -> None:
    from diffusers.hooks import HookRegistry

    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if isinstance(registry, HookRegistry):
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)
    module.to("cpu")


def _model_offload(module: nn.Module, device: torch.device) -> Applied:
    """What `enable_model_cpu_offload` does to each component: on the device for its call, then off."""
    from accelerate import cpu_offload_with_hook

    moved = held_bytes(module)
    module, hook = cpu_offload_with_hook(module, device)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = module(*args, **kwargs)
        hook.offload()
        return result

    return Applied(call=call, moved_bytes=lambda: moved, remove=hook.remove)
