"""Workers: whoever makes clips, one at a time each, and may die of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from vramkit.batch.prompts import Prompt

__all__ = ["Event", "Job", "Workers"]


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a worker.

    - ``ready``: its model is loaded; the detail says where it is and how it holds its weights.
    - ``unable``: its model cannot be loaded, and would not be by others; the detail is the error.
    - ``made``: the clip that it was given is there.
    - ``failed``: there will be no clip of what it was given; the detail is the error. The worker goes on.
    - ``lost``: it is gone, whatever it was at; the detail says why.
    """

    worker: int
    kind: Literal["ready", "unable", "made", "failed", "lost"]
    detail: str = ""


class Job(Protocol):
    """What a worker does, in its own process. It is pickled."""

    def load(self) -> str:
        """Load the model and say how it is held; VramkitError where that cannot be."""

    def make(self, prompt: Prompt, attempt: int) -> None:
        """Make the clip of a prompt, whole or not at all; any Exception is the prompt's own fault."""

    def share(self) -> float:
        """How much of the clip in progress is done, 0 to 1; asked by another thread."""


class Workers(Protocol):
    """A number of workers that are known by their numbers."""

    def start(self) -> int:
        """Begin to start one more and return its number; an event tells when it is ready."""

    def give(self, worker: int, prompt: Prompt, attempt: int) -> None:
        """Let a worker that has nothing to do make a clip."""

    def wait(self) -> list[Event]:
        """What happened since; waits for a while if that is nothing."""

    def share(self, worker: int) -> float:
        """How much of what a worker makes is done, 0 to 1, as far as that is known."""
