"""``vramkit doctor``: what the machine allows, and what is in the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vramkit.errors import ConfigError

__all__ = ["doctor", "examine"]


def doctor(
    *,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where checkpoints lie, to measure the disk; the Hugging Face cache if left out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: sizes in bytes, rates in GB/s.")] = False,
) -> None:
    """Measure the link and a disk, read the limits of memory, and name versions with known hazards."""
    found = examine(folder)
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Return what was found: JSON-able, sizes in bytes, rates in GB/s (10^9 bytes).

    Raises:
        ConfigError: `folder` is missing or cannot be written to.
    """
    import psutil  # noqa: PLC0415

    from vramkit.machine import disk_read_gbps, hazards, page_lock_limit_bytes, versions  # noqa: PLC0415
    from vramkit.memory import available_ram_bytes, cgroup_limits  # noqa: PLC0415

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--folder is {str(folder)!r}, which is no folder")
    measured = _cache_folder() if folder is None else folder
    read_gbps, is_direct = disk_read_gbps(measured)
    found: dict[str, Any] = {
        "versions": versions(),
        "devices": _devices(),
        "ram": {"total_bytes": psutil.virtual_memory().total, "available_bytes": available_ram_bytes()},
        "page_lock_limit_bytes": page_lock_limit_bytes(),
        "cgroups": [
            {"path": each.path, "limit_bytes": each.limit_bytes, "used_bytes": each.used_bytes}
            for each in cgroup_limits()
        ],
        "disk": {"folder": str(measured), "read_gbps": round(read_gbps, 3), "is_direct": is_direct},
    }
    found["warnings"] = [*hazards(found["versions"]), *_findings(found)]
    return found


def _devices() -> list[dict[str, Any]]:
    """The GPUs, with the rate at which each is written to from page-locked memory; None where that failed."""
    import torch  # noqa: PLC0415

    from vramkit.memory import probe_link_gbps  # noqa: PLC0415

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        link_gbps: float | None
        try:
            link_gbps = round(probe_link_gbps(f"cuda:{index}"), 2)
        except RuntimeError:  # as torch tells that memory could not be page-locked, or that the device is full
            link_gbps = None
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": total_bytes,
                "free_bytes": free_bytes,
                "link_gbps": link_gbps,
                "shares_ram": bool(getattr(properties, "is_integrated", False)),
            }
        )
    return devices


def _findings(found: dict[str, Any]) -> list[str]:
    """What of the machine is in the way, and what to do."""
    from vramkit.memory import format_bytes  # noqa: PLC0415

    told = []
    if not found["devices"]:
        told.append("torch sees no GPU: models compute on the CPU, streamed from files through memory")
    lock = found["page_lock_limit_bytes"]
    if any(device["link_gbps"] is None for device in found["devices"]):  # most drivers do not ask for the limit
        limit = "not limited" if lock is None else f"limited to {format_bytes(lock)}"
        told.append(
            f"256 MiB could not be page-locked or not be had on the device; locking is {limit} (ulimit -l). Weights that "
            "cannot be locked travel through a small locked buffer, slower: raise memlock in limits.conf, or start the "
            "container with --ulimit memlock=-1"
        )
    tight = min(found["cgroups"], key=lambda each: each["limit_bytes"], default=None)
    if tight is not None and tight["limit_bytes"] < found["ram"]["total_bytes"]:
        told.append(
            f"the control group {tight['path']} limits memory to {format_bytes(tight['limit_bytes'])}, page cache and "
            "page-locked weights included: mapped weights count where they are locked; --store disk keeps nothing"
        )
    for device in found["devices"]:
        if device["shares_ram"]:
            told.append(f"{device['name']} computes in system memory: streaming to it saves none; keep models resident")
        if "expandable_segments:True" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
            told.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lets torch reserve little more than it uses")
    return list(dict.fromkeys(told))


def _cache_folder() -> Path:
    """The folder of the Hugging Face cache, or what there is of the way to it."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415
    except ImportError:  # models come from elsewhere then
        HF_HUB_CACHE = "~/.cache"  # noqa: N806
    path = Path(HF_HUB_CACHE).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir() and os.access(folder, os.W_OK))


def _lines(found: dict[str, Any]) -> list[str]:
    from vramkit.memory import format_bytes  # noqa: PLC0415

    lock, disk, ram = found["page_lock_limit_bytes"], found["disk"], found["ram"]
    rows = [("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))]
    rows += [
        (
            "device",
            (
                f"{each['name']}: {format_bytes(each['memory_bytes'])}, {format_bytes(each['free_bytes'])} free, link "
                + ("not measured" if each["link_gbps"] is None else f"{each['link_gbps']:.1f} GB/s")
            ),
        )
        for each in found["devices"]
    ] or [("device", "none but the CPU")]
    rows.append(
        ("memory", f"{format_bytes(ram['total_bytes'])}, {format_bytes(ram['available_bytes'])} for this process")
    )
    rows += [
        ("cgroup", f"{each['path']}: {format_bytes(each['used_bytes'])} of {format_bytes(each['limit_bytes'])} used")
        for each in found["cgroups"]
    ] or [("cgroup", "no limit")]
    rows.append(("locking", "no limit (ulimit -l)" if lock is None else f"{format_bytes(lock)} (ulimit -l)"))
    how = "past the page cache" if disk["is_direct"] else "through the page cache, so maybe faster than the disk"
    rows.append(("disk", f"{disk['read_gbps']:.2f} GB/s from {disk['folder']}, {how}"))
    rows += [("warning", text) for text in found["warnings"]] or [("warning", "none")]
    return [f"{name:<10}{text}" for name, text in rows]
