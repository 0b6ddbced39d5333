"""Arguments of the calls of modules: as they are given before there is a call, and as a call has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vramkit.errors import ConfigError
from vramkit.planning.calls import Example, arguments_of
from vramkit.planning.generation import Generation, can_generate

__all__ = ["example_of", "key_of", "read_examples"]


def read_examples(target: Any, names: Sequence[str], example: Any, options: Mapping[str, Any]) -> dict[str, Example]:
    """Return by the names of the modules the arguments, or what a language model will generate by `options`.

    Raises:
        ConfigError: a mapping of modules, and no mapping of its names; `options` of something that generates nothing.
    """
    if options:
        if not isinstance(target, nn.Module) or not can_generate(target):
            raise ConfigError(
                f"{next(iter(options))}= is an argument of a pipeline's call, or of generate of a language model; modules "
                "take example="
            )
        return {key_of(names[0], "generate"): Generation.of_options(example, options)}
    if example is None:
        return {}
    if isinstance(target, nn.Module):
        return {names[0]: arguments_of(example)}
    expected = f"expected a mapping with arguments for some of {', '.join(names)}"
    if not isinstance(example, Mapping):
        raise ConfigError(f"example= is a {type(example).__name__}, and the target a mapping of modules; {expected}")
    unknown = [name for name in example if str(name) not in names]
    if unknown:
        raise ConfigError(f"example= has {unknown[0]!r}; {expected}")
    return {str(name): arguments_of(each) for name, each in example.items()}


def example_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Return what a call was given."""
    return arguments_of(args)[0], arguments_of(kwargs)[1]


def key_of(name: str, method: str) -> str:
    """Return the name under which calls of a method of a component are kept."""
    return name if method == "__call__" else f"{name}.{method}"
