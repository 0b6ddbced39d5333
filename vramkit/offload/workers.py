"""Threads beside the computation, built so that a Ctrl-C in whoever waits for them leaves nothing broken.

``concurrent.futures`` and ``threading.Condition`` take their locks in Python code. A ``KeyboardInterrupt`` between the
taking and the ``with`` leaves such a lock taken for ever, and then the worker hangs that wants to say that it is done. Here
whatever two threads share is one step of the interpreter: a lock of C that is let go once per job, and a queue of C. Only
the main thread is ever interrupted, so what a worker does is whole.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from vramkit.errors import StoreError

__all__ = ["Job", "Workers"]

_LOOK_SECONDS = 1.0  # how often one who waits looks whether there still is a thread to wait for
_LAST_WAIT_SECONDS = 1.0  # for a thread in the middle of a job when the interpreter ends

Result = TypeVar("Result")


class Job(Generic[Result]):
    """Work that another thread does. It may be waited for again and again, also after a wait that was interrupted."""

    def __init__(self, work: Callable[[], Result], runners: Collection[Job[Any]] = ()) -> None:
        """Take `work`; `runners` are the lives of the threads that may do it, where these can end before it is done."""
        self.is_done = False
        self._work: Callable[[], Result] | None = work
        self._runners = runners
        self._process = os.getpid()
        self._returned: list[Result] = []
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._gate = threading.Lock()  # open when the job is done
        self._gate.acquire()

    def run(self) -> None:
        """Do the work, once, on the thread that it is meant for."""
        assert self._work is not None
        try:
            self._returned.append(self._work())
        except BaseException as error:  # noqa: BLE001 (raised where the job is waited for)
            self._error = error
            self._traceback = error.__traceback__ and error.__traceback__.tb_next
        gate = self._gate
        self._work = None  # it refers to memory
        self.is_done = True
        del self  # the error refers to this frame: no circle, lest memory waits for the garbage collector
        gate.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the work was done, well or not; tell if it was before `timeout_s` were over.

        Raises:
            StoreError: no thread is left that could do it.
        """
        while not self.is_done:
            if self.is_orphan and not self.is_done:
                raise StoreError(
                    "a thread that copies or reads weights is gone: it was ended, or this process was forked from the one "
                    "that it runs in. remove() the offloading and apply it again in this process"
                )
            if self._gate.acquire(timeout=_LOOK_SECONDS if timeout_s is None else timeout_s):
                self._gate.release()  # for others who wait; an interrupt before it costs them a second
            elif timeout_s is not None:
                break
        return self.is_done

    def result(self) -> Result:
        """Wait, and return what the work returned, or raise what it raised."""
        self.wait()
        try:
            if self._error is not None:
                raise self._error.with_traceback(self._traceback)
            return self._returned[0]
        finally:
            del self  # as in `run`

    @property
    def is_orphan(self) -> bool:
        """Whether all threads that may do it have ended, or run in another process."""
        if os.getpid() != self._process:
            return True
        return bool(self._runners) and all(life.is_done or life.is_orphan for life in self._runners)


class Workers:
    """Up to `count` threads that take jobs in the order in which they are submitted; one thread ends one before the next.

    The threads start when they are needed, end with `close` or when this object goes, and keep no interpreter from ending.
    """

    def __init__(self, name: str, count: int = 1) -> None:
        self.is_closed = False
        self._name = name
        self._count = count
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._lives: dict[threading.Thread, Job[None]] = {}
        # Made before there is a thread: one that was being started when an interrupt came is told to end, too.
        self._dismissal = weakref.finalize(self, _dismiss, self._jobs, self._lives)

    def start(self) -> None:
        """Start one more thread, up to `count`.

        Raises:
            StoreError: the system has none to give.
        """
        if len(self._lives) >= self._count:
            return
        life, lives = Job(partial(_serve, self._jobs)), self._lives
        thread = threading.Thread(target=life.run, name=f"{self._name}_{len(lives)}", daemon=True)

        def launch() -> None:
            thread.start()
            lives[thread] = life

        launched = Job(launch)
        try:
            # Starting waits for the new thread in Python code; only on another thread is that out of reach of interrupts.
            _thread.start_new_thread(launched.run, ())
            launched.result()
        except RuntimeError as error:
            raise StoreError(
                f"no thread could be started to copy or read weights ({self._name}): {error}; end other threads, or raise "
                "the limit of this user or container (ulimit -u, pids.max)"
            ) from error
        finally:
            del launched  # its error refers to this frame, and this frame to the workers

    def submit(self, work: Callable[[], Result]) -> Job[Result]:
        """Have `work` done; what it returns or raises is the job's.

        Raises:
            StoreError: no thread could be started, or `close` was called.
        """
        if self.is_closed:
            raise StoreError(f"threads that copy or read weights ({self._name}) have ended: the offloading was removed")
        self.start()
        job = Job(work, self._lives.values())
        self._jobs.put(job)
        return job

    def drain(self) -> None:
        """Wait until what was submitted to one thread is done, or can no longer be done: nothing is written after this."""
        if self.is_closed:
            self.close()  # an interrupted call may not have waited
            return
        job = self.submit(_nothing)
        with contextlib.suppress(StoreError):  # the thread is gone, or was about to go
            job.wait()

    def close(self) -> None:
        """Let the threads do what was submitted, and end them. Where a call was interrupted, the next one goes on."""
        self.is_closed = True
        self._jobs.put(None)
        for thread, life in list(self._lives.items()):
            if not life.is_orphan:
                life.wait()
                thread.join()
        self._dismissal.detach()


def _serve(jobs: SimpleQueue[Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # what it returned refers to memory, and the next one may be long in coming
    jobs.put(None)  # for the next thread


def _nothing() -> None:
    pass


def _dismiss(jobs: SimpleQueue[Job[Any] | None], lives: Mapping[threading.Thread, Job[None]]) -> None:
    """End the threads of workers that are gone; of all, when the interpreter ends."""
    jobs.put(None)
    for thread, life in list(lives.items()):
        if thread.ident != threading.get_ident() and not life.is_orphan:
            life.wait(
                _LAST_WAIT_SECONDS
            )  # a thread inside a library while the interpreter goes can end the process badly
