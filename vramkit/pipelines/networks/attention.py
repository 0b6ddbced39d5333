"""Attention over token streams, in chunks of queries and in place.

Keys and values are as long as the streams together and are made once; all else is as long as a chunk. A stream is the
tokens of one sample of one kind, video or text: blocks that let both attend to both pass two streams.

Shapes: S tokens of a stream, T tokens that are attended to, C channels, H heads, D channels per head, P = D / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.pipelines.networks.layers import TokenOps, write
from vramkit.shared_input import shared_input
from vramkit.wrapper import widened_once

__all__ = ["AttentionLayers", "Projections", "Stream", "attention", "cross_attention_", "self_attention_"]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot product attention of one sample: query [S, H, D], key and value [T, H, D] -> [S, C].

    mask [T] or [S, T], bool, is True for the keys that are attended to.
    """
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))  # [1, H, S or T, D]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask[None])
    return out.squeeze(0).transpose(0, 1).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Projections:
    """The layers that make queries, keys and values [S, H, D] of tokens [S, C], under whatever names a model has them."""

    to_q: Any  # nn.Linear, or what stands in for one
    to_k: Any
    to_v: Any
    norm_q: Any  # nn.RMSNorm or nn.LayerNorm over D channels, or nn.RMSNorm over all C
    norm_k: Any
    heads: int

    def query(self, tokens: Tensor, table: Tensor | None, ops: TokenOps) -> Tensor:
        """Queries of tokens, normed and, with a rotary table, turned."""
        return self._normed(self.to_q(tokens), self.norm_q, table, None, ops)

    def key(self, tokens: Tensor, table: Tensor | None, ops: TokenOps, out: Tensor | None = None) -> Tensor:
        """Keys of tokens, normed and turned; written to out [S, H, D] if it is given."""
        return self._normed(self.to_k(tokens), self.norm_k, table, out, ops)

    def value(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """Values of tokens."""
        value: Tensor = self.to_v(tokens).unflatten(-1, (self.heads, -1))
        return value if out is None else write(out, value)

    def key_value(
        self, tokens: Tensor, table: Tensor | None, ops: TokenOps, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the same tokens, which layers with products in fewer bits narrow once for both."""
        keys, values = (None, None) if out is None else out
        with shared_input(tokens, uses=2):
            value = self.value(tokens, out=values)
            return self.key(tokens, table, ops, out=keys), value

    def _normed(self, x: Tensor, norm: Any, table: Tensor | None, out: Tensor | None, ops: TokenOps) -> Tensor:
        options: dict[str, Any] = {"heads": self.heads, "table": table, "out": out}
        if isinstance(norm, nn.LayerNorm):
            return ops.layer_norm_rotate(x, norm.weight, norm.bias, norm.eps, **options)
        return ops.rms_rotate(x, norm.weight, norm.eps, **options)


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Tokens of one sample and what an attention does with them."""

    tokens: Tensor  # [S, C], updated in place
    norm: Callable[[Tensor], Tensor]  # a chunk of tokens as the projections read it
    projections: Projections
    add: Callable[[Tensor, Tensor], object]  # (chunk of tokens, attended [s, C]): adds to the tokens in place
    table: Tensor | None = None  # rotary [S, P, 2] or [S, H, P, 2]
    is_everywhere: bool = False  # whether every rank has all of these tokens, and not only its share

    def positions(self, part: slice) -> Tensor | None:
        """The rotary table of a chunk."""
        return None if self.table is None else self.table[part]


def self_attention_(streams: Sequence[Stream], *, ops: TokenOps, mask: Tensor | None = None) -> None:
    """Let the tokens of all streams attend to one another; the streams follow each other in the order of the keys.

    mask is bool, True for the keys that are attended to; without it all are, which is what the fast kernels want. Where
    ranks share the tokens, those of all ranks attend to one another, and a mask hides none but those that are everywhere.
    """
    if ops.share is not None:
        ops.share.self_attention_(streams, ops=ops, mask=mask)
        return
    first = streams[0]
    lengths = [stream.tokens.shape[0] for stream in streams]
    keys = first.tokens.new_empty(
        sum(lengths), first.projections.heads, first.projections.to_k.out_features // first.projections.heads
    )
    values = torch.empty_like(keys)
    chunks = [(stream, part) for stream in streams for part in ops.chunks(stream.tokens)]
    start = 0
    normed = None
    with widened_once(len(chunks)):
        for stream, part in chunks:
            normed = None  # frees the last chunk before the next is made; so do the other lines of this kind
            normed = stream.norm(stream.tokens[part])
            rows = slice(start, start + normed.shape[0])
            stream.projections.key_value(normed, stream.positions(part), ops, out=(keys[rows], values[rows]))
            start = rows.stop
    with widened_once(len(chunks)):
        for stream, part in reversed(chunks):  # the last chunk first: it is normed already
            if normed is None:
                normed = stream.norm(stream.tokens[part])
            query = stream.projections.query(normed, stream.positions(part), ops)
            normed = None
            stream.add(stream.tokens[part], attention(query, keys, values, mask))
            del query


def cross_attention_(
    stream: Stream,
    text: Tensor,
    *,
    ops: TokenOps,
    mask: Tensor | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Let the tokens of a stream attend to text [T, C of the text]; mask [T] bool, True where a text token counts.

    With keys and values [T', H, D] `beside` it they attend to those too, by themselves, and what comes of both is added.
    """
    keys, values = stream.projections.key_value(text, None, ops)
    chunks = ops.chunks(stream.tokens)
    with widened_once(len(chunks)):
        for part in chunks:
            normed = stream.norm(stream.tokens[part])
            query = stream.projections.query(normed, stream.positions(part), ops)
            del normed
            attended = attention(query, keys, values, mask)
            if beside is not None:
                attended = attended + attention(query, *beside)
            stream.add(stream.tokens[part], attended)
            del query, attended


class AttentionLayers(nn.Module):
    """The layers of an attention under the names that published checkpoints use: to_q, to_k, to_v, to_out.0, norm_q, norm_k.

    A subclass adds `forward`. The projections run once per chunk of tokens: streamed one by one, each weight would travel
    once per chunk, so they travel together.
    """

    offload_unit: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        norm: Callable[[], nn.Module],
        text_channels: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(text_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(text_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels, bias=out_bias)])
        self.norm_q = norm()
        self.norm_k = norm()

    @property
    def projections(self) -> Projections:
        """The layers before the attention."""
        return Projections(self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k, self.heads)

    def adder(self, ops: TokenOps, gate: Tensor | None = None) -> Callable[[Tensor, Tensor], object]:
        """What ends the attention: (tokens, attended) -> tokens += gate * to_out(attended), gate [C] fp32 or None for 1."""

        def add(tokens: Tensor, attended: Tensor) -> None:
            ops.gated_add(tokens, self.to_out[0](attended), gate)

        return add
