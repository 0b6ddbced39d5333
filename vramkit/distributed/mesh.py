"""The ranks that make one clip together, and who does what."""

from __future__ import annotations

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import Self

import vramkit
from vramkit.distributed.agreement import agree, fingerprint
from vramkit.distributed.apart import Apart
from vramkit.distributed.file_window import FileWindow
from vramkit.distributed.heartbeats import Heartbeats
from vramkit.distributed.host_memory import keep_once_on_each_host
from vramkit.distributed.hosts import host_of_processes
from vramkit.distributed.ranks import Ranks
from vramkit.distributed.sharded_store import ShardedStore
from vramkit.distributed.symmetric_window import SymmetricWindow
from vramkit.distributed.turnstile import Turnstile
from vramkit.distributed.windows import MakeWindow, Windows
from vramkit.errors import ConfigError
from vramkit.offload.backend import Backend
from vramkit.offload.stores import PartedStore, Sharing, Store

__all__ = ["Mesh", "connect"]


def connect(
    *,
    guidance: int = 1,
    device: torch.device | str | None = None,
    timeout_s: float = 300.0,
    push: bool = True,
) -> Mesh:
    """Join the processes that ``torchrun`` started (or that have called ``torch.distributed.init_process_group``).

    A context manager: at its end, or when an exception ends it, the others are told.

    Args:
        guidance: 2 runs the two branches of guidance on different ranks, each on half of them; 1 runs both on all. The
            ranks of one branch share the tokens.
        device: where this rank computes: by default the accelerator of its local rank, or the CPU where there is none.
        timeout_s: after how many seconds a rank counts as hung that others wait for. A process that is gone is noticed
            within a few seconds.
        push: whether ranks of one host write what they have read of weights into each other's slots where they can, which
            takes no processors of a card; False: they gather it by NCCL or gloo, as where they cannot.

    Raises:
        ConfigError: not started as one of several ranks, a number of ranks that guidance does not divide, or ranks with
            other versions or options than the first one.
    """
    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed, which several ranks need")
    is_ours = not dist.is_initialized()
    if is_ours and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Collectives of several groups run beside each other, and each waits for other cards. Where two streams shared one
        # of the 8 queues that a device has by default, one would wait behind the other, on two cards in different orders.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    device = _device() if device is None else torch.device(device)
    if is_ours:
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigError(
                f"{missing[0]} is not set, so this process is no rank of several: start it with "
                "`torchrun --nproc-per-node 2 ...`, or call torch.distributed.init_process_group before"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Mesh(guidance=guidance, device=device, timeout_s=timeout_s, push=push, ends_world=is_ours)


class Mesh:
    """Ranks in `guidance` branches of `sequence` ranks each, from `connect` until `close`.

    Rank ``b * sequence + s`` computes branch b, and of its tokens the s-th part. All share decodes and calls, and
    those of one host the reading of weights.
    """

    def __init__(
        self,
        *,
        guidance: int,
        device: torch.device,
        timeout_s: float,
        push: bool = True,
        ends_world: bool = False,
        heartbeats: Heartbeats | None = None,
    ) -> None:
        """Meet the others; see `connect`. What goes wrong with one mesh goes wrong with all that have its `heartbeats`."""
        members = list(range(dist.get_world_size()))
        if guidance not in (1, 2) or len(members) % guidance:
            raise ConfigError(
                f"guidance={guidance} with {len(members)} ranks; expected 1, or 2 and an even number of ranks"
            )
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s}; expected a positive number of seconds")
        self.rank, self.size = dist.get_rank(), len(members)
        self.device = device
        self.guidance, self.sequence = guidance, len(members) // guidance
        self._ends_world = ends_world
        self._is_part = heartbeats is not None
        if heartbeats is None:
            heartbeats = Heartbeats(_store_of_mesh(self.rank), self.rank, members, timeout_s=timeout_s)
            heartbeats.start()
        self._heartbeats = heartbeats
        self._timeout_s, self._push = timeout_s, push
        self.all = self._ranks("all ranks", [members])
        hosts = self.all.collect(host_of_processes())
        neighbours = [[rank for rank in members if hosts[rank] == host] for host in dict.fromkeys(hosts)]
        self.weights = self._ranks("weights", neighbours)  # a group of its own: weights travel beside what is computed
        """The ranks of this host, which share the reading of weights: a network is slower than the links of a host."""
        self._turnstile = Turnstile(self._heartbeats.check)
        self._windows = Windows(self.weights, _window_of(device, self.weights) if push else None)
        self.apart: Sharing = Apart(self)
        """The same ranks, each of which reads all weights itself, where ``mesh=mesh.apart`` is given.

        They are once in the memory of each host all the same. Worth it where computing takes longer than one link.
        """
        self.carried: Counter[str] = Counter()
        """How many groups of weights ranks have "pushed" into each other's slots, and "gathered"."""
        branches = [members[at : at + self.sequence] for at in range(0, self.size, self.sequence)]
        places = [members[at :: self.sequence] for at in range(self.sequence)]
        self.branch, self.place = divmod(self.rank, self.sequence)
        self.in_sequence = self._ranks("tokens", branches)
        """The ranks that share the tokens of this branch."""
        self.in_guidance = self._ranks("guidance", places)
        """The ranks that have the same tokens in the other branch, and this one."""
        try:
            self.agree(
                {
                    "version of vramkit": vramkit.__version__,
                    "version of torch": torch.__version__,
                    "version of Python": platform.python_version(),
                    "device": _kind_of(device),
                    "guidance=": guidance,
                    "timeout_s=": timeout_s,
                    "push=": push,
                }
            )
        except BaseException:
            self.close()
            raise

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    @property
    def failure(self) -> str | None:
        """What went wrong with which rank, once something has: then this mesh is of no use any more."""
        return self._heartbeats.failure

    def with_branches(self, guidance: int) -> Mesh:
        """Return the same ranks in so many branches of guidance, until this mesh is closed.

        Raises:
            ConfigError: as `connect`.
        """
        return Mesh(
            guidance=guidance,
            device=self.device,
            timeout_s=self._timeout_s,
            push=self._push,
            heartbeats=self._heartbeats,
        )

    def agree(self, options: dict[str, Any]) -> None:
        """Refuse, on all ranks alike, what is not the same on all.

        Raises:
            ConfigError: names the rank and what differs.
        """
        agree(self.all, options)

    def prepare(self, module: nn.Module, options: dict[str, Any], disk_folder: Path | None) -> None:
        """Refuse to share a module whose `options` or weights differ on ranks, and have its weights once on each host.

        They are in memory there, or in a file in `disk_folder`.

        Raises:
            ConfigError: names the rank and what differs.
        """
        self.agree(
            {
                "class of the module": type(module).__name__,
                **{f"{type(module).__name__} {name}": value for name, value in options.items()},
                f"weights of {type(module).__name__}": fingerprint(module),
            }
        )
        keep_once_on_each_host(module, self.all, disk_folder)

    def shared(
        self, name: str, stores: Sequence[tuple[int, int, PartedStore]], size_bytes: int
    ) -> Sequence[tuple[int, int, Store]]:
        """Return the store of a group of which each rank reads a part by `stores`, (offset in the slot, bytes, store)."""
        self.weights.begin_on(self.device)
        self._windows.begin()
        store = ShardedStore(
            name,
            stores,
            size_bytes,
            ranks=self.weights,
            turnstile=self._turnstile,
            windows=self._windows,
            carried=self.carried,
        )
        return [(0, size_bytes, store)]

    def memory(self, backend: Backend, size_bytes: int) -> torch.Tensor:
        """Return memory of this rank's device for slots, into which the others can write where that is possible."""
        is_ours = self.device in (backend.device, torch.device(backend.device.type))
        memory = self._windows.memory(size_bytes) if is_ours else None
        return backend.memory(size_bytes) if memory is None else memory

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """What all ranks do together: an exception in one ends all."""
        with self._heartbeats.call():
            yield

    def share_randomness(self) -> None:
        """Let all ranks draw, from torch's own generators, the numbers that the first one draws."""
        state = torch.get_rng_state()
        self.all.broadcast_(state, 0).wait()
        torch.set_rng_state(state)
        if self.device.type == "cuda":
            state = torch.cuda.get_rng_state(self.device)  # on the host, as the other one
            self.all.broadcast_(state, 0).wait()
            torch.cuda.set_rng_state(state, self.device)

    def close(self) -> None:
        """Leave. What is parallel or offloaded with this mesh cannot run any more. Later calls do nothing.

        One of `with_branches` ends with the mesh that made it.
        """
        if self._is_part:
            return
        self._heartbeats.close()
        if self._ends_world and dist.is_initialized() and self._heartbeats.failure is None:
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._heartbeats.fail(error)
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: rank {self.rank} of {self.guidance} x {self.sequence} on {self.device}>"

    def _ranks(self, name: str, groups: Sequence[Sequence[int]]) -> Ranks:
        """Make groups; one of all ranks is that of all, since each group has buffers on the device."""
        if name != "weights" and hasattr(self, "all") and len(groups) == 1:
            return self.all
        is_beside = name == "weights"
        if self._is_part:
            name = f"{name}, {self.guidance} branches"
        return Ranks(name, groups, self.rank, self._heartbeats, self._timeout_s, is_beside=is_beside)


def _store_of_mesh(rank: int) -> Any:
    """Return a store of this mesh alone, by a connection of its own: a wait of another thread must not hold it up."""
    store: Any = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (torch has no public reader)
    number = store.add(f"vramkit/{rank}", 1)  # the same on all: each makes its meshes in the same order
    if hasattr(store, "clone"):
        store = store.clone()
    prefixed: Any = dist.distributed_c10d.PrefixStore
    return prefixed(f"vramkit/{number}", store)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _window_of(device: torch.device, ranks: Ranks) -> MakeWindow | None:
    """Return what makes windows on a device, if something does."""
    if device.type == "cpu":
        return partial(FileWindow.made, ranks=ranks)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return partial(SymmetricWindow.made, device=torch.device("cuda", index), ranks=ranks)


def _kind_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
