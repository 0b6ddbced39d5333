"""Copies of weights in another dtype, which ``torch.autocast`` keeps until it ends: of weights that ask for gradients."""

from __future__ import annotations

import torch

__all__ = ["are_kept_of", "forget_casts"]


def are_kept_of(tensor: torch.Tensor) -> bool:
    """Tell whether autocast would keep a copy of `tensor`, a weight on the device, as large as half of it."""
    return tensor.dtype == torch.float32 and tensor.ndim > 1 and _keeps(tensor.device.type)


def forget_casts(device_type: str) -> None:
    """Let go of what autocast keeps of weights on such devices, which leave: else it had a copy of the whole module."""
    if _keeps(device_type):
        torch.clear_autocast_cache()


def _keeps(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type) and torch.is_autocast_cache_enabled()
