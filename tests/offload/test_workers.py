"""Threads of our own: order, errors where they are waited for, ends that may be asked for twice, no thread left."""

from __future__ import annotations

import _thread
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, tokens

from vramkit.errors import ConcurrentUseError, StoreError
from vramkit.offload import apply_group_offloading, offload_of
from vramkit.offload.workers import Job, Workers


class OnPurposeError(Exception):
    pass


def fail() -> None:
    raise OnPurposeError("in the job")


def ours() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("test-"))


def test_one_thread_does_jobs_in_order_and_several_share_them() -> None:
    one = Workers("test-one")
    log: list[int] = []
    jobs = [one.submit(lambda at=at: log.append(at)) for at in range(50)]
    assert all(job.wait() for job in jobs)
    assert log == list(range(50))
    several = Workers("test-several", 3)
    meet = threading.Barrier(3, timeout=10)
    assert sorted(job.result() for job in [several.submit(meet.wait) for _ in range(3)]) == [0, 1, 2]
    assert ours() == ["test-one_0", "test-several_0", "test-several_1", "test-several_2"]
    one.close()
    several.close()
    assert ours() == []


def test_error_of_a_job_is_raised_each_time_it_is_waited_for_and_the_next_job_runs() -> None:
    workers = Workers("test-errors")
    failed, fine = workers.submit(fail), workers.submit(lambda: 3)
    for _ in range(3):
        with pytest.raises(OnPurposeError) as caught:
            failed.result()
        assert "fail" in [entry.name for entry in caught.traceback]
    depth = len(caught.traceback)
    with pytest.raises(OnPurposeError) as caught:
        failed.result()
    assert len(caught.traceback) == depth, "the traceback grows"
    assert fine.result() == 3
    workers.close()


def test_memory_of_a_job_is_let_go_without_the_garbage_collector() -> None:
    class Big:
        pass

    workers = Workers("test-memory")
    big = Big()
    seen = weakref.ref(big)
    job = workers.submit(lambda big=big: None)
    del big
    job.result()
    gc.disable()
    try:
        assert seen() is None
        job = workers.submit(fail)
        try:
            job.result()
        except OnPurposeError as error:
            failed = weakref.ref(error)
        del job
        workers.drain()
        assert failed() is None
    finally:
        gc.enable()
    workers.close()


def test_close_waits_for_what_was_submitted_and_may_be_called_again() -> None:
    workers = Workers("test-close", 2)
    log: list[int] = []
    for at in range(6):
        workers.submit(lambda at=at: (time.sleep(0.01), log.append(at)))
    workers.close()
    assert sorted(log) == list(range(6))
    workers.close()
    workers.drain()
    with pytest.raises(StoreError, match="have ended"):
        workers.submit(fail)


def test_interrupted_wait_and_interrupted_close_are_repeated() -> None:
    workers = Workers("test-interrupted")
    release = threading.Event()
    job = workers.submit(lambda: release.wait(10))
    for wait in (job.result, workers.drain, workers.close):
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
        assert ours() == ["test-interrupted_0"]
    threading.Timer(0.05, release.set).start()
    workers.drain()  # after a close that did not get to its end
    assert job.is_done
    assert job.result() is True
    workers.close()
    assert ours() == []


def test_threads_end_with_their_workers() -> None:
    workers = Workers("test-gone", 2)
    workers.submit(lambda: None).result()
    workers.submit(lambda: None).result()
    assert len(ours()) == 2
    del workers
    gc.collect()
    assert ours() == []


def test_thread_that_cannot_be_started_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers("test-refused")
    for target, name in ((threading.Thread, "start"), (_thread, "start_new_thread")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, refuse)
            with pytest.raises(StoreError, match=r"no thread could be started.*ulimit"):
                workers.submit(lambda: 1)
    assert workers.submit(lambda: 1).result() == 1
    workers.close()


def test_module_is_as_it_was_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockNet().eval()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start")))
        with pytest.raises(StoreError, match="no thread"):
            apply_group_offloading(model, "cpu", store="pageable")
    assert offload_of(model) is None
    assert not any(part._forward_pre_hooks or part._state_dict_pre_hooks for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    apply_group_offloading(model, "cpu", store="pageable").remove()


def test_wait_for_a_thread_that_is_gone_is_an_error_and_no_hang() -> None:
    life = Job(lambda: None)
    life.run()
    job = Job(lambda: None, [life])
    with pytest.raises(StoreError, match=r"thread .* is gone"):
        job.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("place", ["pageable", "spilled"])
def test_forked_process_gets_an_error_and_can_remove(place: str, tmp_path: Path) -> None:
    model = BlockNet().eval()
    x = tokens(8)
    with torch.no_grad():
        expected = model(x)
    options: dict[str, Any] = {"store": "pageable"} if place == "pageable" else {"offload_to_disk_path": tmp_path}
    offload = apply_group_offloading(model, "cpu", **options)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            with torch.no_grad():
                model(x)
        except ConcurrentUseError:
            offload.remove()
            offload.remove()
            with torch.no_grad():
                offload = apply_group_offloading(model, "cpu", **options)
                code = 0 if torch.equal(model(x), expected) else 4
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not list(tmp_path.iterdir()) or place == "spilled"
    with torch.no_grad():
        assert torch.equal(model(x), expected)  # the child has taken nothing away
        assert torch.equal(model(x), expected)
    offload.remove()


def test_interpreter_ends_although_a_module_is_offloaded_and_a_thread_is_busy() -> None:
    program = """
import time
from vramkit.offload.workers import Workers
workers = Workers("test-exit", 2)
workers.submit(lambda: time.sleep(60))
workers.submit(lambda: print("done")).result()
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert time.monotonic() - start < 30
