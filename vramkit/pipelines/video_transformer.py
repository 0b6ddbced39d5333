"""What the video transformers share: the sizes of a call, the rotary table of a grid, and the way back to a video.

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), C channels, P rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.layers import TokenOps, rotary_grid
from vramkit.pipelines.modeling import Model

__all__ = ["TransformerOutput", "VideoTransformer"]

Grid = tuple[int, int, int]  # frames, rows, columns


class TransformerOutput(NamedTuple):
    """What a transformer returns; also answers to [0]."""

    sample: Tensor


class VideoTransformer(Model):
    """A transformer that updates its tokens in place, chunk by chunk. For inference: gradients are not recorded."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._ops = TokenOps()
        self._rotary: tuple[tuple[Any, ...], Tensor] | None = None  # the last grid and device, and their table

    def set_chunk_size(self, tokens: int) -> None:
        """Set how many tokens are computed at a time: fewer need less memory, results differ by rounding only."""
        if tokens < 1:
            raise ConfigError(f"chunk size: got {tokens} tokens, expected at least 1")
        self._ops = replace(self._ops, chunk_tokens=tokens)

    def compile_elementwise(self) -> None:
        """Compile the few memory-bound functions of a block; the matrix products stay as they are."""
        self._ops = self._ops.compiled()

    # -- steps of a forward --------------------------------------------------------------------------------------------

    def _check_inputs(self, timestep: Tensor, batch: int, attention_kwargs: Mapping[str, Any] | None) -> None:
        """Refuse what callers of the published models may pass and these do not have."""
        if attention_kwargs:
            raise ConfigError(f"attention_kwargs: got {sorted(attention_kwargs)}, expected none; leave it out")
        if timestep.ndim != 1 or timestep.shape[0] not in (1, batch):
            raise ConfigError(
                f"timestep: got shape {tuple(timestep.shape)}, expected ({batch},); timesteps per token (Wan2.2 5B) "
                "are not supported"
            )

    def _grid(self, video: Tensor, patch: Grid) -> Grid:
        """Tokens along frames, rows and columns of a video [B, C, frames, height, width]."""
        sizes = video.shape[2:]
        if len(sizes) != 3 or any(size % p or not size for size, p in zip(sizes, patch, strict=True)):
            raise ConfigError(
                f"latents: got shape {tuple(video.shape)}, expected [batch, channels, frames, height, width] with the "
                f"last three divisible by {tuple(patch)}"
            )
        return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]

    def _rotary_table(
        self, grid: Grid, channels: Sequence[int], device: torch.device, *, theta: float = 10000.0
    ) -> Tensor:
        """The table [S, P, 2] of a grid, kept until another is asked for."""
        if self._rotary is None or self._rotary[0] != (grid, device):
            self._rotary = (grid, device), rotary_grid(grid, channels, device=device, theta=theta)
        return self._rotary[1]

    def _head(self, x: Tensor, norm: Callable[..., Tensor], scale: Tensor, shift: Tensor, proj: nn.Linear) -> Tensor:
        """Patches proj(norm(x) * (1 + scale) + shift) of tokens x [B, S, C]; scale and shift [B, C] fp32."""
        patches = x.new_empty(*x.shape[:2], proj.out_features)
        for b in range(x.shape[0]):
            for part in self._ops.chunks(x):
                patches[b, part] = proj(norm(x[b, part], weight=1 + scale[b], bias=shift[b]))
        return patches

    @staticmethod
    def _unpatchify(patches: Tensor, grid: Grid, patch: Grid, *, channels_first: bool = False) -> Tensor:
        """Patches [B, F R L, pf ph pw out] (or out pf ph pw) -> video [B, out, F pf, R ph, L pw]."""
        if channels_first:
            video = patches.view(patches.shape[0], *grid, -1, *patch).movedim(4, -1)
        else:
            video = patches.view(patches.shape[0], *grid, *patch, -1)
        video = video.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, out, F, pf, R, ph, L, pw]
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)
