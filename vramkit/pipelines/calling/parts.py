"""What an object has to be to serve as a component of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from vramkit.errors import ConfigError

__all__ = ["check_component"]


def _is_configured(component: Any) -> bool:
    return isinstance(component, nn.Module) and hasattr(component, "config")


def _is_called(component: Any) -> bool:
    return callable(component) and not inspect.isclass(component) and not isinstance(component, nn.Module)


def _is_scheduler(component: Any) -> bool:
    needed = ("step", "set_timesteps", "timesteps")
    return not inspect.isclass(component) and all(hasattr(component, name) for name in needed)


_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("transformer", _is_configured, "a model with a config"),
    ("vae", _is_configured, "a model with a config"),
    ("text_encoder", lambda component: isinstance(component, nn.Module), "a model of transformers"),
    ("image_encoder", lambda component: isinstance(component, nn.Module), "a model of transformers"),
    ("tokenizer", _is_called, "a tokenizer of transformers"),
    ("image_processor", _is_called, "an image processor of transformers"),
    ("scheduler", _is_scheduler, "one of vramkit, such as UniPCMultistepScheduler.from_config(config)"),
)


def check_component(name: str, component: Any) -> None:
    """Refuse what cannot be the component of that name; None, for one that is missing, always can.

    Raises:
        ConfigError: the object is of another kind.
    """
    for beginning, fits, expected in _KINDS:
        if name.startswith(beginning) and component is not None and not fits(component):
            given = f"the class {component.__name__}" if inspect.isclass(component) else f"a {type(component).__name__}"
            raise ConfigError(f"the {name} is {given}; expected {expected}, or None")
