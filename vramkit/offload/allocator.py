"""Settings of torch's allocator, which belong to the process: nothing here is done unless somebody asks for it."""

from __future__ import annotations

import os

import torch

__all__ = ["PAGE_BYTES", "use_expandable_segments"]

_SETTING = "expandable_segments:True"
# What segments grow by: 20 MiB unless said otherwise, and what lies around a hole is given back by whole pages only.
PAGE_BYTES = 12 * 2**20  # torch wants more than 10 MiB; its versions before 2.10 know no other size
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments(device: torch.device | str) -> bool:
    """Let the memory that torch reserves on a CUDA device from now on grow and shrink by pages; tell if it does.

    Segments of a fixed size, which are the default, leave holes between activations of many sizes: 1.6 GiB of 5.5 reserved
    for a 14B transformer at 81 frames. Segments that grow leave fewer. What the user has set by an environment variable
    stands.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    asked = next(filter(None, (os.environ.get(name) for name in _VARIABLES)), None)
    if asked is not None:
        return _SETTING in asked
    if torch.cuda.get_allocator_backend() != "native" or torch.version.cuda is None:
        return False
    try:
        _set(f"{_SETTING},large_segment_size_mb:{PAGE_BYTES // 2**20}")
    except (RuntimeError, ValueError):
        _set(_SETTING)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what is free in segments of a fixed size would be taken first, and leave holes there
    return True


def _set(setting: str) -> None:
    new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # noqa: SLF001 (there is no public call)
    if new is not None:
        new(setting)
    else:
        torch.cuda.memory._set_allocator_settings(setting)  # noqa: SLF001
