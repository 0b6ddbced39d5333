"""Which backend a config means: its name, its config class, and the file that does the work.

A backend is one file with a `Handler` class; it is imported, and the library behind it, when a config asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vramkit.errors import ConfigError
from vramkit.extras import extra
from vramkit.quant.config import (
    BitsAndBytes4bitConfig,
    BitsAndBytes8bitConfig,
    Fp8Config,
    GgufConfig,
    QuantConfig,
    QuantoConfig,
)
from vramkit.quant.handler import Handler

__all__ = ["BACKENDS", "as_config", "config_class", "handler_for"]

# Config class -> the module that handles it.
_HANDLERS: Mapping[type[QuantConfig], str] = MappingProxyType(
    {
        BitsAndBytes4bitConfig: "vramkit.quant.bitsandbytes_4bit",
        BitsAndBytes8bitConfig: "vramkit.quant.bitsandbytes_8bit",
        QuantoConfig: "vramkit.quant.quanto",
        Fp8Config: "vramkit.quant.fp8",
        GgufConfig: "vramkit.quant.gguf",
    }
)
BACKENDS: Mapping[str, type[QuantConfig]] = MappingProxyType(
    {kind.backend: kind for kind in _HANDLERS if kind is not GgufConfig}
)
"""Name of a backend that quantizes -> config class."""


def config_class(backend: str) -> type[QuantConfig]:
    """The config class of a backend.

    Raises:
        ConfigError: there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"quant_backend={backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[backend]


def as_config(config: Any) -> QuantConfig:
    """Our config of what a user gives: one of ours, a saved one, or the `BitsAndBytesConfig` or `QuantoConfig` of a peer.

    Raises:
        ConfigError: something else.
    """
    if isinstance(config, QuantConfig):
        return config
    options = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"a quantization config was given as {type(config).__name__}; expected "
            f"{', '.join(kind.__name__ for kind in _HANDLERS)}, or BitsAndBytesConfig or QuantoConfig of a peer"
        )
    backend = options.get("backend") or _peer_backend(options)
    private = ("backend", "quant_method")
    given = {key: value for key, value in options.items() if key not in private and not key.startswith("_")}
    return (GgufConfig if backend == GgufConfig.backend else config_class(backend)).from_options(given)


def handler_for(config: QuantConfig) -> Handler:
    """Import the backend of `config` and return what quantizes by it.

    Raises:
        ConfigError: the backend's package is not installed; names the extra that brings it.
    """
    with extra("quant", needed_for=config.backend):
        module = importlib.import_module(_HANDLERS[type(config)])
    handler: Handler = module.Handler(config)
    return handler


def _peer_backend(options: Mapping[str, Any]) -> str:
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method")))
    if method == "bitsandbytes":
        if options.get("load_in_8bit"):
            return BitsAndBytes8bitConfig.backend
        if options.get("load_in_4bit"):
            return BitsAndBytes4bitConfig.backend
        raise ConfigError("the bitsandbytes config asks for nothing: set load_in_4bit=True or load_in_8bit=True")
    return method
