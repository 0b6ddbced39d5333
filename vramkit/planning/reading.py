"""Frozen data from what JSON holds: every field is there, of its type, and no number is below zero."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vramkit.errors import ConfigError

__all__ = ["read_as"]

T = TypeVar("T")


def read_as(kind: type[T], value: Any, where: str) -> T:
    """Return `value`, as JSON has it, as a dataclass; `where` it stands is for errors.

    Raises:
        ConfigError: a key that is missing or unknown, or a value of another type or range; names it.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {_short(value)}; expected an object with keys and values")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(value.keys() - fields.keys()):
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; expected {', '.join(fields)}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in value]:
        raise ConfigError(f"{where} has no {missing[0]!r}")
    types_of = get_type_hints(kind)
    return kind(**{name: _read(types_of[name], given, f"{where}.{name}") for name, given in value.items()})


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _read(next(option for option in options if option is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {_short(value)}; expected a list")
        return tuple(_read(options[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return read_as(kind, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        is_right, expected = value in options, f"one of {', '.join(map(repr, options))}"
    elif kind is int:
        is_right, expected = type(value) is int and value >= 0, "a whole number, at least 0"
    elif kind is float:
        is_right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        expected = "a number, at least 0"
    elif origin is not None and issubclass(origin, Mapping):
        is_right, expected = isinstance(value, Mapping), "an object with keys and values"
    else:
        is_right, expected = isinstance(value, kind), {str: "a text", bool: "true or false"}.get(kind, kind.__name__)
    if not is_right:
        raise ConfigError(f"{where} is {_short(value)}; expected {expected}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
