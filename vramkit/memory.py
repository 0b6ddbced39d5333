"""Sizes in bytes: parse and print them, count a module's, read what the machine has, probe the link."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from vramkit import tensors
from vramkit.errors import ConfigError

__all__ = [
    "CgroupLimit",
    "available_ram_bytes",
    "cgroup_limits",
    "format_apart",
    "format_bytes",
    "format_enough",
    "module_bytes",
    "parse_bytes",
    "probe_link_gbps",
    "tensor_bytes",
]

GIB = 2**30
MIB = 2**20
_UNLIMITED = 2**60  # above it cgroup v1 means no limit

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{middle}b": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kmgt", start=1)
}


def parse_bytes(size: int | str) -> int:
    """Read a size: a whole number of bytes, or text such as ``"6GiB"``, ``"512 MiB"``, ``"4.5GB"`` (GB = 10^9, GiB = 2^30).

    Raises:
        ConfigError: the text is not a size, or is negative.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if not isinstance(size, str) or match is None or match[2] not in _UNITS:
        raise ConfigError(f'a size was given as {size!r}; expected bytes or text such as "6GiB", "512MiB" or "4.5GB"')
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """Print a size in binary units with three significant digits: ``26.6 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if abs(count) < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if abs(count) < 1000 else f"{count:.0f} GiB"


def format_enough(count: int) -> str:
    """Print a size with two decimals so that what is printed is enough: ``26.61 GiB``."""
    return _hundredths(count, up=True)


def format_apart(less: int, more: int) -> tuple[str, str]:
    """Print two sizes of which the second is larger so that this is seen: as `format_enough`, the first rounded down."""
    return _hundredths(less, up=False), _hundredths(more, up=True)


def _hundredths(count: int, *, up: bool) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{(-(-count * 100 // unit) if up else count * 100 // unit) / 100:.12g} {name}"
    return f"{count} B"


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Count the bytes that `tensor` keeps in memory, inner tensors of wrapper subclasses included."""
    return sum(part.nbytes for part in (tensors.sparse_parts(tensor) or tensors.leaves(tensor)))


def module_bytes(module: nn.Module) -> int:
    """Count the bytes of all parameters and buffers of `module`, tied ones once. Works on the meta device too."""
    distinct = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor_bytes(tensor) for tensor in distinct.values())


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """A control group that limits the memory of this process, and of others in it."""

    path: str
    limit_bytes: int
    used_bytes: int  # without copies of files, which the system drops when memory is wanted


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[CgroupLimit]:
    """The memory limits of this process's control group and of all above it, innermost first; none without control groups.

    A group may take no more than the groups above it leave, whatever its own limit says.
    """
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each controller.
        tree = root / "memory" if controllers else root
        limit_name, used_name = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        inner = Path(path.strip("/"))
        for folder in dict.fromkeys((tree / inner, *(tree / above for above in inner.parents), tree)):
            try:
                limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
            except (OSError, ValueError):
                continue  # the outermost has no such files, and a container may not see those above it
            if limit.isdigit() and int(limit) < _UNLIMITED:
                found.append(CgroupLimit(str(folder), int(limit), max(0, used - _cached_bytes(folder))))
    return found


def _cached_bytes(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    counts = {name: int(count) for name, _, count in (line.partition(" ") for line in lines) if count.isdigit()}
    lists = ("active_file", "inactive_file")  # in version 1 of this group alone; with a prefix, of those below it too
    return sum(counts.get(f"total_{name}", counts.get(name, 0)) for name in lists)


def available_ram_bytes() -> int:
    """Return how much RAM this process may still take: what the system has free, or what its control groups leave.

    Inside a container the system's figure is the host's; the limit of the control group, or of one above it, is what kills.
    """
    left = (limit.limit_bytes - limit.used_bytes for limit in cgroup_limits())
    return max(0, min(int(psutil.virtual_memory().available), *left, _UNLIMITED))


def probe_link_gbps(device: torch.device | str, *, probe_bytes: int = 256 * MIB, repeats: int = 5) -> float:
    """Measure the host-to-device bandwidth of `device` with page-locked memory, in GB/s (10^9 bytes), best of `repeats`.

    Raises:
        ConfigError: `device` is not an accelerator.
    """
    device = torch.device(device)
    if device.type == "cpu":
        raise ConfigError("the link of the CPU to itself was asked for; give an accelerator such as 'cuda'")
    host = torch.empty(probe_bytes, dtype=torch.uint8, device="cpu", pin_memory=True).fill_(1)
    target = torch.empty(probe_bytes, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(repeats):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return probe_bytes / best / 1e9
