"""Attention whose keys and values go around a ring of ranks, while each attends with its queries to what it has.

Softmax over all keys is put together of what came of each block of them: the results of two blocks are weighted by the sums
of their exponentials, whose logarithms the kernels tell (Ring Attention, arXiv:2310.01889; the merge as in FlashAttention,
arXiv:2205.14135). Sums are in fp32, or wider if the tokens are. The blocks of a rank come in the order of the ring,
beginning with its own, which is the same in every run. Tokens that are everywhere are a block of their own, and what they
attend to is put together in one order on all ranks: they stay the same everywhere.

Shapes: G tokens in the place of this rank, W tokens that are everywhere, T keys, h heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vramkit.distributed.ranks import Ranks, Transfer, ranks_of
from vramkit.pipelines.networks.layers import token_chunks

__all__ = ["ring_attention"]


@torch.library.custom_op("vramkit::ring_attention", mutates_args=())
def ring_attention(  # noqa: PLR0917 - those of the operation
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
    step: int,
    rows: int,
    number: int,
) -> Tensor:
    """What the queries of this rank attend to, over the keys of all places; to a compiler an opaque operation.

    Args:
        query: of the tokens in the place of this rank and those everywhere, [G + W, h, D].
        key: of the same tokens.
        value: of the same tokens.
        mask: of the tokens that are everywhere, bool [W], True for those that are attended to; None for all.
        lengths: how many tokens there are in each place, G for that of this rank.
        step: how many ranks one place has; this rank gives to the rank so many behind it.
        rows: how many queries are computed at once.
        number: of the ranks.

    Returns:
        [G + W, h, D], in the dtype of the query.
    """
    return _Ring(ranks_of(number), lengths, step).attend(query, key, value, mask, rows)


@ring_attention.register_fake
def _(query: Tensor, *_given: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


class _Ring:
    """The ring, as one of its ranks sees it."""

    def __init__(self, ranks: Ranks, lengths: Sequence[int], step: int) -> None:
        self._ranks, self._lengths, self._step = ranks, lengths, step
        self._place = ranks.rank // step

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rows: int) -> Tensor:
        """See `ring_attention`."""
        count = self._lengths[self._place]
        own, texts = query[:count], query[count:]
        of_own, of_texts = _Sums(own), _Sums(texts)
        parts = token_chunks(count, rows)
        if len(texts):
            for part in parts:
                of_own.add(part, *_attended(own[part], key[count:], value[count:], mask))
        found: dict[int, tuple[Tensor, Tensor]] = {}  # what texts attended to in each place
        block, at = torch.stack((key[:count], value[:count])), self._place
        for left in reversed(range(len(self._lengths))):
            coming, transfer = self._pass_on(block, at) if left else (block, None)
            if block.shape[1]:
                for part in parts:
                    of_own.add(part, *_attended(own[part], *block))
                if len(texts):
                    found[at] = _attended(texts, *block)
            if transfer is not None:
                transfer.wait()
            block, at = coming, (at - 1) % len(self._lengths)
        if len(texts):
            everything = slice(None)
            for at in sorted(found):
                of_texts.add(everything, *found[at])
            of_texts.add(everything, *_attended(texts, key[count:], value[count:], mask))
        return torch.cat((of_own.sums, of_texts.sums)).to(query.dtype)

    def _pass_on(self, block: Tensor, at: int) -> tuple[Tensor, Transfer]:
        """Send the keys and values of place `at` [2, T, h, D] on, and receive those of the place before it."""
        ranks, places = self._ranks, len(self._lengths)
        coming = block.new_empty(2, self._lengths[(at - 1) % places], *block.shape[2:])
        received, sent = [0] * ranks.size, [0] * ranks.size
        received[(ranks.rank - self._step) % ranks.size] = coming.numel()
        sent[(ranks.rank + self._step) % ranks.size] = block.numel()
        return coming, ranks.exchange(coming.view(-1), block.view(-1), received, sent)


class _Sums:
    """What queries attended to so far."""

    def __init__(self, query: Tensor) -> None:
        wide = torch.promote_types(query.dtype, torch.float32)
        self.sums = query.new_zeros(query.shape, dtype=wide)  # [S, h, D]
        self._logs = query.new_full(query.shape[:2], -torch.inf, dtype=wide)  # [S, h], of the sums of exponentials

    def add(self, part: slice, attended: Tensor, logs: Tensor) -> None:
        """Put to queries of `part` what they attended to in another block, [s, h, D], and its logarithms [s, h]."""
        before = self._logs[part]
        weights = torch.sigmoid(logs - before)
        self.sums[part].lerp_(attended.to(self.sums.dtype), weights[..., None].to(self.sums.dtype))
        before.copy_(torch.logaddexp(before, logs.to(before.dtype)))


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What queries [s, h, D] attend to over keys [T, h, D], and logarithms [s, h] of the sums of exponentials."""
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))  # [1, h, s or T, D]
    if mask is None:
        out, logs = _kernel(q)(q, k, v)[:2]
    else:  # of few keys
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
        scores.masked_fill_(~mask, torch.finfo(wide).min)  # which is no number minus itself where all are hidden
        logs = scores.logsumexp(dim=-1)
        out = (scores - logs[..., None]).exp_() @ v.to(wide)
    # Some kernels fill the logarithms up to a whole number of their blocks.
    return out[0].transpose(0, 1), logs[0, :, : query.shape[0]].transpose(0, 1)


def _kernel(query: Tensor) -> Callable[..., Any]:
    """The kernel of `scaled_dot_product_attention` that tells its logarithms, for tokens of this kind."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001
    return lambda q, k, v: efficient(q, k, v, None, True)
