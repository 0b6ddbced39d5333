"""Packages that not everybody needs: imported where they are used, and named with the extra that brings them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vramkit.errors import ConfigError

__all__ = ["extra"]


@contextlib.contextmanager
def extra(name: str, *, needed_for: str) -> Iterator[None]:
    """Import optional packages inside: `name` is the extra of pyproject.toml that has them.

    Raises:
        ConfigError: a package is missing or cannot be imported; names it and the extra.
    """
    try:
        yield
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "vramkit":
            raise
        raise ConfigError(
            f"{needed_for} needs the package {error.name}, which cannot be imported ({error}): "
            f'pip install "vramkit[{name}]", or ".[{name}]" in a checkout'
        ) from error
