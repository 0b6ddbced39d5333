"""Names rewritten rule by rule: how every table of spellings here is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

__all__ = ["Rules", "rewritten"]

Rules: TypeAlias = tuple[tuple[str, str], ...]
"""Patterns, and what each becomes wherever it is found; each on top of those before."""


def rewritten(name: str, rules: Iterable[tuple[str | re.Pattern[str], str | Callable[[re.Match[str]], str]]]) -> str:
    """Return a name by all rules, one after the other."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name
