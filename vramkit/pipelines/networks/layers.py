"""Layers and token-wise functions that the diffusion transformers share, written for few live bytes.

A transformer pass needs three tensors as long as the token stream: the stream itself, the keys and the values. All else
is done in chunks of tokens, in place, so that temporaries are chunk-sized, and one sample after the other, so that they do
not grow with the batch. The functions below are the memory-bound part; their arithmetic is fp32, rounded once at the end.

Shapes: B batch, S tokens, C channels, H heads, D channels per head, P = D / 2 rotated pairs, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.wrapper import widened_once

__all__ = [
    "FeedForward",
    "Modulated",
    "PatchEmbedding",
    "Run",
    "TextProjection",
    "TimestepEmbedding",
    "TokenOps",
    "TokenShare",
    "gated_add",
    "layer_norm",
    "layer_norm_rotate",
    "rms_norm",
    "rms_rotate",
    "rotary_axis",
    "rotary_grid",
    "sinusoidal_embedding",
    "token_chunks",
    "token_spans",
    "write",
]

_CHUNK_TOKENS = 6144  # the 14B model at 32,760 tokens on an H200: as fast as 8192, with 0.37 GiB less reserved
_CHUNK_NUMBERS = 2**24  # of a narrow model: the device is through with less before the host has issued what follows


def token_chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    """Cut `tokens` rows into slices of at most `chunk_tokens`, as even as possible.

    Even, because a short last chunk would run at a fraction of the speed of the others.
    """
    if not tokens:
        return []  # a rank of several may have none
    count = math.ceil(tokens / chunk_tokens)
    size = math.ceil(tokens / count)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def token_spans(lengths: Sequence[int] | None) -> list[slice]:
    """Where runs of so many tokens lie, one behind the other; None is one run of all tokens."""
    if lengths is None:
        return [slice(None)]
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


# -- token-wise functions ----------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize x [..., C] over its channels in fp32, then scale by weight and shift by bias, both [C] fp32.

    Adaptive norms pass weight = 1 + scale and bias = shift, which saves them four passes over the tokens.
    """
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Divide x [..., C] by the root mean square of its channels in fp32, then scale and shift as `layer_norm` does."""
    y = F.rms_norm(x.float(), x.shape[-1:], weight, eps)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


@torch.library.custom_op("vramkit::write", mutates_args={"out"})
def _opaque_write(out: Tensor, value: Tensor) -> None:
    out.copy_(value)


def write(out: Tensor, value: Tensor) -> Tensor:
    """Copy value to out, part of a tensor as long as the token stream.

    To a compiler that is an opaque operation: one that it can look into it takes apart, and then inductor keeps a copy of
    the whole keys and values for each chunk of queries (at 32,760 tokens 3.2 GiB instead of 1.3).
    """
    if not torch.compiler.is_compiling():
        return out.copy_(value)
    _opaque_write(out, value)
    return out


def gated_add(x: Tensor, update: Tensor, gate: Tensor | None = None) -> Tensor:
    """Add update * gate to x in place, in fp32 with one rounding; x and update [..., C], gate [C] fp32 or None for 1."""
    if torch.compiler.is_compiling():
        return write(x, x + update if gate is None else torch.addcmul(x, update, gate).to(x.dtype))
    return x.add_(update) if gate is None else x.addcmul_(update, gate)


def rotate_pairs_(x: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn each pair of channels of x [S, H, D] fp32 by its angle.

    The table holds cos and sin: [S, P, 2] for all heads, or [S, H, P, 2]. Overwrites x where that is faster, and rounds the
    result to dtype where that is free.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)  # [S, H, P, 2]
    table = table if table.ndim == pairs.ndim else table[:, None]
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic only
        cos, sin = table.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = (even * cos - odd * sin).to(dtype), (even * sin + odd * cos).to(dtype)
        return torch.stack(turned, dim=-1).flatten(-2)
    torch.view_as_complex(pairs).mul_(torch.view_as_complex(table))
    return x


def rms_rotate(
    x: Tensor, weight: Tensor, eps: float, *, heads: int, table: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Root-mean-square norm of x [S, C], split into heads, then rotary embedding if a table is given.

    Args:
        x: queries or keys [S, C].
        weight: norm weight in the dtype of x: [C] for one norm over all heads, [D] for one per head.
        eps: added to the mean square.
        heads: H.
        table: cos and sin fp32, [S, P, 2] or [S, H, P, 2]; None for no rotation.
        out: [S, H, D] to write to; a new tensor of the dtype of x without it.
    """
    y = F.rms_norm(x.view(x.shape[0], -1, weight.shape[0]), weight.shape, weight, eps).view(x.shape[0], heads, -1)
    if table is not None:
        y = y.float()  # drops the rounded tensor before the next one is made
        y = rotate_pairs_(y, table, x.dtype)
    return y.to(x.dtype) if out is None else write(out, y.to(x.dtype))


def layer_norm_rotate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    heads: int,
    table: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same with a layer norm per head, whose weight and bias [D] are in the dtype of x."""
    y = F.layer_norm(x.view(x.shape[0], heads, -1), weight.shape, weight, bias, eps)
    if table is not None:
        y = y.float()
        y = rotate_pairs_(y, table, x.dtype)
    return y.to(x.dtype) if out is None else write(out, y.to(x.dtype))


class TokenShare(Protocol):
    """The tokens of a video that this rank of several has; `vramkit.distributed.sequence` makes one for each forward."""

    own: slice
    """Where they lie among those of all ranks."""

    def self_attention_(self, streams: Sequence[Any], *, ops: TokenOps, mask: Tensor | None = None) -> None:
        """What `attention.self_attention_` does, across ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """Return x [B, s, ...] of the tokens of all ranks, [B, S, ...]."""


@dataclass(frozen=True, slots=True)
class TokenOps:
    """How the token-wise work of a block is done: tokens per chunk (None for what suits), and which functions do it.

    `share` says which tokens are here; None for all. `compiled()` swaps the functions for fused ones. A block that is
    compiled as a whole traces through either.
    """

    chunk_tokens: int | None = None
    layer_norm: Callable[..., Tensor] = layer_norm
    rms_norm: Callable[..., Tensor] = rms_norm
    rms_rotate: Callable[..., Tensor] = rms_rotate
    layer_norm_rotate: Callable[..., Tensor] = layer_norm_rotate
    gated_add: Callable[..., Tensor] = gated_add
    share: TokenShare | None = None

    @property
    def own(self) -> slice:
        """Which tokens of the video are here."""
        return slice(None) if self.share is None else self.share.own

    def chunks(self, x: Tensor) -> list[slice]:
        """Cut the tokens of x [..., S, C] into chunks."""
        tokens, channels = x.shape[-2:]
        return token_chunks(tokens, self.chunk_tokens or max(_CHUNK_TOKENS, _CHUNK_NUMBERS // channels))

    def compiled(self) -> TokenOps:
        """The same with the functions compiled at their first call, for any chunk length."""
        functions = (layer_norm, rms_norm, rms_rotate, layer_norm_rotate, gated_add)
        fused: dict[str, Any] = {each.__name__: torch.compile(each, dynamic=True) for each in functions}
        return replace(self, **fused)


# -- rotary positions --------------------------------------------------------------------------------------------------


def rotary_axis(
    channels: int, length: int, *, theta: float, device: torch.device, positions: Tensor | None = None
) -> Tensor:
    """Cos and sin of the angles of one axis, [length, channels / 2, 2] fp32, computed in float64.

    Positions [length] are 0, 1, 2 ... unless others are given, which need not be whole. Source: RoFormer (arXiv:2104.09864),
    frequencies theta ** (-2 i / channels).
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    if positions is None:
        positions = torch.arange(length, device=device)
    angles = torch.outer(positions.double(), 1.0 / theta**exponents)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotary_grid(
    grid: Sequence[int],
    channels: Sequence[int],
    *,
    device: torch.device,
    theta: float = 10000.0,
    positions: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Rotary table of a token grid whose last axis runs fastest: [prod(grid), sum(channels) / 2, 2] fp32.

    Args:
        grid: tokens along each axis, such as (frames, rows, columns).
        channels: channels of a head that encode each axis.
        device: where the table is made; nothing is sent there.
        theta: base of the frequencies.
        positions: where the tokens lie along each axis, None for 0, 1, 2 ...
    """
    tables = []
    along = positions or [None] * len(grid)
    for axis, (length, width, places) in enumerate(zip(grid, channels, along, strict=True)):
        shape = [1] * len(grid) + [width // 2, 2]
        shape[axis] = length
        table = rotary_axis(width, length, theta=theta, device=device, positions=places).view(shape)
        tables.append(table.expand(*grid, -1, -1))
    return torch.cat(tables, dim=-2).flatten(0, len(grid) - 1)


# -- embeddings --------------------------------------------------------------------------------------------------------


def sinusoidal_embedding(timestep: Tensor, channels: int, *, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines of timestep [B] at geometrically falling frequencies: [B, channels] fp32.

    Source: DDPM (arXiv:2006.11239), with the cosine half first.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(max_period) / half)
    angles = timestep[:, None].float() * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between; computes in the dtype of its weights and returns it."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_channels] -> [B, channels]."""
        features = features.to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return out


class TextProjection(nn.Module):
    """Two linear layers with a tanh GELU between, from text encoder states to model channels."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, *texts: Tensor) -> tuple[Tensor, ...]:
        """[B, T, in_channels] -> [B, T, channels] of each text, one after the other."""
        return tuple(self.linear_2(F.gelu(self.linear_1(text), approximate="tanh")) for text in texts)


class PatchEmbedding(nn.Conv3d):
    """Non-overlapping video patches to tokens.

    The weight is that of a convolution whose stride is its kernel; run as a matrix product on the cut video, which gives
    the tokens in the order of the stream and spares the copy that a channels-first result needs.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, video: Tensor) -> Tensor:
        """Video [B, in_channels, frames, height, width] -> tokens [B, S, channels]."""
        batch, channels, *sizes = video.shape
        cuts = [n for size, patch in zip(sizes, self.kernel_size, strict=True) for n in (size // patch, patch)]
        video = video.reshape(batch, channels, *cuts)  # [B, in, F, pf, R, ph, L, pw]
        patches = video.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, F R L, in pf ph pw]
        return F.linear(patches, self.weight.flatten(1), self.bias)


# -- feed-forward ------------------------------------------------------------------------------------------------------


class _Gelu(nn.Module):
    """The first half of the feed-forward; its own module because checkpoints name it `net.0.proj`."""

    def __init__(self, channels: int, inner_channels: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class Run(NamedTuple):
    """Neighbouring tokens of one sample that have one modulation."""

    tokens: Tensor  # [s, C]
    norm: Callable[[Tensor], Tensor]  # of a chunk of them
    gate: Tensor  # [C] fp32
    span: slice  # where they lie among the tokens of the sample


class Modulated(NamedTuple):
    """Tokens on their way into a layer that updates them in place, and their modulation by the timestep.

    A layer returns the tokens that it was given: they may be a copy, made by a hook that moved them.
    """

    tokens: Tensor  # [B, S, C]
    norm: Callable[..., Tensor]  # layer_norm or rms_norm of a TokenOps
    eps: float  # of the norm
    shift: Tensor  # [B, C] fp32, or [B, R, C] for R runs of tokens, as are the next two
    scale: Tensor  # the norm is multiplied by 1 + scale
    gate: Tensor  # what the layer adds is multiplied by gate
    lengths: tuple[int, ...] | None = None  # tokens in each run, None for a single one

    def samples(self) -> list[tuple[Tensor, Callable[[Tensor], Tensor], Tensor]]:
        """Tokens [S, C], norm of a chunk of them, and gate [C], of each sample."""
        return [
            (tokens, partial(self.norm, weight=1 + self.scale[b], bias=self.shift[b], eps=self.eps), self.gate[b])
            for b, tokens in enumerate(self.tokens)
        ]

    def runs(self) -> list[list[Run]]:
        """The runs of tokens with one modulation each, of each sample."""
        spans = token_spans(self.lengths)
        shift, scale, gate = (each.view(each.shape[0], len(spans), -1) for each in (self.shift, self.scale, self.gate))

        def run(b: int, r: int, span: slice) -> Run:
            norm = partial(self.norm, weight=1 + scale[b, r], bias=shift[b, r], eps=self.eps)
            return Run(self.tokens[b, span], norm, gate[b, r], span)

        return [[run(b, r, span) for r, span in enumerate(spans)] for b in range(self.tokens.shape[0])]


class FeedForward(nn.Module):
    """Feed-forward of an adaptive block: x += gate * net(norm(x)), chunk by chunk in place."""

    offload_unit: ClassVar[bool] = True

    def __init__(self, channels: int, inner_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        # Checkpoints leave index 1 to a dropout.
        self.net = nn.ModuleList(
            [_Gelu(channels, inner_channels, bias=bias), nn.Identity(), nn.Linear(inner_channels, channels, bias=bias)]
        )

    def forward(self, *streams: Modulated, ops: TokenOps) -> tuple[Tensor, ...]:
        """Update the tokens of each stream in place and return them."""
        runs = [run for stream in streams for runs in stream.runs() for run in runs]
        chunks = [(run, part) for run in runs for part in ops.chunks(run.tokens)]
        with widened_once(len(chunks)):
            for run, part in chunks:
                tokens = run.tokens[part]
                ops.gated_add(tokens, self.net[2](self.net[0](run.norm(tokens))), run.gate)
        return tuple(stream.tokens for stream in streams)
