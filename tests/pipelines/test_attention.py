"""Attention in chunks and in place equals attention written out, for one stream and for several."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vramkit.pipelines.networks.attention import (
    AttentionLayers,
    Stream,
    attention,
    cross_attention_,
    self_attention_,
)
from vramkit.pipelines.networks.layers import TokenOps, rotary_grid

CHANNELS, HEADS = 24, 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(norm, seed=0, text_channels=None):
    torch.manual_seed(seed)
    made = AttentionLayers(CHANNELS, HEADS, norm=norm, text_channels=text_channels).requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def plain(query, key, value, allowed=None):
    """Attention [S, H, D] x [T, H, D] -> [S, C] by its definition."""
    scores = torch.einsum("shd,thd->hst", query, key) / query.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hst,thd->shd", scores.softmax(-1), value).flatten(1)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_over_the_keys(masked):
    query, key, value = randn(5, 2, 8), randn(9, 2, 8, seed=1), randn(9, 2, 8, seed=2)
    mask = torch.arange(9) < 6 if masked else None
    torch.testing.assert_close(attention(query, key, value, mask), plain(query, key, value, mask))


@pytest.mark.parametrize("norm", [partial(nn.RMSNorm, CHANNELS), partial(nn.LayerNorm, 8), partial(nn.RMSNorm, 8)])
@pytest.mark.parametrize("chunk", [3, 100])
def test_streams_attend_to_each_other_in_their_order(norm, chunk):
    ops = TokenOps(chunk_tokens=chunk)
    made = [layers(norm, seed) for seed in (1, 2)]
    tokens = [randn(7, CHANNELS), randn(4, CHANNELS, seed=1)]
    table = rotary_grid((7,), (8,), device=torch.device("cpu"))
    norms = [partial(F.layer_norm, normalized_shape=(CHANNELS,)), lambda x: 2 * x]

    parts = []
    for each, x, normed, positions in zip(made, tokens, norms, (table, None), strict=True):
        y = normed(x)
        parts.append(
            (
                each.projections.query(y, positions, ops),
                each.projections.key(y, positions, ops),
                each.projections.value(y),
            )
        )
    query, key, value = (torch.cat(kind) for kind in zip(*parts, strict=True))
    attended = plain(query, key, value).split([7, 4])
    expected = [x + 0.5 * each.to_out[0](out) for each, x, out in zip(made, tokens, attended, strict=True)]

    gate = torch.full((CHANNELS,), 0.5)
    streams = [
        Stream(x, normed, each.projections, each.adder(ops, gate), positions)
        for each, x, normed, positions in zip(made, tokens, norms, (table, None), strict=True)
    ]
    self_attention_(streams, ops=ops)
    for stream, wanted in zip(streams, expected, strict=True):
        torch.testing.assert_close(stream.tokens, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_reads_text_of_other_width(masked):
    ops = TokenOps(chunk_tokens=3)
    made = layers(partial(nn.RMSNorm, CHANNELS), text_channels=10)
    x, text = randn(7, CHANNELS), randn(5, 10, seed=1)
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    query, key = made.projections.query(x, None, ops), made.projections.key(text, None, ops)
    expected = x + made.to_out[0](plain(query, key, made.projections.value(text), mask))
    cross_attention_(Stream(x, nn.Identity(), made.projections, made.adder(ops)), text, ops=ops, mask=mask)
    torch.testing.assert_close(x, expected)
