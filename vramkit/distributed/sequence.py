"""Ranks that share the tokens of a video: each has its part of the token stream, and in attention its part of the heads.

Work on single tokens needs nothing of other ranks. For attention ranks exchange: of its own tokens a rank gives each other
one the queries, keys and values of the heads that are that one's, attends with its heads over the tokens of all, and gives
every rank its tokens back (DeepSpeed Ulysses, arXiv:2309.14509). Texts are short and everywhere: each rank has all of their
tokens, attends with its heads, and the heads are gathered.

Where the number of ranks does not divide the heads, as many of them share heads as divide both, neighbours that have their
tokens in a row; such groups are the places of a ring, on which keys and values go around (`ring`).

Shapes: B batch, S video tokens, s of them here and G in the place of this rank on the ring, W tokens that are everywhere, H
heads, h of them here, U ranks that share heads, D channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from vramkit.distributed.ranks import Ranks
from vramkit.distributed.ring import ring_attention
from vramkit.distributed.traced import exchanged, gathered
from vramkit.pipelines.networks.attention import Stream, attention
from vramkit.pipelines.networks.layers import TokenOps, write
from vramkit.shared_input import shared_input
from vramkit.uncopied import Uncopied
from vramkit.wrapper import widened_once

__all__ = ["SequenceRanks", "SequenceShare", "split"]


def split(count: int, parts: int) -> list[int]:
    """Cut `count` things into `parts` that differ by one at most, the larger ones first."""
    size, larger = divmod(count, parts)
    return [size + (part < larger) for part in range(parts)]


def _spans(sizes: Sequence[int]) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class SequenceRanks(Uncopied):
    """What a transformer is given to share its tokens (`VideoTransformer.set_token_ranks`)."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def share(self, tokens: int) -> SequenceShare:
        """Return what this rank has of so many tokens."""
        return SequenceShare(self._ranks, tokens)


class SequenceShare:
    """The tokens of one forward that are here; see `TokenShare`."""

    def __init__(self, ranks: Ranks, tokens: int) -> None:
        self._counts = split(tokens, ranks.size)
        self._number, self._rank = ranks.number, ranks.rank
        self.own = _spans(self._counts)[ranks.rank]

    def gather(self, x: Tensor) -> Tensor:
        """Return x [B, s, ...] of the tokens of all ranks, [B, S, ...]."""
        x = x.transpose(0, 1)  # [s, B, ...]
        longest = self._counts[0]
        whole = x.new_zeros(len(self._counts), longest, *x.shape[1:])
        write(whole[self._rank, : x.shape[0]], x)
        gathered(whole, self._number)
        return torch.cat([part[:count] for part, count in zip(whole, self._counts, strict=True)]).transpose(0, 1)

    def self_attention_(self, streams: Sequence[Stream], *, ops: TokenOps, mask: Tensor | None = None) -> None:
        """Let the tokens of all streams on all ranks attend to one another, and add to those that are here.

        mask, bool [s + W] in the order of the streams, hides tokens that are everywhere alone.
        """
        heads = _HeadRanks(self._number, self._rank, self._counts, streams)
        chunks = heads.chunks(ops)
        keys, values = heads.boxes(), heads.boxes()
        with widened_once(len(chunks)):
            for stream, part, rows in chunks:
                normed = stream.norm(stream.tokens[part])
                with shared_input(normed, uses=2):
                    values.put(stream, rows, stream.projections.value(normed))
                    keys.put(stream, rows, stream.projections.key(normed, stream.positions(part), ops))
                del normed
        key, value = keys.exchanged(), values.exchanged()  # [G + W, h, D] each
        queries = heads.boxes()
        with widened_once(len(chunks)):
            for stream, part, rows in chunks:
                normed = stream.norm(stream.tokens[part])
                queries.put(stream, rows, stream.projections.query(normed, stream.positions(part), ops))
                del normed
        query = queries.exchanged()
        attended = heads.attended(query, key, value, heads.hidden(mask), ops)
        del query, key, value
        own, everywhere = heads.returned(attended)  # [U, s, h, D] and [U, W, h, D]
        del attended
        with widened_once(len(chunks)):
            for stream, part, rows in chunks:
                box = everywhere if stream.is_everywhere else own
                stream.add(stream.tokens[part], box[:, rows].transpose(0, 1).flatten(1))


class _HeadRanks:
    """Who has which heads of one attention, and how many tokens there are where."""

    def __init__(self, number: int, rank: int, counts: Sequence[int], streams: Sequence[Stream]) -> None:
        """Take the number and the rank of this one among the ranks that have so many tokens each."""
        first = streams[0]
        heads = first.projections.heads
        self.number, self.size, self.streams, self.like = number, len(counts), streams, first.tokens
        self.channels: int = first.projections.to_k.out_features // heads
        self.sharers = math.gcd(heads, len(counts))  # ranks that share the heads of the same tokens
        self.heads = heads // self.sharers
        self.place, at = divmod(rank, self.sharers)
        self.own = slice(at * self.heads, (at + 1) * self.heads)
        self.first = self.place * self.sharers  # the first of those who share with this rank
        self.tokens = counts[self.first : self.first + self.sharers]
        self.here = counts[rank]
        # Tokens of each place of the ring.
        self.lengths = [sum(counts[start : start + self.sharers]) for start in range(0, len(counts), self.sharers)]
        self.everywhere = sum(stream.tokens.shape[0] for stream in streams if stream.is_everywhere)

    @property
    def total(self) -> int:
        """How many tokens there are in the place of this rank, those not counted that are everywhere."""
        return self.lengths[self.place]

    def chunks(self, ops: TokenOps) -> list[tuple[Stream, slice, slice]]:
        """Chunks of tokens, and their place among those of all streams of their kind."""
        at, chunks = {False: 0, True: 0}, []
        for stream in self.streams:
            for part in ops.chunks(stream.tokens):
                start = at[stream.is_everywhere]
                at[stream.is_everywhere] += part.stop - part.start
                chunks.append((stream, part, slice(start, start + part.stop - part.start)))
        return chunks

    def boxes(self) -> _Boxes:
        """Room for what is sent of all tokens that are here."""
        return _Boxes(self)

    def room(self, *tokens: int) -> Tensor:
        """Memory for the heads of one rank, [*tokens, h, D]."""
        return self.like.new_empty(*tokens, self.heads, self.channels)

    def hidden(self, mask: Tensor | None) -> Tensor | None:
        """What `mask` says of the tokens that are everywhere, [W]."""
        if mask is None:
            return None
        parts = torch.split(mask, [stream.tokens.shape[0] for stream in self.streams])
        kept = [part for part, stream in zip(parts, self.streams, strict=True) if stream.is_everywhere]
        return torch.cat(kept) if kept else None

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ops: TokenOps) -> Tensor:
        """What `query` [G + W, h, D], overwritten, attends to: the keys of all places, mask [W] for those everywhere."""
        parts = ops.chunks(query.flatten(1))
        if len(self.lengths) > 1:
            rows = parts[0].stop if parts else 1
            found: Tensor = ring_attention(query, key, value, mask, self.lengths, self.sharers, rows, self.number)
            return found
        mask = None if mask is None else F.pad(mask, (self.total, 0), value=True)
        for part in parts:
            write(query[part], attention(query[part], key, value, mask).view_as(query[part]))  # read by no other chunk
        return query

    def exchange(self, out: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """Exchange heads of tokens, so many with each rank that shares heads with this one."""
        width = self.heads * self.channels
        before, after = [0] * self.first, [0] * (self.size - self.first - self.sharers)
        received, sent = ([*before, *(count * width for count in counts), *after] for counts in (received, sent))
        exchanged(out.view(-1), given.view(-1), received, sent, self.number)

    def returned(self, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Give each rank what its tokens [G + W, h, D] attended to: [U, s, h, D] here, [U, W, h, D] everywhere."""
        of_all, of_texts = attended[: self.total], attended[self.total :]
        if self.sharers == 1:
            return of_all[None], of_texts[None]
        own, everywhere = self.room(self.sharers, self.here), self.room(self.sharers, self.everywhere)
        self.exchange(own, of_all, [self.here] * self.sharers, self.tokens)
        if self.everywhere:
            counts = [self.everywhere] * self.sharers
            self.exchange(everywhere, of_texts.repeat(self.sharers, 1, 1), counts, counts)
        return own, everywhere


class _Boxes:
    """Queries, keys or values on their way: of the tokens that are here for the heads of each rank."""

    def __init__(self, heads: _HeadRanks) -> None:
        self._heads = heads
        self._all = heads.room(heads.total + heads.everywhere)
        alone = self._all[: heads.total][None]  # which nobody has to be sent
        self._sent: Tensor | None = alone if heads.sharers == 1 else heads.room(heads.sharers, heads.here)

    def put(self, stream: Stream, rows: slice, made: Tensor) -> None:
        """Take what was made [rows, H, D] of a chunk of tokens."""
        heads = self._heads
        if stream.is_everywhere:
            write(self._all[heads.total :][rows], made[:, heads.own])
        elif self._sent is not None:
            write(self._sent[:, rows], made.view(-1, heads.sharers, heads.heads, heads.channels).transpose(0, 1))

    def exchanged(self) -> Tensor:
        """Return what there is of the heads of this rank, [G + W, h, D]: of each rank's tokens, then those everywhere."""
        heads, sent = self._heads, self._sent
        if sent is not None and heads.sharers > 1:
            heads.exchange(self._all[: heads.total], sent, heads.tokens, [heads.here] * heads.sharers)
        self._sent = None
        return self._all
