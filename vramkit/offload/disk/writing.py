"""Files and folders of files, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vramkit.errors import ConfigError, StoreError

__all__ = ["atomic_write", "staged_folder"]

# The files that hold the weights of one name: the only one, or a shard, or the index of shards, that of a variant too.
_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<variant>\.[\w-]+)?\.json)?")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it takes the name only when all was written and synced.

    It has the permissions that the user's umask leaves.

    Raises:
        ConfigError: `folder` is no path.
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _unused_beside(path)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise StoreError(f"writing {path} failed: {error.strerror or error}; nothing was kept of it") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder for files, of whoever writes them, that move into `folder` when all are written.

    They get the permissions that the user's umask leaves. Weights of the same name that `folder` had go, shards and index
    too; its other files stay.

    Raises:
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind then, nor after any other
            error, and what `folder` held is as it was.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ConfigError(f"{type(folder).__name__} was given, expected the path of a folder")
    if not os.fspath(folder):
        raise ConfigError("an empty path was given, expected that of a folder; '.' is the one that the program runs in")
    folder = Path(folder).expanduser().absolute()
    missing = [parent for parent in folder.parents if not parent.exists()]
    stage = folder / f".{secrets.token_hex(4)}.partial" if folder.is_dir() else _unused_beside(folder)
    try:
        stage.mkdir(parents=True)
        yield stage
        _move_in(stage, folder)
        missing = []
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"writing {folder} failed: {error.strerror or error}; nothing was kept of it") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in missing:  # the innermost first; those that somebody uses by now stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def _unused_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _move_in(stage: Path, folder: Path) -> None:
    readable = stage.stat().st_mode & 0o666  # of a folder that was made by the umask
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    for file in files:
        file.chmod(readable)
    if not folder.exists():
        stage.replace(folder)
        return
    for file in files:
        target = folder / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    written = {folder / file.relative_to(stage) for file in files}
    names = {(path.parent, name) for path in written if (name := _name_of_weights(path))}
    for parent in {parent for parent, _ in names}:
        for path in set(parent.iterdir()) - written:
            if (parent, _name_of_weights(path)) in names:
                path.unlink(missing_ok=True)


def _name_of_weights(path: Path) -> str | None:
    """Return the name that all files of the same weights have in common, with their variant; None for other files."""
    found = _WEIGHTS.fullmatch(path.name)
    return None if found is None else found["stem"] + (found["variant"] or "")
