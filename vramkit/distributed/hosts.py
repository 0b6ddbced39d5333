"""What tells one host from another: names do not, as all may be called localhost."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

__all__ = ["host_of_files", "host_of_processes"]


def host_of_processes() -> str:
    """Return the same text in processes that see one another's numbers."""
    with contextlib.suppress(OSError):
        return f"{_booted()} {Path('/proc/self/ns/pid').readlink()}"
    return _booted()


def host_of_files(folder: Path) -> str:
    """Return the same text in processes for which `folder` is on the same file system of the same host."""
    with contextlib.suppress(OSError):
        return f"{_booted()} {folder.stat().st_dev}"
    return _booted()


def _booted() -> str:
    """The name of the host, and where the system says it when it was started."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return socket.gethostname()
