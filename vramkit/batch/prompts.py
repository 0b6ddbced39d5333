"""What a batch is to make: a file with a JSON object on each line, and what such a line may say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vramkit.errors import ConfigError

__all__ = ["Prompt", "read_prompts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A clip that is wanted: the name of its file without the ending, and the options of `vramkit run` that make it."""

    name: str
    line: int  # from 1
    settings: Mapping[str, Any]  # by option, such as "prompt", "seed" or "frames"; what JSON can say


def read_prompts(path: Path, defaults: Mapping[str, Any]) -> list[Prompt]:
    """Read the lines of a file; blank ones do not count.

    Args:
        path: a text file, UTF-8. A line such as ``{"prompt": "a cat", "seed": 3, "name": "cat"}``; a name that is left out
            is the number of the line, such as ``"0007"``. Paths of images are relative to the file.
        defaults: what lines have that do not say otherwise, given as options.

    Raises:
        ConfigError: the file cannot be read, has no prompts, or a line is wrong; the message says which one.
    """
    for key, value in defaults.items():
        _check(f"--{key.replace('_', '-')}", key, value)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; give a file with one prompt a line"
        ) from error
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(number, _object(line), defaults, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        first = seen.setdefault(prompt.name.casefold(), number)  # some file systems do not tell a from A
        if first != number:
            raise ConfigError(
                f"{path}, line {number}: the name {prompt.name!r} is that of line {first} too; give each its own"
            )
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f'{path} has no prompts; expected lines such as {{"prompt": "a cat", "seed": 3}}')
    return prompts


def _prompt(number: int, said: dict[str, Any], defaults: Mapping[str, Any], folder: Path) -> Prompt:
    for key, value in said.items():
        if key not in _KEYS:
            raise ConfigError(f"there is no {key!r}; expected {', '.join(_KEYS)}")
        _check(key, key, value)
    if "prompt" not in said:
        raise ConfigError('there is no prompt; expected an object such as {"prompt": "a cat"}')
    name = said.pop("name", f"{number:04d}")
    for image in ("image", "last_image"):
        if image in said and "://" not in said[image]:
            said[image] = str((folder / Path(said[image]).expanduser()).absolute())
    return Prompt(name=name, line=number, settings={**defaults, **said})


def _check(told: str, key: str, value: Any) -> None:
    fits, expected = _KEYS[key]
    if not fits(value):
        raise ConfigError(f"{told} is {_shown(value)}; expected {expected}")


def _object(line: bytes) -> dict[str, Any]:
    """The object on a line, without keys that are given twice."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key in found if [other for other, _ in pairs].count(key) > 1)
            raise ConfigError(f"{twice!r} is given twice; leave one of them out")
        return found

    try:
        said = json.loads(line.decode(), object_pairs_hook=checked)
    except UnicodeDecodeError as error:
        raise ConfigError("it is not UTF-8; save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        place = f" (column {error.colno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f'it is no JSON{place}; expected an object such as {{"prompt": "a cat"}}') from error
    if not isinstance(said, dict):
        raise ConfigError(f'it is {_shown(said)}; expected an object such as {{"prompt": "a cat"}}')
    return said


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_name(value: Any) -> bool:
    if not isinstance(value, str) or value != value.strip() or not 0 < len(value.encode(errors="replace")) <= 200:
        return False
    return value.isprintable() and not value.startswith(".") and not set(value) & set('/\\:*?"<>|')


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return _is_whole(value) and 1 <= value < 2**31


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


_COUNT = _is_count, "a whole number from 1 on"
_PICTURE = _is_text, "the path or address of a picture"
# What a line may say, and what it may be.
_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "name": (
            _is_name,
            'a name for a file, without / \\ : * ? " < > |, a dot in front or spaces around it, up to 200 bytes',
        ),
        "prompt": (_is_text, "text"),
        "negative_prompt": (lambda value: isinstance(value, str), "text, which may be empty"),
        "image": _PICTURE,
        "last_image": _PICTURE,
        "height": _COUNT,
        "width": _COUNT,
        "frames": _COUNT,
        "steps": _COUNT,
        "guidance": (_is_number, "a finite number"),
        "seed": (lambda value: _is_whole(value) and 0 <= value < 2**64, "a whole number from 0 to 2^64 - 1"),
        "fps": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    }
)
