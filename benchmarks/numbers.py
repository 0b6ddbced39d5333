"""Numbers of a command line, refused where they make no sense."""

from __future__ import annotations

import argparse

__all__ = ["above_nothing", "at_least_one"]


def at_least_one(text: str) -> int:
    """Read a whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected a whole number of at least 1")
    return int(text)


def above_nothing(text: str) -> float:
    """Read a number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected a number above 0")
    return number
