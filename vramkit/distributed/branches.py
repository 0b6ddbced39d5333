"""The two branches of guidance on different ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vramkit.distributed.ranks import Ranks
from vramkit.uncopied import Uncopied

__all__ = ["GuidanceBranches"]


class GuidanceBranches(Uncopied):
    """This rank predicts for the prompt or for the negative prompt, and is given the other prediction: the same bytes."""

    def __init__(self, ranks: Ranks) -> None:
        """Take the ranks that predict for the two prompts, in this order."""
        self._ranks = ranks

    def predictions(
        self, predict: Callable[..., Sequence[Tensor]], positive: Mapping[str, Any], negative: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return both predictions, of which this rank makes one."""
        own = predict((positive, negative)[self._ranks.rank])[0]
        both = own.new_empty(2, *own.shape)
        both[self._ranks.rank] = own
        self._ranks.gather_(both).wait()
        return both[0], both[1]
