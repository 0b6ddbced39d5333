"""The options of models and schedulers: names and kinds of values checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from vramkit.errors import ConfigError

__all__ = ["make_options"]

Options = TypeVar("Options")


def make_options(options_class: type[Options], given: Mapping[str, Any], *, owner: str) -> Options:
    """An instance of a dataclass from the keys of a JSON file or of a call.

    Args:
        options_class: a dataclass; its annotations say which values fit. It checks ranges by itself.
        given: options by name.
        owner: whose options they are, for the message.

    Raises:
        ConfigError: a name that the class does not have, or a value of another kind.
    """
    hints = get_type_hints(options_class)
    if unknown := sorted(given.keys() - hints.keys()):
        raise ConfigError(f"{owner}: unknown options {unknown}, expected some of {sorted(hints)}")
    for name, value in given.items():
        if not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", None) if get_origin(hints[name]) is None else hints[name]
            raise ConfigError(f"{owner}: option {name}={value!r}, expected {expected}")
    return options_class(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation's kind; lists stand for tuples, and null for false, as in JSON."""
    if hint in (Any, NoneType):  # why an option has to stay null is the class's to say
        return True
    if isinstance(hint, UnionType):
        return any(value is None if kind is NoneType else _fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is bool:
        return value is None or isinstance(value, bool)
    kind = {int: Integral, float: Real}.get(hint, hint)
    return isinstance(value, kind) and not isinstance(value, bool)
