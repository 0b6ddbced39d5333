"""What workers of Ray do in tests. In a module of its own, since they import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from vramkit.batch import Prompt
from vramkit.commands.clips import ClipJob
from vramkit.errors import ConfigError


class ClumsyJob(ClipJob):
    """Dies the first time that it makes "dies", with a file that is not whole, and never makes "fails"."""

    def make(self, prompt: Prompt, attempt: int) -> None:
        if prompt.name == "fails":
            raise ConfigError("this one\nis not to be")
        super().make(prompt, attempt)
        if prompt.name == "dies" and attempt == 1:
            whole = self._folder / "dies.mp4"
            (self._stage / "dies.1.mp4").write_bytes(whole.read_bytes()[:100])
            whole.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


class PaperJob:
    """Writes files without a model. What a prompt says is what happens to it."""

    def __init__(self, folder: Path, load: str = "") -> None:
        self._folder = folder
        self._load = load

    def load(self) -> str:
        _happen(self._load)
        return "weights"

    def make(self, prompt: Prompt, attempt: int) -> None:
        with (self._folder / f"{prompt.name}.mp4").open("x") as file:  # a second time is an error
            file.write(str(os.getpid()))
        _happen(prompt.settings["prompt"])

    def share(self) -> float:
        return 0.5


def _happen(what: str) -> None:
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(600)
    elif what == "refuse":
        raise ConfigError("it is refused")
    elif what == "break":
        raise type("AcceleratorError", (RuntimeError,), {})("an illegal address")
