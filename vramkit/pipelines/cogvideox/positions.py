"""Where the tokens of a CogVideoX clip lie: angles that turn queries and keys (5B, 1.5), or sines added to the tokens (2B).

Shapes: S = F R L tokens (frames, rows, columns of patches), C channels, P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vramkit.pipelines.networks.layers import rotary_grid
from vramkit.pipelines.networks.video_transformer import Grid

__all__ = ["add_sinusoids_", "rotary_table"]


def rotary_table(grid: Grid, head_channels: int, *, trained: tuple[int, int] | None, device: torch.device) -> Tensor:
    """The rotary table [S, P, 2] of a grid.

    Args:
        grid: tokens along frames, rows and columns.
        head_channels: channels of a head: a quarter for the frames, three eighths each for rows and columns.
        trained: rows and columns of the training pictures, onto which others are stretched or shrunk; None counts tokens.
        device: where the table is made.
    """
    plane = head_channels // 8 * 3
    places = None if trained is None else (None, *_fitted(grid[1:], trained, device))
    return rotary_grid(grid, (head_channels // 4, plane, plane), device=device, positions=places)


def _fitted(size: tuple[int, int], trained: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Positions of rows and of columns of a picture that is laid, as large as it fits and centred, over a trained one."""
    (rows, columns), (trained_rows, trained_columns) = size, trained
    if rows * trained_columns > trained_rows * columns:  # taller than the trained picture
        fitted = trained_rows, round(trained_rows / rows * columns)
    else:
        fitted = round(trained_columns / columns * rows), trained_columns
    places = []
    for count, length, whole in zip(size, fitted, trained, strict=True):
        first = round((whole - length) / 2)
        last = (first + length) * (count - 1) / count
        places.append(torch.linspace(first, last, count, dtype=torch.float64, device=device))
    return places


def add_sinusoids_(tokens: Tensor, grid: Grid, *, spatial_scale: float, temporal_scale: float) -> Tensor:
    """Add to tokens [B, S, C], in place, sines and cosines of their frame, their column and their row.

    These take a quarter of the channels and twice three eighths; a scale above 1 moves the tokens together. One table per
    axis is made, and none as long as the tokens.
    """
    channels = tokens.shape[-1]
    video = tokens.view(tokens.shape[0], *grid, channels)  # [B, F, R, L, C]
    plane = 3 * channels // 8
    start = 0
    for axis, width, scale in (
        (1, channels // 4, temporal_scale),
        (3, plane, spatial_scale),
        (2, plane, spatial_scale),
    ):
        shape = [1] * 5
        shape[axis], shape[4] = video.shape[axis], width
        table = _sinusoids(video.shape[axis], width, scale=scale, device=tokens.device)
        video[..., start : start + width].add_(table.to(tokens.dtype).view(shape))
        start += width
    return tokens


def _sinusoids(length: int, channels: int, *, scale: float, device: torch.device) -> Tensor:
    """Sines and behind them cosines of positions 0, 1, 2 ..., divided by scale: [length, channels] float64."""
    exponents = torch.arange(channels // 2, dtype=torch.float64, device=device) / (channels / 2)
    positions = torch.arange(length, dtype=torch.float64, device=device) / scale
    angles = torch.outer(positions, 10000.0**-exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=1)
