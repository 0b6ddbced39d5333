"""One of two ranks that decode rows of a clip together is killed, or raises, in any layer: the other one says so and why."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults._cases import tried

__all__ = ["COUNT", "run"]

COUNT = 40
_PATIENCE_S = 120
_CALLS = 60  # of layers, about as many as a decode of this size makes
_TINY = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
_SHAPE = (1, 4, 2, 24, 3)  # so many rows that each rank has some


def run(count: int, seed: int) -> dict[str, int]:
    """Let `count` pairs of ranks decode, by the processes of ``tests/distributed``."""
    sys.path[:0] = [str(Path(__file__).parents[2] / "tests" / each) for each in ("", "distributed")]
    group: Any = importlib.import_module("rank_group")

    def attempt(draw: random.Random, folder: Path, counts: Counter[str]) -> None:  # noqa: ARG001 (nothing is written)
        fault, culprit, turn = draw.choice(["killed", "raises"]), draw.randrange(2), draw.randint(1, _CALLS)
        counts[_outcome(group, fault, culprit, turn)] += 1

    return tried("ranks", count, seed, attempt)


def _outcome(group: Any, fault: str, culprit: int, turn: int) -> str:
    context, port = group._context(), group._free_port()
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_decode, args=(rank, port, theirs, fault if rank == culprit else "", turn), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        for process in processes:
            process.join(_PATIENCE_S)
        statuses = [process.exitcode for process in processes]
        assert None not in statuses, f"a rank has not ended; {fault}, rank {culprit}, call {turn}"
    finally:
        for process in processes:
            process.kill()
    said = [group._received(pipe) for pipe, _ in pipes]
    if said == ["the same", "the same"]:
        return "over before it"
    other = str(said[1 - culprit])
    cause = "its process is gone" if fault == "killed" else "no room, on purpose"
    assert other.startswith(f"RankError: rank {culprit} failed: "), f"{said}, {statuses}; {fault}, call {turn}"
    assert cause in other, f"{said}; {fault}, call {turn}"
    return f"{fault}: a RankError that says so"


def _decode(rank: int, port: int, pipe: Connection, fault: str, turn: int) -> None:
    from rank_group import _become  # type: ignore[import-not-found]

    from vramkit import AutoencoderKLWan
    from vramkit.distributed import connect, heartbeats
    from vramkit.distributed.tiles import TileRanks

    _become(rank, 2, port)
    heartbeats._GRACE_S = 2.0
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_config(_TINY).eval().double()
    latents = torch.randn(_SHAPE, dtype=torch.float64)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == turn and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == turn and fault:
            raise torch.OutOfMemoryError("no room, on purpose")

    try:
        with torch.no_grad(), connect(timeout_s=60) as mesh:
            expected = vae.decode(latents).sample
            vae.tile_ranks = TileRanks(mesh.all)
            torch.nn.modules.module.register_module_forward_pre_hook(fail)
            with mesh.call():
                decoded = vae.decode(latents).sample
        is_same = (decoded - expected).abs().amax() <= 1e-11 * expected.abs().amax()
        pipe.send("the same" if is_same else "other numbers")
    except BaseException as error:  # noqa: BLE001 (what is looked at)
        pipe.send(f"{type(error).__name__}: {error}")
