"""Clips too large for one pass, computed in overlapping tiles of the picture and of the frames, their seams blended.

Shared by the video autoencoders. The tile sizes, the order of the blends and the linear ramp are those of the tiled modes
in diffusers, so that a tiled result is the same there and here; what differs is what stays in memory: one tile and the
overlaps within a picture. Frames that two tiles give lie in the result from the first to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from vramkit.errors import ConfigError

__all__ = [
    "Box",
    "FrameTile",
    "FrameTiling",
    "TileRanks",
    "Tiling",
    "blend_",
    "fade_in_",
    "fill_by_rows",
    "fill_by_tiles",
    "fill_clip",
    "frame_tiles",
    "magnified",
    "reduced",
]

# Frames, rows and columns of a tile in the units of the result, to the end where the stop is None; may reach beyond it.
Box: TypeAlias = tuple[slice, slice, slice]


def magnified(part: slice, ratio: int) -> slice:
    """What a part of latents stands for in pixels or frames, `ratio` of them each."""
    return slice(part.start * ratio, None if part.stop is None else part.stop * ratio)


def reduced(part: slice, ratio: int) -> slice:
    """The latents that stand for a part of pixels or frames, `ratio` of them each."""
    return slice(part.start // ratio, None if part.stop is None else part.stop // ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Height and width of a tile and the distance from one tile to the next, in pixels or latents.

    Raises:
        ConfigError: a size or distance below one or no whole number, or tiles that leave a gap.
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
            if not all(isinstance(each, Integral) for each in (size, stride)):
                raise ConfigError(f"Tiles of {side} {size!r} at a distance of {stride!r}; expected whole numbers.")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameTiling:
    """Frames that a tile gives and the distance from one tile to the next, in frames of video or of latents.

    The autoencoders are causal, and the first frame of a clip is a latent frame of its own. So each tile begins with one
    frame more, which is a result in the first tile only.

    Raises:
        ConfigError: a size or distance below one, or tiles that leave a gap.
    """

    frames: int = 16
    stride: int = 12

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.frames:
            raise ConfigError(
                f"Tiles of {self.frames} frames at a distance of {self.stride} leave gaps; "
                "choose a stride from 1 to the tile's frames."
            )

    def scaled_down(self, ratio: int) -> FrameTiling:
        """The same tiles measured in latent frames of `ratio` frames each.

        Raises:
            ConfigError: frames or stride are no multiple of `ratio`.
        """
        for name in ("frames", "stride"):
            if getattr(self, name) % ratio:
                raise ConfigError(
                    f"Tile {name} {getattr(self, name)} is no multiple of {ratio}, the frames per latent frame."
                )
        return FrameTiling(frames=self.frames // ratio, stride=self.stride // ratio)

    def is_needed(self, frames: int) -> bool:
        """Whether a clip of so many frames is longer than one tile."""
        return frames > self.frames


class FrameTile(NamedTuple):
    """A part of a clip, in frames of the result."""

    begin: int  # where its computation begins
    frames: slice  # what it gives: from `begin` in the first tile, from the frame after that in the others
    shared: int  # how many of these the tile before gave as well


def frame_tiles(frames: int, tiling: FrameTiling) -> Iterator[FrameTile]:
    """The tiles of a result of `frames` frames, in order; `tiling` is in the units of the result."""
    for begin in range(0, frames, tiling.stride):
        start, stop = begin + (begin > 0), min(begin + tiling.frames + 1, frames)
        if start < stop:
            yield FrameTile(begin, slice(start, stop), min(tiling.frames - tiling.stride, stop - start) if begin else 0)


class TileRanks(Protocol):
    """Ranks that compute the tiles of a clip together; see `vramkit.distributed.tiles`."""

    size: int

    def computed(
        self, shapes: Sequence[tuple[int, ...]], makes: Sequence[Callable[[], Tensor]], like: Tensor
    ) -> Iterator[Tensor]:
        """Yield the tiles of `shapes`, in order, in the dtype and on the device of `like`; `makes` compute one each."""


def _computed(
    ranks: TileRanks | None, shapes: Sequence[tuple[int, ...]], makes: Sequence[Callable[[], Tensor]], like: Tensor
) -> Iterator[Tensor]:
    """Yield the tiles that `makes` compute, each when it is asked for; on several ranks some of each row's before that."""
    if ranks is None:
        yield from (make() for make in makes)
    else:
        yield from ranks.computed(shapes, makes, like)


def fade_in_(out: Tensor, tile: Tensor, *, shared_frames: int) -> None:
    """Write `tile` into `out`, both [..., F, H, W]; its first frames fade in from the `shared_frames` that `out` holds.

    `tile` is overwritten.
    """
    if shared_frames:
        blend_(tile, out[..., :shared_frames, :, :], dim=-3)
    out.copy_(tile)


def fill_by_tiles(
    out: Tensor,
    tiling: Tiling,
    compute_tile: Callable[[int, int], Tensor],
    *,
    shared_frames: int = 0,
    ranks: TileRanks | None = None,
) -> Tensor:
    """Fill `out` [..., H, W] tile by tile, each blended into its neighbours above and to the left, and return it.

    `tiling` is in the units of `out`. `compute_tile(top, left)` returns the tile that begins there, cut off where `out`
    ends; it is overwritten. With `shared_frames`, `out` is [..., F, H, W] and fades from what its first frames hold. With
    `ranks`, which make the same call, each computes some of the tiles of a row.
    """
    overlap_height = tiling.height - tiling.stride_height
    overlap_width = tiling.width - tiling.stride_width
    above: list[Tensor] = []  # the lower edges of the row of tiles before
    height, width = out.shape[-2:]
    lefts = range(0, width, tiling.stride_width)
    for top in range(0, height, tiling.stride_height):
        lower_edges: list[Tensor] = []
        right_edge: Tensor | None = None
        rows = min(tiling.height, height - top)
        shapes = [(*out.shape[:-2], rows, min(tiling.width, width - left)) for left in lefts]
        tiles = _computed(ranks, shapes, [partial(compute_tile, top, left) for left in lefts], out)
        for column, left in enumerate(lefts):
            tile = next(tiles)
            if above:
                blend_(tile, above[column], dim=-2)
            if right_edge is not None:
                blend_(tile, right_edge, dim=-1)
            right_edge = _last(tile, overlap_width, dim=-1).clone()
            lower_edges.append(_last(tile, overlap_height, dim=-2).clone())
            kept = tile[..., : tiling.stride_height, : tiling.stride_width]
            place = out[..., top : top + kept.shape[-2], left : left + kept.shape[-1]]
            fade_in_(place, kept, shared_frames=shared_frames)
            del tile, kept  # before the next one is computed
        above = lower_edges
    return out


def fill_by_rows(out: Tensor, ratio: int, compute_rows: Callable[[slice, int], Tensor], ranks: TileRanks) -> Tensor:
    """Fill `out` [..., H, W], `ratio` rows for each of the latents, of whose rows each of the ranks computes a part.

    `compute_rows(part, ranks)` returns what a part of the rows of latents becomes on one of so many ranks.
    """
    latents = out.shape[-2] // ratio
    edges = [latents * rank // ranks.size for rank in range(ranks.size + 1)]
    parts = [slice(start, stop) for start, stop in pairwise(edges) if start < stop]
    places = [out[..., ratio * part.start : ratio * part.stop, :] for part in parts]
    makes = [partial(compute_rows, part, len(parts)) for part in parts]
    for place, rows in zip(places, ranks.computed([tuple(place.shape) for place in places], makes, out), strict=True):
        place.copy_(rows)
    return out


def fill_clip(
    out: Tensor,
    compute_tile: Callable[[Box], Tensor],
    *,
    tiling: Tiling | None,
    frame_tiling: FrameTiling | None,
    kept_frames: slice = slice(1, None),
    ranks: TileRanks | None = None,
) -> Tensor:
    """Fill `out` [..., F, H, W] tile by tile and return it.

    Args:
        out: the result.
        compute_tile: makes the tile of a box, cut off where `out` ends; it is overwritten.
        tiling: tiles of the picture in the units of `out`, None for whole pictures.
        frame_tiling: tiles of the frames in the units of `out`, None for all frames at once.
        kept_frames: what to take of tiles after the first, which are one frame longer than what they give.
        ranks: that make the same call, and compute some of the tiles each; None for none.
    """
    whole = FrameTile(0, slice(0, out.shape[-3]), 0)
    tiles = [whole] if frame_tiling is None else list(frame_tiles(out.shape[-3], frame_tiling))
    places = [out[..., tile.frames, :, :] for tile in tiles]

    def compute(tile: FrameTile, rows: slice, columns: slice) -> Tensor:
        frames = slice(tile.begin, None if frame_tiling is None else tile.begin + frame_tiling.frames + 1)
        kept = kept_frames if tile.begin else slice(None)
        return compute_tile((frames, rows, columns))[..., kept, :, :]

    if tiling is None:
        everywhere = slice(0, None)
        makes = [partial(compute, tile, everywhere, everywhere) for tile in tiles]
        some = 1 if ranks is None else ranks.size  # so many of a clip are alive at once
        for at in range(0, len(tiles), some):
            part = slice(at, at + some)
            computed = _computed(ranks, [tuple(place.shape) for place in places[part]], makes[part], out)
            for place, tile, frames in zip(places[part], tiles[part], computed, strict=True):
                fade_in_(place, frames, shared_frames=tile.shared)
        return out
    for place, tile in zip(places, tiles, strict=True):

        def compute_box(top: int, left: int, tile: FrameTile = tile, tiling: Tiling = tiling) -> Tensor:
            return compute(tile, slice(top, top + tiling.height), slice(left, left + tiling.width))

        fill_by_tiles(place, tiling, compute_box, shared_frames=tile.shared, ranks=ranks)
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
