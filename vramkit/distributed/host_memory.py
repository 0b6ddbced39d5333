"""Weights in the memory of each rank become one copy on each host: a file, in memory or on disk, that its ranks map."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from pathlib import Path

from torch import nn

from vramkit.distributed.hosts import host_of_files
from vramkit.distributed.ranks import Ranks
from vramkit.errors import StoreError
from vramkit.offload.disk import ForeignViews, MappedFile, SpillFile, views_like
from vramkit.offload.inventory import Inventory
from vramkit.offload.memory_map import MemoryMap, give_free_memory_back
from vramkit.offload.resting import is_loose, loose_leaves, move_loose

__all__ = ["keep_once_on_each_host"]

_MEMORY = Path("/dev/shm")  # where Linux has files in memory; they are removed before anything goes on


def keep_once_on_each_host(module: nn.Module, ranks: Ranks, disk_folder: Path | None = None) -> None:
    """Let the weights of `module`, the same on all ranks, be views of one file for all ranks of a host.

    The file is in memory (tmpfs), or in the folder of its first rank.

    What is a view of a file already stays as it is. Where there is no room for such a file weights stay where they are, with
    a warning: each rank has its own then.
    """
    inventory = Inventory(module)
    ForeignViews().note([leaf for item in inventory for leaf in item.leaves()], MemoryMap.of_process())
    items = [item for item in inventory if not item.is_buffer and is_loose(item)]
    leaves = loose_leaves(items)
    place = disk_folder or (_MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir()))
    with contextlib.suppress(OSError):  # who writes to it says so
        place.mkdir(parents=True, exist_ok=True)
    hosts = ranks.collect(host_of_files(place))
    writer = hosts.index(hosts[ranks.rank])  # the first rank of this host
    if len(set(hosts)) == ranks.size or not any(ranks.numbers(len(items))):
        return
    folder: Path | None = None
    said: dict[str, str] = {}
    try:
        if writer == ranks.rank:
            try:
                folder = Path(tempfile.mkdtemp(prefix="vramkit-", dir=place))
                SpillFile(folder / "weights.bin", leaves).add(leaves)
                said = {"file": str(folder / "weights.bin")}
            except (StoreError, OSError) as error:
                said = {"error": str(error)}
        answers = ranks.collect(said)
        if any("error" in answer for answer in answers):
            reason = next(answer["error"] for answer in answers if "error" in answer)
            warnings.warn(
                f"weights stay in the memory of each rank, once for each: {reason}. Load them from files, or give the "
                "container more shared memory",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        move_loose(items, views_like(leaves, MappedFile(answers[writer]["file"])))
        ranks.barrier()  # all have opened it: it needs its name no more
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    del leaves
    give_free_memory_back()
