"""The options of models and schedulers: names and kinds of values checked before anything is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from vramkit.errors import ConfigError

__all__ = ["Config", "FrozenConfig", "make_options", "refuse_arguments"]

Options = TypeVar("Options")


class Config:
    """Options as attributes, which may be read as those of a mapping too; for dataclasses."""

    __slots__ = ()

    def keys(self) -> list[str]:
        """Names of the options."""
        return [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an option, or something else where there is none of that name."""
        return getattr(self, key) if key in self else default

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


class FrozenConfig(dict[str, Any]):
    """Options as items, which may be read as attributes too, and are never written."""

    way: ClassVar[str] = "options are attributes of their owner"  # instead of writing

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(f"the config has no option {key!r}")
        return self[key]

    def _refuse(self, *_args: Any, **_kwargs: Any) -> Any:
        raise ConfigError(f"a config is not changed in place: {self.way}")

    __setitem__ = __delitem__ = __ior__ = __setattr__ = __delattr__ = _refuse
    update = pop = popitem = setdefault = clear = _refuse

    def __reduce__(self) -> tuple[type[FrozenConfig], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"


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


def refuse_arguments(call: str, given: Mapping[str, Any], ways: Mapping[str, str]) -> None:
    """Refuse arguments that a call does not have, with the way here for those that it has elsewhere.

    Args:
        call: its name, for the message.
        given: what was given beside its own arguments; None, and False, ask for nothing.
        ways: what to do instead, by the names of arguments that are known from elsewhere.

    Raises:
        ConfigError: for the first argument that asks for something.
    """
    for name, value in given.items():
        if name not in ways:
            raise ConfigError(f"{call} has no argument {name!r}")
        if value is not None and value is not False:
            raise ConfigError(f"{call}: {name}={value!r} is not taken; {ways[name]}")


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
