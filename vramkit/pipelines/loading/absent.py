"""Names of diffusers' classes that there are not here, each with the way here."""

from __future__ import annotations

from typing import Any, NoReturn

from vramkit.errors import ConfigError

__all__ = ["Absent"]


class Absent:
    """A method that a class does not have: a call of it raises ConfigError, which says what there is instead."""

    def __init__(self, way: str) -> None:
        self.way = way
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
            raise ConfigError(f"{owner.__name__} has no {self._name}(): {self.way}")

        return refuse
