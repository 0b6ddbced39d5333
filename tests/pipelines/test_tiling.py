from __future__ import annotations

import pytest
import torch

from vramkit.errors import ConfigError
from vramkit.pipelines.networks.tiling import FrameTiling, Tiling, blend_, fade_in_, fill_by_tiles, frame_tiles


def small_tiling(**sizes: int) -> Tiling:
    return Tiling(**{"height": 8, "width": 6, "stride_height": 5, "stride_width": 4, **sizes})


@pytest.mark.parametrize(("height", "width"), [(8, 6), (13, 11), (10, 4), (3, 17), (20, 20)])
def test_tiles_cut_from_one_picture_give_it_back(height, width):
    picture = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    tiling = small_tiling()

    def cut(top, left):
        return picture[..., top : top + tiling.height, left : left + tiling.width].clone()

    out = fill_by_tiles(torch.full_like(picture, torch.nan), tiling, cut)
    torch.testing.assert_close(out, picture)


def test_tiles_without_overlap_are_laid_side_by_side():
    starts = []

    def tile(top, left):
        starts.append((top, left))
        return torch.full((1, min(4, 10 - top), min(4, 6 - left)), float(len(starts)))

    tiling = Tiling(height=4, width=4, stride_height=4, stride_width=4)
    out = fill_by_tiles(torch.empty(1, 10, 6), tiling, tile)
    assert starts == [(0, 0), (0, 4), (4, 0), (4, 4), (8, 0), (8, 4)]
    assert out[0, ::4, ::4].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("dim", [-1, -2, 2])
def test_blend_is_a_linear_ramp_from_the_edge_into_the_tile(dim):
    tile, edge = torch.ones(1, 1, 4, 8, 8), torch.zeros(1, 1, 4, 8, 8)
    size = tile.shape[dim]
    blended = blend_(tile, edge, dim=dim)
    assert blended is tile
    torch.testing.assert_close(blended.movedim(dim, -1)[0, 0, 0, 0], torch.arange(size) / size)


def test_blend_of_a_short_tile_uses_the_end_of_the_edge():
    edge = torch.arange(4.0).view(1, 4)
    blended = blend_(torch.full((1, 2), 10.0), edge, dim=-1)
    torch.testing.assert_close(blended, torch.tensor([[2.0, 6.5]]))


def test_overlap_fades_from_the_first_tile_to_the_second():
    values = iter([0.0, 1.0])
    tiling = Tiling(height=1, width=6, stride_height=1, stride_width=4)
    out = fill_by_tiles(torch.empty(1, 1, 8), tiling, lambda top, left: torch.full((1, 1, 6 - left // 2), next(values)))
    assert out.flatten().tolist() == [0, 0, 0, 0, 0, 0.5, 1, 1]


def test_scaled_down_divides_every_size():
    assert Tiling().scaled_down(8) == Tiling(height=32, width=32, stride_height=24, stride_width=24)


def test_tiling_is_needed_for_one_long_side():
    assert [Tiling().is_needed(*size) for size in ((256, 256), (257, 8), (8, 257))] == [False, True, True]


@pytest.mark.parametrize("sizes", [{"stride_height": 9}, {"stride_width": 0}, {"height": -8, "stride_height": -8}])
def test_gaps_are_refused(sizes):
    with pytest.raises(ConfigError, match="leave gaps"):
        small_tiling(**sizes)


@pytest.mark.parametrize("sizes", [{"height": "8"}, {"stride_width": 2.5}, {"width": None}])
def test_sizes_that_are_no_whole_numbers_are_refused(sizes):
    with pytest.raises(ConfigError, match="expected whole numbers"):
        small_tiling(**sizes)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="stride_width 190 is no multiple of 8"):
        Tiling(stride_width=190).scaled_down(8)


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 7, 9, 10, 14])
def test_frame_tiles_cut_from_one_clip_give_it_back(frames):
    clip = torch.randn(2, frames, 3, 5, generator=torch.Generator().manual_seed(0))
    tiling = FrameTiling(frames=4, stride=3)
    out = torch.full_like(clip, torch.nan)
    for tile in frame_tiles(frames, tiling):
        source = clip[:, tile.begin : tile.begin + tiling.frames + 1]
        fade_in_(out[:, tile.frames], source[:, 1 if tile.begin else 0 :].clone(), shared_frames=tile.shared)
    torch.testing.assert_close(out, clip)


def test_frames_fade_from_one_tile_to_the_next():
    out = torch.empty(11, 1, 1)
    tiles = list(frame_tiles(11, FrameTiling(frames=6, stride=4)))
    for number, tile in enumerate(tiles):
        fade_in_(out[tile.frames], torch.full_like(out[tile.frames], float(number)), shared_frames=tile.shared)
    assert [(tile.begin, tile.frames.start, tile.frames.stop, tile.shared) for tile in tiles] == [
        (0, 0, 7, 0),
        (4, 5, 11, 2),
        (8, 9, 11, 2),
    ]
    assert out.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1.5]


def test_pictures_in_tiles_fade_from_the_frames_before_as_whole_ones_do():
    before, after = torch.randn(2, 1, 5, 13, 11, generator=torch.Generator().manual_seed(0))
    tiling = small_tiling()

    def cut(top, left):
        return after[..., top : top + tiling.height, left : left + tiling.width].clone()

    out, whole = before.clone(), before.clone()
    fill_by_tiles(out, tiling, cut, shared_frames=3)
    fade_in_(whole, after.clone(), shared_frames=3)
    torch.testing.assert_close(out, whole)
    assert torch.equal(out[:, 0], before[:, 0])


def test_frame_tilings_are_scaled_and_checked_like_those_of_pictures():
    assert FrameTiling().scaled_down(4) == FrameTiling(frames=4, stride=3)
    assert [FrameTiling().is_needed(frames) for frames in (16, 17)] == [False, True]
    with pytest.raises(ConfigError, match="leave gaps"):
        FrameTiling(frames=4, stride=5)
    with pytest.raises(ConfigError, match="stride 10 is no multiple of 4"):
        FrameTiling(stride=10).scaled_down(4)
