"""Tiles that several ranks compute, in the rehearsal of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

from torch import Tensor, nn

from vramkit.distributed.tiles import has_exact_tiles, owners
from vramkit.pipelines.networks.video_autoencoder import VideoAutoencoder

__all__ = ["RehearsedTiles"]


class RehearsedTiles:
    """Stands for the ranks of a mesh: computes what each of them does, one after the other, so that the fullest counts.

    Its work is that of all ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @classmethod
    def share(cls, modules: Iterable[nn.Module], size: int) -> None:
        """Let autoencoders among `modules` compute what so many ranks do, where `parallelize` lets ranks share it."""
        for module in modules:
            if isinstance(module, VideoAutoencoder) and has_exact_tiles(module):
                module.tile_ranks = cls(size)

    def computed(
        self, shapes: Sequence[tuple[int, ...]], makes: Sequence[Callable[[], Tensor]], like: Tensor
    ) -> Iterator[Tensor]:
        """Yield the tiles of `shapes` as the first rank has them: its own, and those that it is given."""
        of = owners([prod(shape) for shape in shapes], self.size)
        own: dict[int, Tensor] = {}
        for rank in reversed(range(self.size)):
            own.clear()
            for at, make in enumerate(makes):
                if of[at] == rank:
                    own[at] = make()
        for at, shape in enumerate(shapes):
            yield own.pop(at).contiguous() if at in own else like.new_empty(shape)
