"""Python's collector waits while offloading is put on and taken off, and is as it was afterwards."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from vramkit import ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.offload.collector import collector_paused


@pytest.fixture
def runs() -> Iterator[list[str]]:
    """When the collector ran."""
    noted: list[str] = []

    def note(phase: str, _info: dict[str, int]) -> None:
        noted.append(phase)

    gc.callbacks.append(note)
    yield noted
    gc.callbacks.remove(note)


def model(blocks: int = 40) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(blocks)))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_it_does_not_run_while_weights_are_offloaded_and_taken_off(level: str, runs: list[str]) -> None:
    built = model()
    before = gc.get_threshold()
    gc.set_threshold(100)  # else so small a model is put on without it anyway
    try:
        gc.collect()
        runs.clear()
        offload = apply_group_offloading(built, "cpu", offload_type=level)
        outside = len(runs)  # what is read of the options, before and after
        with offload.edit():
            pass
        offload.remove()
    finally:
        gc.set_threshold(*before)
    assert outside <= 4
    assert len(runs) - outside <= 8  # with it at work, some hundred times


@pytest.mark.parametrize("is_on", [True, False])
def test_it_is_as_it_was_afterwards_also_where_applying_fails(is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    try:
        offload = apply_group_offloading(model(2), "cpu")
        assert gc.isenabled() is is_on
        with offload.edit():
            assert gc.isenabled() is is_on
        offload.remove()
        assert gc.isenabled() is is_on
        with pytest.raises(ConfigError):
            apply_group_offloading(model(2).to("meta"), "cpu")
        assert gc.isenabled() is is_on
        with pytest.raises(KeyboardInterrupt), collector_paused():
            raise KeyboardInterrupt
        assert gc.isenabled() is is_on
    finally:
        gc.enable()


def test_it_works_in_a_process_that_another_thread_forks_meanwhile() -> None:
    def status_of_fork() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with collector_paused(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(status_of_fork).result(30) == 0
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            assert status_of_fork() == 1  # the user's own wish
    finally:
        gc.enable()


def test_what_nobody_refers_to_goes_at_once_meanwhile() -> None:
    tensor = torch.zeros(4)
    gone = weakref.ref(tensor)
    with collector_paused():
        del tensor
        assert gone() is None
