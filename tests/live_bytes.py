"""Bytes that a computation holds at its peak, counted on the meta device, where full sizes cost no memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, and their peak; views of existing tensors are not counted."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak_bytes = self.live_bytes = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def forget() -> None:
            self.known.remove(key)
            self.live_bytes -= size_bytes

        self.known.add(key)
        self.live_bytes += size_bytes
        weakref.finalize(storage, forget)


class FusedAttention(TorchFunctionMode):
    """Attention that keeps no scores, as the kernels of a device do; the meta device takes it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def peak_bytes(call: Callable[[], object], existing: Iterable[torch.Tensor] = (), *, fused: bool = False) -> int:
    """The most bytes that were alive at once among those that a call made, with `fused` attention."""
    with LiveBytes(existing) as count, torch.no_grad(), FusedAttention() if fused else contextlib.nullcontext():
        call()
    return count.peak_bytes
