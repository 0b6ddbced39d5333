"""Giving prompts to workers until each clip is there or is known not to come."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from vramkit.batch.journal import Journal
from vramkit.batch.prompts import Prompt
from vramkit.batch.workers import Event, Workers
from vramkit.errors import VramkitError

__all__ = ["Dispatch", "Watcher"]


class Watcher(Protocol):
    """Who is told how a batch goes on."""

    def ready(self, worker: int, detail: str) -> None:
        """A worker has loaded its model."""

    def made(self, prompt: Prompt, seconds: float) -> None:
        """A clip is there."""

    def failed(self, prompt: Prompt, error: str) -> None:
        """A clip will not come to be."""

    def lost(self, worker: int, prompt: Prompt | None, why: str) -> None:
        """A worker is gone, and its prompt waits for another one."""

    def progress(self, clips: float) -> None:
        """So many clips are there or given up, parts of those in progress counted."""


class Dispatch:
    """Prompts on their way through workers.

    A worker that is gone is replaced while there is something to do; what it was at goes to the next one, unless its clip is
    there, or it has been given `retries` times more than once.

    Args:
        prompts: what is to be made; nothing of it is there yet.
        workers: who makes it.
        journal: is told before and after.
        count: how many workers there are at a time; no more than there are prompts.
        retries: how often a prompt is given to another worker when one is lost, and a worker started again that is lost
            before it was ready.
        watcher: is told how it goes on.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        workers: Workers,
        journal: Journal,
        *,
        count: int,
        retries: int,
        watcher: Watcher,
    ) -> None:
        self._waiting = deque(prompts)
        self._workers = workers
        self._journal = journal
        self._count = count
        self._retries = retries
        self._watcher = watcher
        self._starting: set[int] = set()
        self._idle: list[int] = []
        self._busy: dict[int, tuple[Prompt, float]] = {}  # and when it was given
        self._attempts: Counter[str] = Counter()
        self._false_starts = 0
        self._settled = 0
        self.failures: dict[str, str] = {}
        """Why there is no clip, by the names of prompts."""

    def run(self) -> None:
        """Return when there is nothing more to do; an exception leaves the journal as the next run needs it.

        Raises:
            VramkitError: no worker can be had, since the model cannot be loaded or takes each worker with it.
        """
        while self._waiting or self._busy:
            self._employ()
            for event in self._workers.wait():
                self._handle(event)
            shares = sum(self._workers.share(worker) for worker in self._busy)
            self._watcher.progress(self._settled + shares)

    def _employ(self) -> None:
        """Give what waits to those who are idle, and start as many as there is work for."""
        while self._waiting and self._idle:
            worker, prompt = self._idle.pop(), self._waiting.popleft()
            self._attempts[prompt.name] += 1
            self._journal.begin(prompt, worker=str(worker))
            self._busy[worker] = prompt, time.monotonic()
            self._workers.give(worker, prompt, self._attempts[prompt.name])
        wanted = min(self._count, len(self._waiting) + len(self._busy))
        for _ in range(wanted - len(self._busy) - len(self._idle) - len(self._starting)):
            self._starting.add(self._workers.start())

    def _handle(self, event: Event) -> None:
        worker = event.worker
        if event.kind == "unable":
            raise VramkitError(f"the model cannot be loaded by a worker: {event.detail}")
        if event.kind == "ready":
            self._starting.discard(worker)
            self._idle.append(worker)
            self._false_starts = 0
            self._watcher.ready(worker, event.detail)
        elif event.kind == "lost":
            self._lose(worker, event.detail)
        else:
            prompt, given_s = self._busy.pop(worker)
            self._idle.append(worker)
            if event.kind == "made":
                self._made(prompt, time.monotonic() - given_s)
            else:
                self._failed(prompt, event.detail)

    def _lose(self, worker: int, why: str) -> None:
        prompt, given_s = self._busy.pop(worker, (None, 0.0))
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self._starting:
            self._starting.discard(worker)
            self._false_starts += 1
            if self._false_starts > self._retries:
                raise VramkitError(
                    f"{self._false_starts} workers in a row were lost while they loaded the model: {why}"
                )
        if prompt is None:
            self._watcher.lost(worker, None, why)
        elif self._journal.is_there(prompt):  # it was lost on its way to tell
            self._made(prompt, time.monotonic() - given_s)
        elif self._attempts[prompt.name] > self._retries:
            self._failed(prompt, f"its worker was lost, {self._attempts[prompt.name]} times: {why}")
        else:
            self._waiting.appendleft(prompt)
            self._watcher.lost(worker, prompt, why)

    def _made(self, prompt: Prompt, seconds: float) -> None:
        self._settled += 1
        self._journal.made(prompt, seconds=seconds)
        self._watcher.made(prompt, seconds)

    def _failed(self, prompt: Prompt, error: str) -> None:
        self._settled += 1
        self.failures[prompt.name] = error
        self._journal.failed(prompt, error)
        self._watcher.failed(prompt, error)
