"""That all ranks have the same: versions, options, files, calls. What differs is refused on all before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vramkit import tensors
from vramkit.distributed.ranks import Ranks
from vramkit.errors import ConfigError

__all__ = ["agree", "describe", "fingerprint"]

_SAMPLE_BYTES = 64


def agree(ranks: Ranks, options: Mapping[str, Any]) -> None:
    """Compare `options`, whose values are plain, with those of the first rank.

    Raises:
        ConfigError: on all ranks the same one, which names the first rank that differs, and in what.
    """
    said = ranks.collect({name: str(value) for name, value in options.items()})
    for rank, theirs in enumerate(said):
        for name in {**said[0], **theirs}:
            if theirs.get(name) != said[0].get(name):
                raise ConfigError(
                    f"ranks differ in the {name.removesuffix('=')}: rank {ranks.members[0]} has {said[0].get(name)}, rank "
                    f"{ranks.members[rank]} has {theirs.get(name)}; start all with the same versions, options and files"
                )


def fingerprint(module: nn.Module) -> str:
    """Return a digest of names, dtypes, shapes and strides of a module's tensors, and of some bytes of each.

    Of a file in which all values differ a little all samples do; one in which a few values of a tensor were changed by hand
    may have the same fingerprint.
    """
    digest = hashlib.sha256()
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(named):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for leaf in tensors.leaves(tensor.detach()):
            digest.update(str(leaf.stride() if leaf.layout == torch.strided else leaf.layout).encode())
            digest.update(_samples(leaf))
    return digest.hexdigest()[:16]


def _samples(leaf: torch.Tensor) -> bytes:
    """Return bytes from the beginning, the middle and the end of a dense tensor."""
    if leaf.is_meta or leaf.numel() == 0 or not tensors.is_dense(leaf):
        return b""
    memory = tensors.byte_view(leaf)
    middle = memory.numel() // 2
    parts = (memory[:_SAMPLE_BYTES], memory[middle : middle + _SAMPLE_BYTES], memory[-_SAMPLE_BYTES:])
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def describe(value: Any) -> str:
    """Return what tells an argument from another: plain values as they are, tensors and pictures by their bytes."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {describe(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value)
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, torch.Tensor):
        kind = f"{kind} {value.dtype} {tuple(value.shape)}"
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    # Arrays and pictures have their bytes; what has none (a callback) nobody can compare.
    content = value.tobytes() if callable(getattr(value, "tobytes", None)) else b""
    return f"{kind} {hashlib.sha256(content).hexdigest()[:16]}"
