"""What the autoencoder of Wan2.2 5B adds to that of Wan2.1: levels with a shortcut around them, and patches of pixels.

Shapes: B batch, C channels, F frames, H rows, W columns, p rows and columns of a patch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vramkit.pipelines.wan.vae_layers import Downsample, FeatureCache, ResidualBlock, Upsample

__all__ = ["ResidualDownBlock", "ResidualUpBlock", "patched", "unpatch"]


class ResidualDownBlock(nn.Module):
    """Residual blocks and, except at the last level, a downsampling; around them averages of neighbours."""

    def __init__(self, in_channels: int, out_channels: int, *, resnets: int, downsample: Downsample | None) -> None:
        super().__init__()
        self.channels = out_channels
        self.resnets = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise((in_channels, *(out_channels,) * resnets))
        )
        self.downsampler = downsample

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F or F / 2, H or H / 2, W or W / 2]."""
        y = x
        for layer in (*self.resnets, *(() if self.downsampler is None else (self.downsampler,))):
            y = layer(y, cache)
        rate = 2 if self.downsampler is not None and self.downsampler.time_conv is not None else 1
        return y.add_(self._averages(x, rate, 1 if self.downsampler is None else 2))

    def _averages(self, x: Tensor, rate: int, ratio: int) -> Tensor:
        """Means over frames, rows, columns and then channels, as many as it takes to have those of the result."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % rate, 0))  # the first chunk of a clip has one frame
        x = torch.unflatten(torch.unflatten(torch.unflatten(x, 4, (-1, ratio)), 3, (-1, ratio)), 2, (-1, rate))
        neighbours = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [B, C rate ratio ratio, F', H', W']
        return torch.unflatten(neighbours, 1, (self.channels, -1)).mean(dim=2)


class ResidualUpBlock(nn.Module):
    """Residual blocks and an upsampling; around them copies of what is there."""

    def __init__(self, in_channels: int, out_channels: int, *, resnets: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise((in_channels, *(out_channels,) * resnets))
        )
        self.upsampler = upsample

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F or 2 F, H or 2 H, W or 2 W]; the first chunk of a clip keeps its one frame."""
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        if self.upsampler is None:
            return y
        rate = 1 if self.upsampler.time_conv is None else 2
        return self._add_copies(self.upsampler(y, cache), x, rate=rate, is_first=cache.is_first_chunk)

    @staticmethod
    def _add_copies(y: Tensor, x: Tensor, *, rate: int, is_first: bool) -> Tensor:
        """Add x to y in place, every channel in the place of several frames, rows and columns.

        The channels of x, each repeated, are those of y with its frames, rows and columns within a step behind one another.
        """
        places = rate * 4
        repeats = y.shape[1] * places // x.shape[1]
        for place in range(places):
            frame, row, column = place // 4, place // 2 % 2, place % 2
            channels = torch.arange(place, y.shape[1] * places, places, device=x.device) // repeats
            if is_first and frame < rate - 1:
                continue  # frames before the first
            frames = slice(None) if is_first else slice(frame, None, rate)
            y[:, :, frames, row::2, column::2] += x[:, channels]
        return y


def patched(video: Tensor, patch: int) -> Tensor:
    """[B, C, F, H, W] -> [B, C p p, F, H / p, W / p], the columns of a patch before its rows."""
    if patch == 1:
        return video
    cut = torch.unflatten(torch.unflatten(video, 4, (-1, patch)), 3, (-1, patch))  # [B, C, F, H / p, p, W / p, p]
    return cut.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatch(patches: Tensor, out: Tensor, patch: int) -> Tensor:
    """Write [B, C p p, F, H / p, W / p] into `out` [B, C, F, H, W] and return it."""
    cut = torch.unflatten(torch.unflatten(out, 4, (-1, patch)), 3, (-1, patch))
    cut.copy_(torch.unflatten(patches, 1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2))
    return out
