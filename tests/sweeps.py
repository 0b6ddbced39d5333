"""Sweeps over many like cases, of which the default run takes few that meet all there is to meet."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

__all__ = ["sweep"]


def sweep(names: str, cases: Iterable[tuple[Any, ...]], *, together: int = 2) -> pytest.MarkDecorator:
    """Parametrize a test by `cases`, and leave those to ``--thorough`` that the others stand for.

    By default each two values of different parameters (or as many as `together` says: with 1 each value by itself) meet in
    one case at the least, where they do in any.
    """
    cases = list(cases)
    kept = set(_few([tuple(map(repr, case)) for case in cases], together))
    marks = [() if at in kept else pytest.mark.thorough for at in range(len(cases))]
    return pytest.mark.parametrize(
        names.split(), [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]
    )


def _few(cases: list[tuple[str, ...]], together: int) -> Iterator[int]:
    """Yield the places of cases that have all meetings: each time the one with most new ones, of values used least."""
    meetings = [set(itertools.combinations(enumerate(case), together)) for case in cases]
    left, used = set().union(*meetings), Counter[tuple[int, str]]()
    while left:
        best = max(
            range(len(cases)), key=lambda at: (len(meetings[at] & left), -sum(used[v] for v in enumerate(cases[at])))
        )
        yield best
        left -= meetings[best]
        used.update(enumerate(cases[best]))
