"""Faults that vramkit must survive, and how often each was tried: ``python -m benchmarks.faults``.

A kind of fault is one file here with

    COUNT: how many cases a full run tries;
    run(count, seed): tries that many, the same ones for the same seed, and returns how many ended how.

Every outcome has a name of its own ("accepted", "refused", "same bytes after"). What may not be (a raw exception, other
numbers, a descriptor that is left) is counted as `BROKEN`, told by `tell` at once with all that is needed to try it again,
and does not end the run. A file whose name begins with an underscore is no kind.
"""

from __future__ import annotations

import sys

__all__ = ["BROKEN", "tell"]

BROKEN = "broken"


def tell(kind: str, case: object, what: object) -> None:
    """Say on stderr how one case went wrong."""
    print(f"{kind}: case {case}: {str(what)[:400]}", file=sys.stderr, flush=True)
