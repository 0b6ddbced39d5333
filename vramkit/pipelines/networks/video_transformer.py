"""What the video transformers share: the sizes of a call, the rotary table of a grid, and the way back to a video.

Shapes: B batch, S = F R L video tokens (frames, rows, columns of patches), C channels, P rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vramkit.errors import ConfigError
from vramkit.pipelines.loading.modeling import Model
from vramkit.pipelines.networks.layers import TokenOps, TokenShare, rotary_grid, token_spans
from vramkit.wrapper import widened_once

__all__ = ["TokenRanks", "TransformerOutput", "VideoTransformer"]

Grid = tuple[int, int, int]  # frames, rows, columns


class TokenRanks(Protocol):
    """Ranks that share the tokens of each forward; see `vramkit.distributed.sequence`."""

    def share(self, tokens: int) -> TokenShare:
        """Return what this rank has of so many tokens."""


class TransformerOutput(NamedTuple):
    """What a transformer returns; also answers to [0]."""

    sample: Tensor
    others: tuple[Tensor, ...] = ()  # for the other texts that it was given


class VideoTransformer(Model):
    """A transformer that updates its tokens in place, chunk by chunk. For inference: gradients are not recorded.

    A forward may be given several texts for the same latents, as guidance has them. Each has a stream of tokens, and every
    layer takes all streams before the next layer is called, one after the other: so weights that travel do so once, and
    each stream passes the kernels that it would pass alone.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._ops = TokenOps()
        self._token_ranks: TokenRanks | None = None
        self._rotary: tuple[tuple[Any, ...], Tensor] | None = None  # the last grid and device, and their table

    def set_chunk_size(self, tokens: int | None) -> None:
        """Set how many tokens are computed at a time, None for what suits: fewer need less memory, and round otherwise."""
        if tokens is not None and tokens < 1:
            raise ConfigError(f"chunk size: got {tokens} tokens, expected at least 1")
        self._ops = replace(self._ops, chunk_tokens=tokens)

    def compile_elementwise(self) -> None:
        """Compile the few memory-bound functions of a block; the matrix products stay as they are."""
        self._ops = self._ops.compiled()

    def set_token_ranks(self, ranks: TokenRanks | None) -> None:
        """Share the tokens of the video with other ranks, which make the same calls; None for none. See `parallelize`."""
        self._token_ranks = ranks

    # -- steps of a forward --------------------------------------------------------------------------------------------

    def _check_inputs(self, timestep: Tensor, batch: int, attention_kwargs: Mapping[str, Any] | None) -> None:
        """Refuse what callers of the published models may pass and these do not have."""
        self._check_attention_kwargs(attention_kwargs)
        if timestep.ndim != 1 or timestep.shape[0] not in (1, batch):
            raise ConfigError(
                f"timestep: got shape {tuple(timestep.shape)}, expected ({batch},); {type(self).__name__} takes one for "
                "each clip"
            )

    @staticmethod
    def _check_attention_kwargs(attention_kwargs: Mapping[str, Any] | None) -> None:
        if attention_kwargs:
            raise ConfigError(f"attention_kwargs: got {sorted(attention_kwargs)}, expected none; leave it out")

    @staticmethod
    def _timestep_runs(
        timestep: Tensor, lengths: Sequence[int] | None, batch: int, tokens: int
    ) -> tuple[Tensor, tuple[int, ...] | None]:
        """Timesteps [B, R] of R runs of tokens, and the tokens in each; None for a single run.

        Args:
            timestep: [B] or [1]; [B, S], one for each token, whose runs have to be waited for; or [B, R] with `lengths`.
            lengths: tokens in each run.
            batch: B.
            tokens: S.
        """
        if timestep.ndim == 1 and lengths is None and timestep.shape[0] in (1, batch):
            return timestep.expand(batch)[:, None], None
        fits = timestep.ndim == 2 and timestep.shape[0] in (1, batch)
        if lengths is None:
            fits = fits and timestep.shape[1] in (1, tokens)
        else:
            fits = fits and timestep.shape[1] == len(lengths) and sum(lengths) == tokens
        if not fits:
            runs = "" if lengths is None else f" for runs of {tuple(lengths)} tokens"
            raise ConfigError(
                f"timestep: got shape {tuple(timestep.shape)}{runs}, expected ({batch},), one for each clip, or ({batch}, "
                f"{tokens}), one for each token"
            )
        if lengths is None:
            timestep, counts = torch.unique_consecutive(timestep, dim=1, return_counts=True)
            lengths = counts.tolist()
        timestep = timestep.expand(batch, -1)
        return timestep, None if len(lengths) == 1 else tuple(lengths)

    def _grid(self, video: Tensor, patch: Grid) -> Grid:
        """Tokens along frames, rows and columns of a video [B, C, frames, height, width]."""
        sizes = video.shape[2:]
        if len(sizes) != 3 or any(size % p or not size for size, p in zip(sizes, patch, strict=True)):
            raise ConfigError(
                f"latents: got shape {tuple(video.shape)}, expected [batch, channels, frames, height, width] with the "
                f"last three divisible by {tuple(patch)}"
            )
        return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]

    @staticmethod
    def _texts(first: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The text arguments of a forward and those of its other texts, which have the same names."""
        for at, other in enumerate(others):
            if sorted(other) != sorted(first):
                raise ConfigError(f"others[{at}]: got {sorted(other)}, expected {sorted(first)}")
        return [first, *others]

    def _ops_for(self, tokens: int) -> TokenOps:
        """How the work on so many video tokens is done, and which of them are here."""
        return self._ops if self._token_ranks is None else replace(self._ops, share=self._token_ranks.share(tokens))

    @staticmethod
    def _streams(x: Tensor, count: int, ops: TokenOps) -> tuple[Tensor, ...]:
        """The tokens [B, S, C] that are here `count` times, to be updated in place."""
        x = x if ops.share is None else x[:, ops.own].clone()  # so that those of other ranks take no memory
        return (x, *(x.clone() for _ in range(count - 1)))

    @staticmethod
    def _own_lengths(lengths: Sequence[int] | None, ops: TokenOps) -> tuple[int, ...] | None:
        """How many tokens of each run are here, which may be none."""
        if lengths is None or ops.share is None:
            return None if lengths is None else tuple(lengths)
        own = ops.own
        return tuple(max(0, min(span.stop, own.stop) - max(span.start, own.start)) for span in token_spans(lengths))

    @staticmethod
    def _output(samples: Sequence[Tensor], return_dict: bool) -> TransformerOutput | tuple[Tensor, ...]:
        """What a forward returns for the sample of each text."""
        return TransformerOutput(samples[0], tuple(samples[1:])) if return_dict else tuple(samples)

    def _rotary_table(
        self, grid: Grid, channels: Sequence[int], device: torch.device, *, theta: float = 10000.0
    ) -> Tensor:
        """The table [S, P, 2] of a grid, kept until another is asked for."""
        if self._rotary is None or self._rotary[0] != (grid, device):
            self._rotary = (grid, device), rotary_grid(grid, channels, device=device, theta=theta)
        return self._rotary[1]

    def _head(  # noqa: PLR0917
        self,
        x: Tensor,
        norm: Callable[..., Tensor],
        scale: Tensor,
        shift: Tensor,
        proj: nn.Linear,
        lengths: Sequence[int] | None = None,
        *,
        ops: TokenOps,
    ) -> Tensor:
        """Patches proj(norm(x) * (1 + scale) + shift) of tokens x [B, S, C]; scale and shift [B, C] or [B, R, C] fp32.

        Of several ranks each has its tokens, and gets the patches of all.
        """
        patches = x.new_empty(*x.shape[:2], proj.out_features)
        spans = token_spans(lengths)
        scale, shift = (each.view(each.shape[0], len(spans), -1) for each in (scale, shift))
        runs = [(b, r, span) for b in range(x.shape[0]) for r, span in enumerate(spans)]
        chunks = [(b, r, span, part) for b, r, span in runs for part in ops.chunks(x[b, span])]
        with widened_once(len(chunks)):
            for b, r, span, part in chunks:
                tokens = x[b, span][part]
                patches[b, span][part] = proj(norm(tokens, weight=1 + scale[b, r], bias=shift[b, r]))
        return patches if ops.share is None else ops.share.gather(patches)

    @staticmethod
    def _unpatchify(patches: Tensor, grid: Grid, patch: Grid, *, channels_first: bool = False) -> Tensor:
        """Patches [B, F R L, pf ph pw out] (or out pf ph pw) -> video [B, out, F pf, R ph, L pw]."""
        if channels_first:
            video = patches.view(patches.shape[0], *grid, -1, *patch).movedim(4, -1)
        else:
            video = patches.view(patches.shape[0], *grid, *patch, -1)
        video = video.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, out, F, pf, R, ph, L, pw]
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)
