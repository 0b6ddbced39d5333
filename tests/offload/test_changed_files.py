"""Files that change while weights rest in them are noticed before and after each pass; few of them are open."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from modules import BlockNet, mapped_copy, tokens
from torch import nn

from vramkit.errors import StoreError
from vramkit.offload import Offload, apply_group_offloading
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.offload.disk import FileReader, MappedFile, SpillFile, remove_rubbish
from vramkit.offload.watch import is_resting

LEVELS = ["block_level", "leaf_level", "model_level"]


def overwrite(file: Path) -> None:
    """Other bytes at the end, same size; a clock that stood still would hide that."""
    before = file.stat().st_mtime_ns
    with file.open("r+b") as opened:
        opened.seek(-1000, os.SEEK_END)
        opened.write(os.urandom(1000))
    os.utime(file, ns=(before + 1_000_000, before + 1_000_000))


def rename_over(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(os.urandom(file.stat().st_size))
    other.replace(file)


@pytest.fixture(params=LEVELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, nn.Module, Offload, Path]:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=request.param)
    (file,) = tmp_path.iterdir()
    return model, module, offload, file


Case = tuple[nn.Module, nn.Module, Offload, Path]


def test_a_file_that_is_overwritten_between_passes_is_named(case: Case) -> None:
    model, module, offload, file = case
    x = tokens(8)
    with torch.no_grad():
        assert torch.equal(module(x), model(x))
        overwrite(file)
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"{file.name} was written to after it was opened.*[Ll]oad the model"):
                module(x)
    with pytest.raises(StoreError, match="was written to"):
        offload.remove()
    assert not offload.is_active
    offload.remove()


def test_a_file_that_is_overwritten_during_a_pass_spoils_that_pass(case: Case) -> None:
    _, module, _, file = case
    module.blocks[3].register_forward_hook(lambda *_: overwrite(file))
    with torch.no_grad(), pytest.raises(StoreError, match="was written to"):
        module(tokens(8))


def test_a_file_that_is_renamed_over_is_still_there(case: Case) -> None:
    model, module, offload, file = case
    rename_over(file)
    x = tokens(8)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(x), model(x))
    offload.remove()
    assert torch.equal(module.blocks[2].up.weight, model.blocks[2].up.weight)


@pytest.mark.parametrize("way", ["edit", "adapt", "state_dict", "read", "print", "pickle", "save"])
def test_whatever_touches_weights_names_the_file(way: str, case: Case, tmp_path: Path) -> None:
    _, module, offload, file = case

    def edit() -> None:
        with offload.edit():
            pytest.fail("opened")

    ways: dict[str, Callable[[], object]] = {
        "edit": edit,
        "adapt": lambda: offload.adapt(slots=3),
        "state_dict": module.state_dict,
        "read": lambda: module.blocks[2].up.weight + 1,
        "print": lambda: repr(held.weight),
        "pickle": lambda: pickle.dumps(held.weight),
        "save": lambda: write_checkpoint(tmp_path / "saved", {"weight": held.weight}),
    }
    held = nn.Linear(1, 1)
    held.weight = module.blocks[2].up.weight
    overwrite(file)
    with pytest.raises(StoreError, match=file.name):
        ways[way]()
    assert offload.is_active
    assert not (tmp_path / "saved").exists()


def test_weights_of_a_file_that_was_cut_are_refused_after_remove(case: Case) -> None:
    model, module, offload, file = case
    x = tokens(8)
    os.truncate(file, 4096)
    with pytest.raises(StoreError, match=r"4,096 bytes"):
        offload.remove()
    offload.remove()
    lost = module.blocks[2].up.weight
    assert is_resting(lost)  # else what follows would end the process
    ways: list[Callable[[], object]] = [
        *(lambda: module(x), module.state_dict, lambda: copy.deepcopy(module), lambda: pickle.dumps(module)),
        *(lambda: lost.data, lambda: repr(lost), lambda: copy.deepcopy(lost), lambda: lost.as_subclass(torch.Tensor)),
        lambda: apply_group_offloading(module, "cpu"),
    ]
    for touch in ways:
        with torch.no_grad(), pytest.raises(StoreError, match=r"4,096 bytes and had .* Load the model again"):
            touch()
    lost.data = torch.zeros_like(model.blocks[2].up.weight)
    assert not lost.any()
    module.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(module(x), model(x))


def test_direct_reads_are_of_the_file_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(range(256)) * 64)
    file = MappedFile(path)
    rename_over(path)
    reader = FileReader(file, direct=True)
    target = torch.zeros(256, dtype=torch.uint8)
    reader.read(256, target)
    reader.close()
    assert not reader.is_direct
    assert target.tolist() == list(range(256))


def descriptors() -> int:
    return psutil.Process().num_fds()


@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="no descriptors")
@pytest.mark.parametrize("direct_io", [False, True])
def test_a_model_takes_few_descriptors_and_threads_whatever_its_units(direct_io: bool, tmp_path: Path) -> None:
    model = BlockNet(blocks=60).eval()
    x = tokens(8)
    with torch.no_grad():
        expected = model(x)
        files, threads = descriptors(), threading.active_count()
        offload = apply_group_offloading(model, "cpu", offload_to_disk_path=tmp_path, direct_io=direct_io)
        assert offload.stats().groups > 50
        assert all(torch.equal(model(x), expected) for _ in range(2))
        assert descriptors() - files <= 4
        assert threading.active_count() - threads <= 5
        offload.remove()
        assert torch.equal(model(x), expected)


@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="no descriptors")
def test_models_that_go_without_remove_leave_few_descriptors_and_threads(tmp_path: Path) -> None:
    gc.collect()
    files, threads = descriptors(), threading.active_count()
    gc.disable()  # as where it does not come by: it counts objects
    try:
        for at in range(40):
            (tmp_path / str(at)).mkdir()
            module = mapped_copy(BlockNet(blocks=3).eval(), tmp_path / str(at))
            apply_group_offloading(module, "cpu", direct_io=True)
            with torch.no_grad():
                module(tokens(8))
            del module
        assert descriptors() - files <= 4 * 20  # 160 otherwise
        assert threading.active_count() - threads <= 5 * 20
    finally:
        gc.enable()
        gc.collect()


def test_writing_that_fails_midway_leaves_what_was_written_before(tmp_path: Path) -> None:
    first, second = torch.randn(100), torch.randn(100)
    file = SpillFile(tmp_path / "x.bin", [first, second])
    (view,) = file.add([first])
    with pytest.raises(RuntimeError):
        file.add([torch.empty(100, device="meta")])
    file.check()
    assert torch.equal(view, first)


def test_what_a_killed_process_spilled_goes_and_what_others_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    names = [tmp_path / f"vramkit-{digit * 16}" for digit in "abc"]
    for name in names:
        name.mkdir()
    used = SpillFile(names[0] / "0.bin", [torch.ones(4)])
    (names[1] / "0.bin").write_bytes(b"left")
    remove_rubbish(names)
    assert all(name.exists() for name in names), "they may be new"
    monkeypatch.setattr("vramkit.offload.disk.spills._SETTLED_SECONDS", -1.0)
    remove_rubbish(names)
    assert [name.exists() for name in names] == [True, False, False]
    used.check()
