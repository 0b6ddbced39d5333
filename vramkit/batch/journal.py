"""The journal of a batch: what was begun, made and not made, in a file that a later run goes on with."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from vramkit import __version__
from vramkit.batch.prompts import Prompt
from vramkit.errors import CheckpointError, ConfigError, StoreError

__all__ = ["Entry", "Journal"]

_FORMAT = "vramkit batch 1"
_STAGE = ".vramkit-batch-"
_HEAD = b'{"format": "vramkit batch'
State = Literal["begun", "made", "failed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """The last that was noted of a name, and what it was to be made of."""

    state: State
    settings: Mapping[str, Any]


class Journal:
    """What became of the prompts of a folder; one run at a time has it open.

    A clip is begun before a worker gets it and gets its name when it is whole. So one that was begun and is there was made,
    whether or not somebody lived to note it, and a file that was never begun belongs to somebody else.

    Args:
        folder: where the clips are; there has to be such a folder.
        shared: what all prompts are made with, such as the model. Plain data.

    Raises:
        ConfigError: another run has it open.
        CheckpointError: the file is damaged, or is no journal.
        StoreError: it cannot be written.
    """

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.stage = folder / f"{_STAGE}{secrets.token_hex(4)}"
        """Where files are that are not whole; there while the journal is open."""
        self._shared = shared
        from vramkit.offload.disk import lock_file  # noqa: PLC0415 - a file of prompts is read and refused without the engine

        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror or error}; choose another folder"
            ) from error
        try:
            if lock_file(self._file.fileno()) is False:
                raise ConfigError(f"{self.path} is open in another run: wait for it, or choose another --out")
            self._entries = self._read()
            self._clean()
            self.stage.mkdir()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it, and leave nothing that is not whole."""
        self._clean()
        self._file.close()

    def video(self, prompt: Prompt) -> Path:
        """The file that the clip of a prompt is in when it is made."""
        return self.folder / f"{prompt.name}.mp4"

    def is_there(self, prompt: Prompt) -> bool:
        """Whether the clip of a prompt is whole."""
        return os.path.lexists(self.video(prompt))

    def remaining(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """What is still to be made; nothing is noted.

        Raises:
            ConfigError: a clip of a name is there and was made of something else, or by somebody else.
        """
        return [prompt for prompt in prompts if not self._is_made(prompt)]

    def begin(self, prompt: Prompt, *, worker: str) -> None:
        """Note that a worker is about to get a prompt."""
        self._note("begun", prompt, worker=worker)

    def made(self, prompt: Prompt, *, seconds: float | None = None) -> None:
        """Note that its clip is there."""
        self._note("made", prompt, **({} if seconds is None else {"seconds": round(seconds, 3)}))

    def failed(self, prompt: Prompt, error: str) -> None:
        """Note why there will be no clip; a later run tries again."""
        self._note("failed", prompt, error=error)

    def _clean(self) -> None:
        """Remove what is not whole, of runs too that were killed."""
        for stage in self.folder.glob(f"{_STAGE}*"):
            shutil.rmtree(stage, ignore_errors=True)

    def _is_made(self, prompt: Prompt) -> bool:
        if not self.is_there(prompt):
            return False
        video, entry = self.video(prompt), self._entries.get(prompt.name)
        if entry is None:
            raise ConfigError(
                f"{video} is there, and this folder's journal does not know it: move it away, or choose another --out"
            )
        now, then = self._settings(prompt), entry.settings
        if changed := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
            key = changed[0]
            raise ConfigError(
                f"{video} was made with {key} {json.dumps(then.get(key))}, and line {prompt.line} asks for "
                f"{json.dumps(now.get(key))}: give the line another name, remove the clip, or choose another --out"
            )
        return True

    def _settings(self, prompt: Prompt) -> dict[str, Any]:
        return {**self._shared, **prompt.settings}

    def _note(self, state: State, prompt: Prompt, **details: Any) -> None:
        settings = self._settings(prompt)
        self._entries[prompt.name] = Entry(state, settings)
        told = {"name": prompt.name, "state": state, "time": round(time.time(), 3)} | details
        self._write(told | ({"settings": settings} if state == "begun" else {}))

    def _write(self, told: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(told, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror or error}; make room and run again"
            ) from error

    def _read(self) -> dict[str, Entry]:
        """The last entry of each name; a line that was torn off by a crash is dropped."""
        self._file.seek(0)
        content = self._file.read()
        if not (content.startswith(_HEAD) or _HEAD.startswith(content)):
            raise CheckpointError(f"{self.path} is no journal of `vramkit batch`; choose another folder")
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if lines and self._parsed(lines[0], 1)["format"] != _FORMAT:
            raise CheckpointError(f"{self.path} is of another version of vramkit; choose another folder")
        entries: dict[str, Entry] = {}
        for number, line in enumerate(lines[1:], start=2):
            told = self._parsed(line, number)
            name, before = told["name"], entries.get(told["name"])
            settings = told.get("settings", None if before is None else before.settings)
            if told.get("state") not in get_args(State) or not isinstance(settings, dict):
                raise self._damaged(number)
            entries[name] = Entry(told["state"], settings)
        self._file.truncate(len(whole))
        if not lines:
            self._write({"format": _FORMAT, "vramkit": __version__})
        return entries

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            told = json.loads(line)
        except ValueError as error:
            raise self._damaged(number) from error
        if not isinstance(told, dict) or not isinstance(told.get("name" if number > 1 else "format"), str):
            raise self._damaged(number)
        return told

    def _damaged(self, number: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}, line {number} is damaged: remove the line and the clip that it may be about, or choose another "
            "folder"
        )
