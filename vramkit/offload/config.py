"""The options of group offloading, validated before anything is changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from vramkit.errors import ConfigError
from vramkit.memory import parse_bytes
from vramkit.offload.partition import Granularity
from vramkit.offload.stores import StoreKind

__all__ = ["OffloadConfig"]

_ENTRY_POINTS = ("encode", "decode", "generate")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """How one module is offloaded. `apply_group_offloading` documents the options."""

    device: torch.device
    granularity: Granularity
    blocks_per_group: int = 1
    block_names: tuple[str, ...] | None = None
    slots: int = 2
    unit_bytes: int | None = None
    resident_bytes: int = 0
    store: StoreKind | None = None
    disk_folder: Path | None = None
    direct_io: bool = False
    pin_budget_bytes: int | None = None
    entry_points: tuple[str, ...] = ()
    unmoved_kwargs: frozenset[str] = frozenset()

    @classmethod
    def from_options(
        cls,
        module: nn.Module,
        *,
        onload_device: torch.device | str,
        offload_type: str,
        offload_device: torch.device | str = "cpu",
        num_blocks_per_group: int | None = None,
        use_stream: bool | None = None,
        offload_to_disk_path: str | os.PathLike[str] | None = None,
        block_modules: Sequence[str] | None = None,
        exclude_kwargs: Sequence[str] | None = None,
        slots: int | None = None,
        unit_bytes: int | str | None = None,
        resident: int | str = 0,
        store: str | None = None,
        direct_io: bool = False,
        pin_budget: int | str | None = None,
        entry_points: Sequence[str] | None = None,
    ) -> OffloadConfig:
        """Turn the options of the public call into a config.

        Raises:
            ConfigError: an option cannot be used; says what was given and what is possible.
        """
        if torch.device(offload_device).type != "cpu":
            raise ConfigError(
                f"offload_device={str(offload_device)!r}: weights rest in host memory or on disk; give 'cpu'"
            )
        if offload_to_disk_path is not None and store not in (None, "disk"):
            raise ConfigError(f"offload_to_disk_path goes with store='disk', not {store!r}; leave one of them out")
        return cls(
            device=_usable_device(onload_device),
            granularity=_choice("offload_type", offload_type, get_args(Granularity)),
            blocks_per_group=_at_least_one(
                "num_blocks_per_group", 1 if num_blocks_per_group is None else num_blocks_per_group
            ),
            block_names=None if block_modules is None else _submodules(module, block_modules),
            slots=_at_least_one("slots", _default_slots(offload_type, use_stream) if slots is None else slots),
            unit_bytes=None if unit_bytes is None else _at_least_one("unit_bytes", parse_bytes(unit_bytes)),
            resident_bytes=parse_bytes(resident),
            store=None if store is None else _choice("store", store, get_args(StoreKind)),
            disk_folder=None if offload_to_disk_path is None else _folder(offload_to_disk_path),
            direct_io=direct_io,
            pin_budget_bytes=None if pin_budget is None else parse_bytes(pin_budget),
            entry_points=_methods(module, entry_points),
            unmoved_kwargs=frozenset(exclude_kwargs or ()),
        )


def _default_slots(offload_type: str, use_stream: bool | None) -> int:
    # Single layers differ more than blocks do in compute per byte: a third slot bridges the ones that load for longer.
    return 1 if use_stream is False else 3 if offload_type == "leaf_level" else 2


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"onload_device={device!r} is not a device; give 'cuda', 'cuda:1', 'xpu' or 'cpu'") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type not in ("cuda", "xpu"):
        raise ConfigError(f"onload_device={str(device)!r}: streaming knows 'cuda', 'xpu' and 'cpu' (files to RAM)")
    api = getattr(torch, device.type)
    if not api.is_available() or (device.index or 0) >= api.device_count():
        count = api.device_count() if api.is_available() else 0
        raise ConfigError(
            f"onload_device={str(device)!r}, but this machine has {count} such devices; 'cpu' always works"
        )
    return torch.device(device.type, api.current_device() if device.index is None else device.index)


def _choice(option: str, given: str, possible: Sequence[str]) -> Any:
    if given not in possible:
        raise ConfigError(f"{option}={given!r}; expected one of {', '.join(map(repr, possible))}")
    return given


def _at_least_one(option: str, given: int) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"{option}={given!r}; expected a whole number of at least 1")
    return given


def _submodules(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ConfigError(f"block_modules={names!r}; expected a list of names such as [{names!r}]")
    known = {name for name, _ in module.named_modules()}
    for name in names:
        if name not in known:
            children = ", ".join(name for name, _ in module.named_children())
            raise ConfigError(
                f"block_modules names {name!r}, which {type(module).__name__} does not have; it has: {children}"
            )
    return tuple(names)


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"offload_to_disk_path={str(path)!r} is a file; give a folder (it is made when it is missing)"
        )
    return folder


def _methods(module: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(name for name in _ENTRY_POINTS if callable(getattr(module, name, None)))
    for name in names:
        if not callable(getattr(module, name, None)):
            raise ConfigError(f"entry_points names {name!r}, which is not a method of {type(module).__name__}")
    return tuple(names)
