"""The options of group offloading, validated before anything is changed."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from vramkit.errors import ConfigError
from vramkit.memory import parse_bytes
from vramkit.offload.partition import Granularity
from vramkit.offload.pinning import PinBudget
from vramkit.offload.stores import Sharing, StoreKind

__all__ = [
    "OffloadConfig",
    "device_count",
    "known_device",
    "refuse_no_module",
    "refuse_no_names",
    "usable_device",
]

_LEAST_HALVED_BYTES = 256 * 2**20
_ENTRY_POINTS = ("encode", "decode", "generate")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """How one module is offloaded. `apply_group_offloading` documents the options."""

    device: torch.device
    granularity: Granularity
    blocks_per_group: int | None = None
    block_names: tuple[str, ...] | None = None
    slots: int = 2
    unit_bytes: int | None = None
    resident_bytes: int = 0
    store: StoreKind | None = None
    disk_folder: Path | None = None
    direct_io: bool = False
    pin_budget: PinBudget | int | None = None
    entry_points: tuple[str, ...] = ()
    unmoved_kwargs: frozenset[str] = frozenset()
    mesh: Sharing | None = None
    peer_device: torch.device | None = None

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
        pin_budget: PinBudget | int | str | None = None,
        entry_points: Sequence[str] | None = None,
        mesh: Sharing | None = None,
        peer_device: torch.device | str | None = None,
    ) -> OffloadConfig:
        """Turn the options of the public call into a config.

        Raises:
            ConfigError: an option cannot be used; says what was given and what is possible.
        """
        if str(offload_device).partition(":")[0] != "cpu":
            raise ConfigError(
                f"offload_device={str(offload_device)!r}: weights rest in host memory; give 'cpu' (and "
                "offload_to_disk_path= for a disk)"
            )
        named = {"block_modules": block_modules, "exclude_kwargs": exclude_kwargs, "entry_points": entry_points}
        for option, names in named.items():
            refuse_no_names(option, names)
        for option, switch in {"use_stream": use_stream, "direct_io": direct_io}.items():
            if not isinstance(switch, bool | None):
                raise ConfigError(f"{option}={switch!r}; expected True or False")
        if mesh is not None and not hasattr(mesh, "prepare"):
            raise ConfigError(f"mesh={mesh!r}; expected what vramkit.distributed.connect() returns, or None")
        if offload_to_disk_path is not None and store not in (None, "disk"):
            raise ConfigError(f"offload_to_disk_path goes with store='disk', not {store!r}; leave one of them out")
        if offload_type == "leaf_level" and num_blocks_per_group is not None:
            warnings.warn(
                f"num_blocks_per_group={num_blocks_per_group} does nothing at leaf level, where units are cut by bytes; "
                "unit_bytes says how large they are",
                RuntimeWarning,
                stacklevel=3,
            )
        return cls(
            device=usable_device(onload_device),
            granularity=_choice("offload_type", offload_type, get_args(Granularity)),
            blocks_per_group=None
            if num_blocks_per_group is None
            else _at_least_one("num_blocks_per_group", num_blocks_per_group),
            block_names=None if block_modules is None else _submodules(module, block_modules),
            slots=_at_least_one("slots", _default_slots(offload_type, use_stream) if slots is None else slots),
            unit_bytes=None if unit_bytes is None else _at_least_one("unit_bytes", _size("unit_bytes", unit_bytes)),
            resident_bytes=_size("resident", resident),
            store=None if store is None else _choice("store", store, get_args(StoreKind)),
            disk_folder=None if offload_to_disk_path is None else _folder(offload_to_disk_path),
            direct_io=direct_io,
            pin_budget=pin_budget if isinstance(pin_budget, PinBudget | None) else _size("pin_budget", pin_budget),
            entry_points=_methods(module, entry_points),
            unmoved_kwargs=frozenset(exclude_kwargs or ()),
            mesh=mesh,
            peer_device=_peer(peer_device, store, onload_device, mesh),
        )

    def adapted(self, *, slots: int | None = None, resident: int | str | None = None) -> OffloadConfig:
        """Return this with other `slots` and `resident` bytes, where they are given.

        Raises:
            ConfigError: one of them cannot be used.
        """
        return dataclasses.replace(
            self,
            slots=self.slots if slots is None else _at_least_one("slots", slots),
            resident_bytes=self.resident_bytes if resident is None else _size("resident", resident),
        )

    def compared(self) -> dict[str, Any]:
        """Return, by name, what has to be the same on all ranks of a mesh: what decides how and when weights travel."""
        names = (
            "granularity",
            "blocks_per_group",
            "block_names",
            "slots",
            "unit_bytes",
            "resident_bytes",
            "entry_points",
        )
        return {f"{name}=": getattr(self, name) for name in names}

    def lesser(self, present_bytes: int) -> OffloadConfig | None:
        """Return what takes less memory, of weights of `present_bytes`, or None where nothing does.

        Slots beyond two go first, which cost the least time; then half of what stays; the overlap of loading goes last.
        """
        resident = min(self.resident_bytes, present_bytes)
        if self.granularity == "model_level":
            return None
        if self.slots > 2:
            return self.adapted(slots=2)
        if resident:
            return self.adapted(resident=resident // 2 if resident >= _LEAST_HALVED_BYTES else 0)
        return self.adapted(slots=1) if self.slots > 1 else None


def _default_slots(offload_type: str, use_stream: bool | None) -> int:
    # Single layers differ more than blocks do in compute per byte: a third slot bridges the ones that load for longer.
    return 1 if use_stream is False else 3 if offload_type == "leaf_level" else 2


def known_device(given: torch.device | str, option: str) -> torch.device:
    """Return a device of a kind that streaming knows, whether it is there or not.

    Raises:
        ConfigError: what `option` gave is none.
    """
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{option}={given!r} is not a device; give 'cuda', 'cuda:1', 'xpu' or 'cpu'") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type not in ("cuda", "xpu"):
        raise ConfigError(f"{option}={str(device)!r}: streaming knows 'cuda', 'xpu' and 'cpu' (files to RAM)")
    return device


def device_count(device: torch.device) -> int:
    """Return how many devices of this kind the machine has."""
    api = getattr(torch, device.type)
    return api.device_count() if api.is_available() else 0


def usable_device(given: torch.device | str, option: str = "onload_device") -> torch.device:
    """Return a device that is there, with its index.

    Raises:
        ConfigError: what `option` gave is none.
    """
    device = known_device(given, option)
    if device.type == "cpu":
        return device
    count = device_count(device)
    if (device.index or 0) >= count:
        raise ConfigError(f"{option}={str(device)!r}, but this machine has {count} such devices; 'cpu' always works")
    current = getattr(torch, device.type).current_device
    return torch.device(device.type, current() if device.index is None else device.index)


def _peer(
    peer: torch.device | str | None, store: str | None, device: torch.device | str, mesh: Sharing | None
) -> torch.device | None:
    if (peer is None) != (store != "peer"):
        raise ConfigError(f"peer_device={peer!r} with store={store!r}; the store 'peer' and its device go together")
    if peer is None:
        return None
    if mesh is not None:
        raise ConfigError("store='peer' is for one process that has two devices; with mesh= each device has its rank")
    found, own = usable_device(peer), usable_device(device)
    if found == own and own.type != "cpu":
        raise ConfigError(f"peer_device={str(peer)!r} is the device that computes; give another one")
    return found


def _choice(option: str, given: str, possible: Sequence[str]) -> Any:
    if given not in possible:
        raise ConfigError(f"{option}={given!r}; expected one of {', '.join(map(repr, possible))}")
    return given


def _at_least_one(option: str, given: int) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"{option}={given!r}; expected a whole number of at least 1")
    return given


def _size(option: str, given: int | str) -> int:
    try:
        return parse_bytes(given)
    except ConfigError as error:
        raise ConfigError(f"{option}={given!r}: {error}") from None


def refuse_no_module(given: object, instead: str = "") -> None:
    """Raise ConfigError unless a module was given; `instead` is what else to do with a pipeline."""
    if not isinstance(given, nn.Module):
        raise ConfigError(
            f"a {type(given).__name__} was given; expected a torch.nn.Module. Of a pipeline, give the parts one by one "
            f"(pipeline.transformer, pipeline.text_encoder, ...){instead}"
        )


def refuse_no_names(option: str, given: Collection[str] | None) -> None:
    """Raise ConfigError unless `given` is a list of names, or None."""
    if isinstance(given, str):
        raise ConfigError(f"{option}={given!r}; expected a list of names such as [{given!r}]")
    if given is not None and not (isinstance(given, Collection) and all(isinstance(name, str) for name in given)):
        raise ConfigError(f"{option}={given!r}; expected a list of names, or None")


def _submodules(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    known = {name for name, _ in module.named_modules()}
    for name in names:
        if name not in known:
            children = ", ".join(name for name, _ in module.named_children())
            raise ConfigError(
                f"block_modules names {name!r}, which {type(module).__name__} does not have; it has: {children}"
            )
    return tuple(names)


def _folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(
            f"offload_to_disk_path={path!r}; expected the path of a folder (it is made when it is missing)"
        )
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"offload_to_disk_path={str(path)!r} is a file; give a folder (it is made when it is missing)"
        )
    return folder


def _methods(module: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(name for name in _ENTRY_POINTS if _is_method(module, name))
    for name in names:
        if not _is_method(module, name):
            raise ConfigError(f"entry_points names {name!r}, which is not a method of {type(module).__name__}")
    return tuple(names)


def _is_method(module: nn.Module, name: str) -> bool:
    member = getattr(module, name, None)
    return callable(member) and not isinstance(member, nn.Module)
