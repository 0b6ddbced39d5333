"""Libraries that run a module larger than its device, each in a file: what it is called, its options, how it is put on.

A file has ``PACKAGE`` (the distribution that tells the version), ``MODULES`` (what has to be imported to put it on),
``WAYS`` (its options by name) and ``apply(module, device, options)``, which returns an `Applied` or raises what the
library raises: that becomes a row.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vramkit.errors import UnsupportedTensorError
from vramkit.memory import module_bytes

__all__ = [
    "PEERS", "Applied", "apply", "held_bytes", "importable", "move_held", "peer_of", "resting_bytes", "versions", "ways",
]  # fmt: skip

PEERS = ("resident", "vramkit", "diffusers", "accelerate", "mmgp", "flextensor", "diffusers-mm", "cache-dit")


@dataclasses.dataclass(kw_only=True)
class Applied:
    """A module under a library."""

    call: Callable[..., Any]
    """What is called in the module's place."""
    moved_bytes: Callable[[], int] = lambda: 0
    """Bytes of one pass, as the library counts them; those of all weights where it counts nothing."""
    notes: Callable[[], dict[str, Any]] = dict
    """More that the library tells of itself, after the passes."""
    passes: int = 0
    """Passes that belong to the set-up: the library measures them to decide."""
    remove: Callable[[], Any] | None = None
    """Takes the library off again; None where it cannot be."""


def peer_of(way: str) -> str:
    """Return the name of the library of a way."""
    return way.split(" ", maxsplit=1)[0]


def ways(names: tuple[str, ...] = PEERS) -> list[str]:
    """Return every way of these libraries, ``"diffusers leaf stream"``."""
    return [f"{name} {way}".strip() for name in names for way in _file(name).WAYS]


def apply(
    way: str, module: nn.Module, device: torch.device, *, budget_bytes: int | None = None, **more: Any
) -> Applied:
    """Put `module` under the library and options that `way` names.

    `budget_bytes` is what the card has, for libraries that ask; `more` are further options of that library.

    Raises:
        ValueError: there is no such way.
        ImportError: the library is not installed. Others: as the library.
    """
    name, _, which = way.partition(" ")
    known: Mapping[str, dict[str, Any]] = _file(name).WAYS
    if which not in known:
        raise ValueError(f"{name} has no way {which!r}; there are {', '.join(map(repr, known))}")
    applied: Applied = _file(name).apply(module, device, known[which] | {"budget_bytes": budget_bytes} | more)
    return applied


def importable(way: str) -> None:
    """Import the library of a way, which takes seconds that no figure contains.

    A module is loaded before that: a library may put its own functions in the place of those that load files.

    Raises:
        ImportError: it is not installed.
    """
    for name in _file(peer_of(way)).MODULES:
        importlib.import_module(name)


def versions() -> dict[str, str | None]:
    """Return the version of every library that is compared, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PEERS:
        package = _file(name).PACKAGE
        if package is not None:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = None
    return found


def move_held(parts: Iterable[nn.Module], device: torch.device) -> None:
    """Put what these modules hold themselves, not in their children, on `device`; tied weights stay tied."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for part in parts:
        for key, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.to(device), requires_grad=False)
                part._parameters[key] = moved[parameter]  # type: ignore[assignment]
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else buffer.to(device)


def resting_bytes(module: nn.Module, device: torch.device) -> int:
    """Count the bytes of a module that are not on `device` now: between passes, those that each pass has to move."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != device.type)


def held_bytes(module: nn.Module) -> int:
    """Count the bytes of a module, also of one with bitsandbytes' own parameters."""
    try:
        return module_bytes(module)
    except UnsupportedTensorError:
        states = (getattr(parameter, "quant_state", None) for parameter in module.parameters())
        scales: int = sum(state.absmax.nbytes for state in states if state is not None)
        return scales + sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _file(name: str) -> Any:
    if name not in PEERS:
        raise ValueError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    return importlib.import_module(f"benchmarks.peers.{name.replace('-', '_')}")
