"""The token-wise functions against their plain formulas and diffusers' embeddings."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_timestep_embedding
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vramkit.pipelines.networks import layers
from vramkit.pipelines.networks.layers import TokenOps


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(tokens=st.integers(1, 300), chunk=st.integers(1, 400))
def test_chunks_cover_all_tokens_once_and_evenly(tokens, chunk):
    parts = layers.token_chunks(tokens, chunk)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    assert len(parts) <= math.ceil(tokens / chunk)
    assert max(part.stop - part.start for part in parts) <= chunk
    # No chunk but the last is short, and that one by less than a row per chunk.
    assert len({part.stop - part.start for part in parts[:-1]}) <= 1
    assert parts[0].stop - (parts[-1].stop - parts[-1].start) < len(parts) or len(parts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_rounds_once(dtype):
    x, weight, bias = randn(5, 16, dtype=dtype), randn(16, seed=1), randn(16, seed=2)
    expected = F.layer_norm(x.double(), (16,), eps=1e-6) * weight.double() + bias.double()
    got = layers.layer_norm(x, weight, bias, 1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_add_is_in_place_and_rounds_once(dtype):
    base, update, gate = randn(6, 16, dtype=dtype), randn(3, 16, dtype=dtype, seed=1), randn(16, seed=2)
    x = base.clone()
    layers.gated_add(x[1:4], update, gate)
    expected = base.clone()
    expected[1:4] = (base[1:4].float() + update.float() * gate).to(dtype)
    torch.testing.assert_close(x, expected)
    layers.gated_add(x, x.clone())
    torch.testing.assert_close(x, expected * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_rms_rotate_is_a_rotation_of_the_normed_pairs(dtype, compiled):
    heads, channels = 3, 24
    x, weight = randn(7, channels, dtype=dtype), randn(channels, dtype=dtype, seed=1)
    table = layers.rotary_grid((7,), (channels // heads,), device=torch.device("cpu"))
    normed = F.rms_norm(x, (channels,), weight, 1e-6).view(7, heads, -1, 2).double()
    turned = torch.view_as_complex(normed) * torch.view_as_complex(table.double())[:, None]
    expected = torch.view_as_real(turned).flatten(-2).to(dtype)

    rms_rotate = torch.compile(layers.rms_rotate, backend="eager", fullgraph=True) if compiled else layers.rms_rotate
    got = rms_rotate(x, weight, 1e-6, heads=heads, table=table)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
    whole = torch.zeros(9, heads, channels // heads, dtype=dtype)
    rms_rotate(x, weight, 1e-6, heads=heads, table=table, out=whole[1:8])
    assert torch.equal(whole[1:8], got)
    assert not whole[0].any()
    plain = rms_rotate(x, weight, 1e-6, heads=heads)
    torch.testing.assert_close(plain, normed.flatten(-2).to(dtype))


@pytest.mark.parametrize("bias", [None, 1.0])
def test_rms_norm_scales_and_shifts_in_fp32(bias):
    x, weight = randn(5, 16, dtype=torch.bfloat16), randn(16, seed=1)
    shift = None if bias is None else torch.full((16,), bias)
    expected = F.rms_norm(x.float(), (16,), weight, 1e-6) + (bias or 0.0)
    torch.testing.assert_close(layers.rms_norm(x, weight, shift, 1e-6), expected.bfloat16())


def test_norms_per_head_and_tables_per_head():
    heads, x = 3, randn(7, 24)
    table = layers.rotary_grid((7,), (24,), device=torch.device("cpu")).view(7, heads, 4, 2)  # across the heads
    weight, bias = randn(8, seed=1), randn(8, seed=2)

    def turned(normed):
        pairs = torch.view_as_complex(normed.view(7, heads, -1, 2).double())
        return torch.view_as_real(pairs * torch.view_as_complex(table.double())).flatten(-2).float()

    split = x.view(7, heads, 8)
    rms = layers.rms_rotate(x, weight, 1e-6, heads=heads, table=table)
    torch.testing.assert_close(rms, turned(F.rms_norm(split, (8,), weight, 1e-6)))
    layer = layers.layer_norm_rotate(x, weight, bias, 1e-6, heads=heads, table=table)
    torch.testing.assert_close(layer, turned(F.layer_norm(split, (8,), weight, bias, 1e-6)))


def test_rotary_axis_equals_diffusers_bit_for_bit():
    cos, sin = get_1d_rotary_pos_embed(12, 50, use_real=True, freqs_dtype=torch.float64)
    table = layers.rotary_axis(12, 50, theta=10000.0, device=torch.device("cpu"))
    assert torch.equal(table[..., 0], cos[:, ::2])
    assert torch.equal(table[..., 1], sin[:, ::2])


def test_rotary_grid_runs_its_last_axis_fastest():
    device = torch.device("cpu")
    grid = layers.rotary_grid((2, 3, 4), (4, 2, 6), device=device).view(2, 3, 4, 6, 2)
    for axis, (length, channels, start) in enumerate([(2, 4, 0), (3, 2, 2), (4, 6, 3)]):
        table = layers.rotary_axis(channels, length, theta=10000.0, device=device)
        for position in range(length):
            part = grid.select(axis, position)[..., start : start + channels // 2, :]
            assert torch.equal(part, table[position].expand_as(part))


def test_sinusoidal_embedding_equals_diffusers():
    timestep = torch.tensor([0.0, 0.5, 17.0, 999.0])
    expected = get_timestep_embedding(timestep, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(layers.sinusoidal_embedding(timestep, 32), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_patch_embedding_is_the_convolution(patch):
    torch.manual_seed(0)
    embedding = layers.PatchEmbedding(3, 8, patch)
    video = randn(2, 3, 4, 6, 12)
    expected = torch.nn.Conv3d.forward(embedding, video).flatten(2).transpose(1, 2)
    got = embedding(video)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected)


def test_timestep_embedding_computes_in_the_dtype_of_its_weights():
    embedding = layers.TimestepEmbedding(8, 16).to(torch.float64)
    assert embedding(randn(2, 8)).dtype == torch.float64


@pytest.mark.parametrize(
    ("channels", "chunks"), [(5120, 6), (3072, 6), (2048, 4), (16, 1)], ids=["wide", "less_wide", "narrow", "tiny"]
)
def test_narrow_models_take_more_tokens_at_a_time(channels, chunks):
    x = torch.empty(2, 32_760, channels, device="meta")
    parts = TokenOps().chunks(x)
    assert len(parts) == chunks
    assert [n for part in parts for n in range(32_760)[part]] == list(range(32_760))
    assert len(TokenOps(chunk_tokens=10_000).chunks(x[0])) == 4


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_feed_forward_updates_in_place(chunk):
    torch.manual_seed(0)
    ffn = layers.FeedForward(8, 32).requires_grad_(False)
    x = randn(2, 10, 8)
    shift, scale, gate = (randn(2, 8, seed=seed) for seed in (1, 2, 3))
    normed = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    inner = F.gelu(ffn.net[0].proj(normed), approximate="tanh")
    expected = x + ffn.net[2](inner) * gate[:, None]
    ops = TokenOps(chunk_tokens=chunk)
    (out,) = ffn(layers.Modulated(x, ops.layer_norm, 1e-6, shift, scale, gate), ops=ops)
    assert out is x
    torch.testing.assert_close(out, expected)
