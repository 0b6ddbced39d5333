"""Processes that are ranks of one world: a group that runs one check after the other, and ones that may die."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

# What each rank would import, imported once by the process that they are forked from.
_PRELOADED = [
    "torch.distributed",
    "vramkit.distributed.mesh",
    "vramkit.distributed.parallel",
    "vramkit.pipelines",
    "torch._dynamo",
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("clip", "llama", "t5", "umt5")),
]
_PATIENCE_S = 120


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _become(rank: int, size: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})


def _serve(rank: int, size: int, port: int, pipe: Connection, kind: str) -> None:
    import torch
    import torch.distributed as dist

    from vramkit.distributed import Mesh, connect

    _become(rank, size, port)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as `connect` does where it begins the world
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    meshes: dict[int, Mesh] = {}
    while (job := pipe.recv()) is not None:
        name, guidance, given = job
        try:
            if guidance not in meshes or meshes[guidance].failure is not None:
                meshes[guidance] = connect(guidance=guidance, device=device, timeout_s=60)
            pipe.send((True, _check(name)(meshes[guidance], **given)))
        except BaseException:  # noqa: BLE001 - the test that asked for it is told
            pipe.send((False, traceback.format_exc()))


def _check(name: str) -> Any:
    import window_checks

    if hasattr(window_checks, name):
        return getattr(window_checks, name)
    import rank_checks  # which needs more packages

    return getattr(rank_checks, name)


class RankGroup:
    """Ranks that live as long as a module of tests, on the CPU or each on a card."""

    def __init__(self, size: int, kind: str = "cpu") -> None:
        context, port = _context(), _free_port()
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, port, theirs, kind), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, check: str, *, guidance: int = 1, **given: Any) -> list[Any]:
        """Run a function of `rank_checks` or `window_checks` on all ranks, and return what each returns."""
        for pipe in self._pipes:
            pipe.send((check, guidance, given))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_PATIENCE_S), f"rank {rank} hangs in {check}"
            results.append(pipe.recv())
        failed = [f"rank {rank}:\n{said}" for rank, (is_right, said) in enumerate(results) if not is_right]
        assert not failed, "\n".join(failed)
        return [said for _, said in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _run_to_its_end(rank: int, size: int, port: int, pipe: Connection, check: str) -> None:
    _become(rank, size, port)
    run = _check(check)
    pipe.send("ready")
    try:
        run(rank)
    except BaseException as error:  # noqa: BLE001 - what the test looks at
        pipe.send(f"{type(error).__name__}: {error}")


class Faulty:
    """Two ranks of which something ends."""

    def __init__(self, check: str) -> None:
        context, port = _context(), _free_port()
        pipes = [context.Pipe() for _ in range(2)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_run_to_its_end, args=(rank, 2, port, theirs, check), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def end(self, within_s: float) -> tuple[list[str | None], list[int | None]]:
        """Return what each rank raised and the status that it ended with; None where it has not ended."""
        for pipe in self._pipes:
            assert not pipe.poll(_PATIENCE_S) or pipe.recv() == "ready"  # the time begins when all could be imported
        end = time.monotonic() + within_s
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        statuses = [process.exitcode for process in self._processes]
        return [_received(pipe) for pipe in self._pipes], statuses

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _received(pipe: Connection) -> str | None:
    try:
        return str(pipe.recv()) if pipe.poll() else None
    except EOFError:
        return None
