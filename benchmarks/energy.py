"""How much energy a device has used, as the driver counts it."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["joules"]

_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver; its calls and units: docs.nvidia.com/deploy/nvml-api


def joules(device: torch.device) -> float | None:
    """Return the joules that `device` has used since its driver was loaded; None where nobody tells."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL(_LIBRARY)
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    except (OSError, AttributeError):  # no such library, or a torch that does not tell
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1000
