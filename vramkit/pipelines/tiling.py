"""Pictures too large for one pass, computed in overlapping tiles whose seams are blended.

Shared by the video autoencoders. The tile sizes, the order of the blends and the linear ramp are those of the tiled modes
in diffusers, so that a tiled result is the same there and here; what differs is what stays in memory: one tile and the
overlaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vramkit.errors import ConfigError

__all__ = ["Tiling", "blend_", "fill_by_tiles"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Height and width of a tile and the distance from one tile to the next, in pixels or latents.

    Raises:
        ConfigError: a size or distance below one, or tiles that leave a gap.
    """

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        for side, size, stride in (
            ("height", self.height, self.stride_height),
            ("width", self.width, self.stride_width),
        ):
            if not 0 < stride <= size:
                raise ConfigError(
                    f"Tiles of {side} {size} at a distance of {stride} leave gaps; "
                    f"choose a stride from 1 to the tile's {side}."
                )

    def scaled_down(self, ratio: int) -> Tiling:
        """The same tiles measured in latents, `ratio` pixels each.

        Raises:
            ConfigError: a size or distance is no multiple of `ratio`, so tiles of pixels and of latents would not coincide.
        """
        for name in ("height", "width", "stride_height", "stride_width"):
            if getattr(self, name) % ratio:
                raise ConfigError(
                    f"Tile {name} {getattr(self, name)} is no multiple of {ratio}, the pixels per latent."
                )
        return Tiling(
            height=self.height // ratio,
            width=self.width // ratio,
            stride_height=self.stride_height // ratio,
            stride_width=self.stride_width // ratio,
        )

    def is_needed(self, height: int, width: int) -> bool:
        """Whether a picture of this size is larger than one tile."""
        return height > self.height or width > self.width


def fill_by_tiles(out: Tensor, tiling: Tiling, compute_tile: Callable[[int, int], Tensor]) -> Tensor:
    """Fill `out` [..., H, W] tile by tile, each blended into its neighbours above and to the left, and return it.

    `tiling` is in the units of `out`. `compute_tile(top, left)` returns the tile that begins there, cut off where `out`
    ends; it is overwritten.
    """
    overlap_height = tiling.height - tiling.stride_height
    overlap_width = tiling.width - tiling.stride_width
    above: list[Tensor] = []  # the lower edges of the row of tiles before
    for top in range(0, out.shape[-2], tiling.stride_height):
        lower_edges: list[Tensor] = []
        right_edge: Tensor | None = None
        for column, left in enumerate(range(0, out.shape[-1], tiling.stride_width)):
            tile = compute_tile(top, left)
            if above:
                blend_(tile, above[column], dim=-2)
            if right_edge is not None:
                blend_(tile, right_edge, dim=-1)
            kept = tile[..., : tiling.stride_height, : tiling.stride_width]
            out[..., top : top + kept.shape[-2], left : left + kept.shape[-1]] = kept
            right_edge = _last(tile, overlap_width, dim=-1).clone()
            lower_edges.append(_last(tile, overlap_height, dim=-2).clone())
            del tile, kept  # before the next one is computed
        above = lower_edges
    return out


def blend_(tile: Tensor, edge: Tensor, *, dim: int) -> Tensor:
    """Fade from `edge`, the end of the tile before along `dim`, into the beginning of `tile`, which is returned."""
    extent = min(tile.shape[dim], edge.shape[dim])
    if extent == 0:
        return tile
    shape = [1] * tile.ndim
    shape[dim] = extent
    ramp = torch.arange(extent, dtype=torch.float32, device=tile.device).div_(extent).to(tile.dtype).view(shape)
    beginning = tile.narrow(dim, 0, extent)
    torch.lerp(_last(edge, extent, dim=dim), beginning, ramp, out=beginning)
    return tile


def _last(x: Tensor, count: int, *, dim: int) -> Tensor:
    """The last `count` entries of `x` along `dim`, all of it where it is shorter."""
    count = min(count, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - count, count)
