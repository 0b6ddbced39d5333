"""What the machine is like, as far as streaming depends on it: its device, speed of a disk, versions with traps."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from vramkit.errors import ConfigError
from vramkit.memory import MIB
from vramkit.offload.disk import FileReader, MappedFile

__all__ = [
    "disk_read_gbps",
    "hazards",
    "page_lock_limit_bytes",
    "resolve_device",
    "versions",
]


def resolve_device(device: str) -> str:
    """Return ``"cpu"`` or a CUDA device with its number, which memory limits ask for; ConfigError when it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda was given, but torch sees no CUDA device: use --device cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise ConfigError(f"--device is {device!r}; expected auto, cpu or cuda")
    return "cuda:0" if device == "cuda" else device


def page_lock_limit_bytes() -> int | None:
    """How much memory this process may page-lock, as ``ulimit -l`` has it; None for no limit."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def disk_read_gbps(folder: Path, *, probe_bytes: int = 256 * MIB) -> tuple[float, bool]:
    """Measure how fast files in `folder` are read, in GB/s (10^9 bytes), with a file that is removed again.

    Returns:
        The rate, and whether it went around the page cache; otherwise it may be that of the memory.

    Raises:
        ConfigError: the folder is missing or cannot be written to.
    """
    try:
        # A folder, for Windows opens no file twice that removes itself.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".vramkit-probe-", ignore_cleanup_errors=True) as scratch:
            path = Path(scratch) / "probe"
            _write_probe(path, probe_bytes // MIB)
            reader = FileReader(MappedFile(path), direct=True)
            target = torch.empty(probe_bytes // MIB * MIB, dtype=torch.uint8)
            target.fill_(0)  # so that its pages are there
            try:
                begun_s = time.perf_counter()
                reader.read(0, target)
                seconds = time.perf_counter() - begun_s
                return target.nbytes / seconds / 1e9, reader.is_direct
            finally:
                reader.close()
                del reader  # and with it the open file
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be measured: {error.strerror or error}; name a folder to write to"
        ) from error


def _write_probe(path: Path, count: int) -> None:
    block = os.urandom(MIB)  # a disk that compresses gains nothing
    with path.open("wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def versions() -> dict[str, str]:
    """The versions that behaviour depends on, by name; what is not installed is left out."""
    from importlib import metadata  # noqa: PLC0415

    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for name in ("vramkit", "torch", "diffusers", "transformers", "peft", "bitsandbytes", "optimum-quanto", "torchao"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)  # of several, that which an import finds
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        if cudnn is not None:
            major = 10000 if cudnn >= 90000 else 1000  # 91002 is 9.10.2, 8902 is 8.9.2
            found["cudnn"] = f"{cudnn // major}.{cudnn % major // 100}"
    return found


def hazards(found: Mapping[str, str]) -> list[str]:
    """What is known to go wrong with these versions, and what to do; see `versions`."""
    told = []
    torch_version, cudnn = _numbers(found.get("torch", "")), _numbers(found.get("cudnn", ""))
    if torch_version and torch_version < (2, 6):
        told.append(f"torch {found['torch']} is older than 2.6, with which vramkit is tested: update it")
    if torch_version[:2] == (2, 9) and "cuda" in found:
        if torch_version[:3] == (2, 9, 0):
            told.append(
                "torch 2.9.0 does not use cuDNN for 3-D convolutions: video VAEs take more time and memory; use 2.9.1 or "
                "another version"
            )
        if cudnn and cudnn < (9, 15):
            told.append(
                f"torch 2.9 with cuDNN {found['cudnn']} doubles the memory of video VAEs: "
                "pip install nvidia-cudnn-cu12>=9.15, or another version of torch"
            )
    if "microsoft" in found.get("system", "").lower():
        told.append(
            "under WSL page-locking fails early: weights that cannot be locked travel through a small locked buffer, slower"
        )
    if sys.platform == "win32":
        told.append("Windows is not tested: files are read through the page cache, and control groups do not exist")
    return told


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers in front of a version: "2.9.0+cu128" -> (2, 9, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
