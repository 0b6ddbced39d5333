"""Ranks that share the tokens of a video: each has its part of the token stream, and in attention its part of the heads.

Work on single tokens needs nothing of other ranks. For attention ranks exchange: of its own tokens a rank gives each other
one the queries, keys and values of the heads that are that one's, attends with its heads over the tokens of all, and gives
every rank its tokens back (DeepSpeed Ulysses, arXiv:2309.14509). Texts are short and everywhere: each rank has all of their
tokens, attends with its heads, and the heads are gathered.

A rank without a head, where there are more ranks than heads, attends to nothing and has its share of all else.

Shapes: B batch, S video tokens, s of them here, W tokens that are everywhere, H heads, h of them here, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vramkit.distributed.ranks import Ranks
from vramkit.pipelines.networks.attention import Stream, attention
from vramkit.pipelines.networks.layers import TokenOps

__all__ = ["SequenceRanks", "SequenceShare", "split"]


def split(count: int, parts: int) -> list[int]:
    """Cut `count` things into `parts` that differ by one at most, the larger ones first."""
    size, larger = divmod(count, parts)
    return [size + (part < larger) for part in range(parts)]


def _spans(sizes: Sequence[int]) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class SequenceRanks:
    """What a transformer is given to share its tokens (`VideoTransformer.set_token_ranks`)."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Let copies of a transformer compute by themselves: twins that rehearse a call, for one."""

    def share(self, tokens: int) -> SequenceShare:
        """Return what this rank has of so many tokens."""
        return SequenceShare(self._ranks, tokens)


class SequenceShare:
    """The tokens of one forward that are here; see `TokenShare`."""

    def __init__(self, ranks: Ranks, tokens: int) -> None:
        self._ranks = ranks
        self._counts = split(tokens, ranks.size)
        self.own = _spans(self._counts)[ranks.rank]

    def gather(self, x: Tensor) -> Tensor:
        """Return x [B, s, ...] of the tokens of all ranks, [B, S, ...]."""
        x = x.transpose(0, 1)  # [s, B, ...]
        longest = self._counts[0]
        whole = x.new_zeros(self._ranks.size, longest, *x.shape[1:])
        whole[self._ranks.rank, : x.shape[0]] = x
        self._ranks.gather_(whole).wait()
        return torch.cat([part[:count] for part, count in zip(whole, self._counts, strict=True)]).transpose(0, 1)

    def self_attention_(self, streams: Sequence[Stream], *, ops: TokenOps) -> None:
        """Let the tokens of all streams on all ranks attend to one another, and add to those that are here."""
        heads = _HeadRanks(self._ranks, self._counts, streams)
        keys, values = heads.boxes(), heads.boxes()
        for stream, part, rows in heads.chunks(ops):
            normed = stream.norm(stream.tokens[part])
            keys.put(stream, rows, stream.projections.key(normed, stream.positions(part), ops))
            values.put(stream, rows, stream.projections.value(normed))
            del normed
        key, value = keys.exchanged(), values.exchanged()  # [S + W, h, D] each
        queries = heads.boxes()
        for stream, part, rows in heads.chunks(ops):
            normed = stream.norm(stream.tokens[part])
            queries.put(stream, rows, stream.projections.query(normed, stream.positions(part), ops))
            del normed
        query = queries.exchanged()
        if heads.count:
            for part in ops.chunks(query.flatten(1)):
                query[part] = attention(query[part], key, value).view_as(query[part])  # which is read by no other chunk
        del key, value
        attended = heads.returned(query)
        del query
        for stream, part, rows in heads.chunks(ops):
            stream.add(stream.tokens[part], attended(stream, rows))


class _HeadRanks:
    """Who has which heads of one attention, and how many tokens there are where."""

    def __init__(self, ranks: Ranks, counts: Sequence[int], streams: Sequence[Stream]) -> None:
        first = streams[0]
        self.ranks, self.streams, self.tokens = ranks, streams, counts
        self.channels: int = first.projections.to_k.out_features // first.projections.heads
        self.like = first.tokens
        self.counts = split(first.projections.heads, ranks.size)
        self.spans = _spans(self.counts)
        self.own = self.spans[ranks.rank]
        self.everywhere = sum(stream.tokens.shape[0] for stream in streams if stream.is_everywhere)

    @property
    def count(self) -> int:
        """How many heads are here."""
        return self.counts[self.ranks.rank]

    def width(self, rank: int) -> int:
        """Numbers of one token in the heads of a rank."""
        return self.counts[rank] * self.channels

    def chunks(self, ops: TokenOps) -> Iterator[tuple[Stream, slice, slice]]:
        """Chunks of tokens, and their place among those of all streams of their kind."""
        at = {False: 0, True: 0}
        for stream in self.streams:
            for part in ops.chunks(stream.tokens):
                start = at[stream.is_everywhere]
                at[stream.is_everywhere] += part.stop - part.start
                yield stream, part, slice(start, start + part.stop - part.start)

    def boxes(self) -> _Boxes:
        """Room for what is sent of all tokens that are here."""
        return _Boxes(self)

    def returned(self, attended: Tensor) -> Callable[[Stream, slice], Tensor]:
        """Give each rank what its tokens [S + W, h, D] attended to; return what looks up rows, [rows, C]."""
        ranks, total = self.ranks, sum(self.tokens)
        widths = [self.width(rank) for rank in range(ranks.size)]
        here = self.tokens[ranks.rank]
        own, everywhere = self.room(here), self.room(self.everywhere)
        sent = [count * widths[ranks.rank] for count in self.tokens]
        ranks.exchange(own, attended[:total].flatten(), [here * width for width in widths], sent).wait()
        if self.everywhere:
            received = [self.everywhere * width for width in widths]
            mine = attended[total:].flatten().repeat(ranks.size)
            ranks.exchange(everywhere, mine, received, [received[ranks.rank]] * ranks.size).wait()
        boxes = {False: self.cut(own, here), True: self.cut(everywhere, self.everywhere)}
        return lambda stream, rows: torch.cat([box[rows] for box in boxes[stream.is_everywhere]], dim=1).flatten(1)

    def room(self, tokens: int) -> Tensor:
        """Memory for all heads of so many tokens."""
        return self.like.new_empty(tokens * sum(map(self.width, range(self.ranks.size))))

    def cut(self, memory: Tensor, tokens: int) -> list[Tensor]:
        """Views [tokens, heads of a rank, D] of what one rank after the other has in `memory`."""
        sizes = [tokens * self.width(rank) for rank in range(self.ranks.size)]
        parts = zip(torch.split(memory, sizes), self.counts, strict=True)
        return [part.view(tokens, count, self.channels) for part, count in parts]


class _Boxes:
    """Queries, keys or values on their way: of the tokens that are here for the heads of each rank."""

    def __init__(self, heads: _HeadRanks) -> None:
        self._heads = heads
        self._here = heads.tokens[heads.ranks.rank]
        self._sent = heads.room(self._here)
        self._boxes = heads.cut(self._sent, self._here)
        total = sum(heads.tokens)
        self._all = heads.like.new_empty(total + heads.everywhere, heads.count, heads.channels)
        self._everywhere = self._all[total:]

    def put(self, stream: Stream, rows: slice, made: Tensor) -> None:
        """Take what was made [rows, H, D] of a chunk of tokens."""
        if stream.is_everywhere:
            self._everywhere[rows] = made[:, self._heads.own]
            return
        for box, span in zip(self._boxes, self._heads.spans, strict=True):
            box[rows] = made[:, span]

    def exchanged(self) -> Tensor:
        """Return what there is of the heads of this rank, [S + W, h, D]: of each rank's tokens, then those everywhere."""
        heads = self._heads
        sizes = [self._here * heads.width(rank) for rank in range(heads.ranks.size)]
        received = [count * heads.width(heads.ranks.rank) for count in heads.tokens]
        total = sum(heads.tokens)
        heads.ranks.exchange(self._all[:total].view(-1), self._sent, received, sizes).wait()
        self._boxes.clear()
        del self._sent
        return self._all
