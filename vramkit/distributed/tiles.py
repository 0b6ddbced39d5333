"""The tiles of a picture on different ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

from torch import Tensor, nn

from vramkit.distributed.ranks import Ranks
from vramkit.uncopied import Uncopied

__all__ = ["TileRanks", "has_exact_tiles", "owners"]


class TileRanks(Uncopied):
    """Each rank computes some of the tiles, and is given the others; blending is the same on all."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.size = ranks.size

    def computed(
        self, shapes: Sequence[tuple[int, ...]], makes: Sequence[Callable[[], Tensor]], like: Tensor
    ) -> Iterator[Tensor]:
        """Yield the tiles of `shapes`, in order, in the dtype and on the device of `like`; `makes` compute one each."""
        of = owners([prod(shape) for shape in shapes], self._ranks.size)
        own = {at: make() for at, make in enumerate(makes) if of[at] == self._ranks.rank}
        for at, shape in enumerate(shapes):
            tile = own.pop(at).contiguous() if at in own else like.new_empty(shape)
            self._ranks.broadcast_(tile, of[at]).wait()
            yield tile


def has_exact_tiles(autoencoder: nn.Module) -> bool:
    """Whether tiles may be computed in any order: a decoder that draws noise draws another one for each tile then."""
    return not any(getattr(autoencoder.config, "decoder_inject_noise", ()))


def owners(costs: Sequence[int], ranks: int) -> list[int]:
    """Return who computes what: the largest first, each by the rank that has least to do yet."""
    loads = [0] * ranks
    found = [0] * len(costs)
    for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        found[at] = loads.index(min(loads))
        loads[found[at]] += costs[at]
    return found
