"""Several ranks, on one host or more, that make one clip together: on torch.distributed, started by torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramkit.lazy import lazy_names

if TYPE_CHECKING:
    from vramkit.distributed.mesh import Mesh, connect
    from vramkit.distributed.parallel import Parallel, parallelize

_HOMES = {
    "vramkit.distributed.mesh": ("Mesh", "connect"),
    "vramkit.distributed.parallel": ("Parallel", "parallelize"),
}

__all__ = ["Mesh", "Parallel", "connect", "parallelize"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
