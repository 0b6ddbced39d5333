"""What ranks exchange inside of a forward, as operations that a compiler takes in without looking into them.

A compiled graph holds no objects, so a group of ranks goes by its number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vramkit.distributed.ranks import ranks_of

__all__ = ["exchanged", "gathered"]


@torch.library.custom_op("vramkit::exchange", mutates_args={"out"})
def _opaque_exchange(out: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int], number: int) -> None:
    ranks_of(number).exchange(out, given, received, sent).wait()


def exchanged(out: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int], number: int) -> None:
    """`Ranks.exchange` by the ranks of a number, waited for; to a compiler an opaque operation that writes to `out`."""
    if torch.compiler.is_compiling():
        _opaque_exchange(out, given, received, sent, number)
    else:
        ranks_of(number).exchange(out, given, received, sent).wait()


@torch.library.custom_op("vramkit::gather", mutates_args={"whole"})
def _opaque_gather(whole: Tensor, number: int) -> None:
    ranks_of(number).gather_(whole).wait()


def gathered(whole: Tensor, number: int) -> None:
    """`Ranks.gather_` by the ranks of a number, in the same way."""
    if torch.compiler.is_compiling():
        _opaque_gather(whole, number)
    else:
        ranks_of(number).gather_(whole).wait()
