"""What ranks do in tests of windows, on the CPU and on cards. Each function runs on all ranks of a mesh."""

from __future__ import annotations

import gc
import os
import signal

import torch
from rank_models import WIDTHS, Blocks, blocks

from vramkit.device_memory import memory_of
from vramkit.distributed import Mesh, connect, file_window, heartbeats, sharded_store
from vramkit.distributed.symmetric_window import SymmetricWindow
from vramkit.errors import RankError
from vramkit.offload import apply_group_offloading, load_mapped

CALLS: list[tuple[int, ...]] = [
    (),
    (1, 2),
    (),
    (),
    (4,),
    (0, 1, 2, 3),
    (),
]  # guesses of what comes next are wrong at first


def _loaded(file: str) -> Blocks:
    return load_mapped(Blocks().eval().requires_grad_(False), file)


def _inputs(mesh: Mesh) -> torch.Tensor:
    return torch.randn(3, WIDTHS[0], generator=torch.Generator().manual_seed(0)).to(mesh.device)


def gives_groups_to_all(mesh: Mesh, file: str, push: bool) -> dict[str, int]:
    """Two models in turn, a view that is kept, slots that go between calls; returns how groups were carried."""
    x = _inputs(mesh)
    resident = blocks().to(mesh.device)
    expected = [resident(x, skip) for skip in CALLS]
    plain, sharded_store._SHARE_BYTES = sharded_store._SHARE_BYTES, 4096  # several pieces, and a rest
    try:
        with connect(device=mesh.device, timeout_s=60, push=push) as other:
            models = [_loaded(file), _loaded(file)]
            offloads = [apply_group_offloading(model, mesh.device, mesh=other, resident=0) for model in models]
            results = [[model(x, skip) for model in models] for skip in CALLS]
            kept: list[torch.Tensor] = []
            part = models[0].blocks[1][0]
            seeing = part.register_forward_pre_hook(lambda part, _: kept.append(part.weight.detach()))
            results.append([model(x) for model in models])
            seeing.remove()
            results.append([model(x) for model in models])  # in a ring of which a part is somebody's
            windows = other._windows.count
            for offload in offloads:
                offload.rest()
            assert other._windows.count == (1 if push else 0)  # at once: others may need the memory
            results.append([model(x) for model in models])
            assert all(torch.equal(each, resident.blocks[1][0].weight) for each in kept)
            kept.clear()
            for offload in offloads:
                offload.remove()
            gc.collect()
            assert windows == (3 if push else 0)  # one that is kept, and two rings
            assert other._windows.count == 0
            carried = dict(other.carried)
    finally:
        sharded_store._SHARE_BYTES = plain
    wanted = [*expected, expected[0], expected[0], expected[0]]
    assert all(torch.equal(made, each) for made, each in zip(results, wanted, strict=True) for made in made)
    return carried


def falls_back_with_all(mesh: Mesh, file: str, fault: str) -> dict[str, int]:
    """One rank cannot map its own window or that of another, at first or later; returns how groups were carried."""
    whose, _, after = fault.partition(" ")
    left, plain = [int(after)], file_window._mapped

    def failing(path: str, size_bytes: int) -> torch.Tensor:
        is_own = path.startswith(f"/proc/{os.getpid()}/")
        left[0] -= is_own == (whose == "own")
        if left[0] < 0:
            raise OSError("there is no room")
        return plain(path, size_bytes)

    if mesh.rank == 1:
        file_window._mapped = failing
    try:
        with connect(device="cpu", timeout_s=60) as other:
            model, x = _loaded(file), _inputs(mesh)
            offload = apply_group_offloading(model, "cpu", mesh=other)
            results = [model(x, skip) for skip in CALLS]
            offload.remove()
            assert other._windows.count == 0
            carried = dict(other.carried)
    finally:
        file_window._mapped = plain
    resident = blocks()
    assert all(torch.equal(made, resident(x, skip)) for made, skip in zip(results, CALLS, strict=True))
    return carried


def reads_apart(mesh: Mesh, file: str) -> dict[str, int]:
    """Each rank reads all for itself."""
    model, x = _loaded(file), _inputs(mesh)
    with connect(device=mesh.device, timeout_s=60) as other:
        offload = apply_group_offloading(model, mesh.device, mesh=other.apart)
        assert torch.equal(model(x), blocks().to(mesh.device)(x))
        assert offload.stats().loaded_bytes > 0
        offload.remove()
        return dict(other.carried)


def dies_while_others_wait(rank: int) -> None:
    """On two cards: rank 1 is killed between two barriers. Rank 0 waits in the second one, and its host for the device."""
    heartbeats._GRACE_S = 2.0
    with connect(timeout_s=60) as mesh:
        model, x = blocks(), _inputs(mesh)
        offload = apply_group_offloading(model, mesh.device, mesh=mesh)
        model(x)
        offload.rest()
        if rank == 1:
            SymmetricWindow.leave = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        with mesh.call():
            try:
                model(x)
            except RankError:  # from the copy thread, which has met a dead rank; the device goes on waiting
                torch.cuda.synchronize()


def counts_windows(mesh: Mesh) -> None:
    """On cards: what torch's allocator does not count is counted while it is there."""
    memory = memory_of(mesh.device)
    model = blocks().to(mesh.device)
    with connect(device=mesh.device, timeout_s=60) as other:
        before = memory.beside_bytes
        offload = apply_group_offloading(model, mesh.device, mesh=other)
        stats = offload.stats()
        assert memory.beside_bytes - before == stats.slots * stats.slot_bytes <= stats.held_bytes
        assert memory.peak_bytes >= memory.allocated_bytes >= memory.beside_bytes
        offload.rest()
        assert memory.beside_bytes == before
        model(_inputs(mesh))
        offload.remove()
        assert memory.beside_bytes == before
