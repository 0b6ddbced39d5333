"""Products of one input narrow it once: the same bytes, and nothing that lives longer than the last of them."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from quant.emulation import emulated
from torch import nn

from vramkit.casting import narrowed
from vramkit.pipelines.networks import attention
from vramkit.pipelines.networks.attention import (
    AttentionLayers,
    Projections,
    Stream,
    cross_attention_,
    self_attention_,
)
from vramkit.pipelines.networks.layers import TokenOps
from vramkit.quant import scaled_linear
from vramkit.quant.scaled_linear import ScaledLinear, narrow_rows
from vramkit.shared_input import shared_input

E4M3 = torch.float8_e4m3fn


def layer(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    made = nn.Linear(64, 48).to(dtype).requires_grad_(False)
    made.weight = nn.Parameter(narrowed(made.weight, E4M3, dtype), requires_grad=False)
    return made


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", emulated)


def narrowings(monkeypatch):
    """What activations are narrowed from here on, each a weak reference to what came of it."""
    made = []

    def counted(x):
        stored, scale = narrow_rows(x)
        made.append(weakref.ref(stored))
        return stored, scale

    monkeypatch.setattr(scaled_linear, "narrow_rows", counted)
    return made


def test_products_of_one_input_narrow_it_once(emulation, monkeypatch):
    first, second, third = (ScaledLinear.of(layer(), "cpu") for _ in range(3))
    x = torch.randn(3, 64).bfloat16()
    expected = [each(x) for each in (first, second, third)]
    made = narrowings(monkeypatch)
    with shared_input(x, uses=2):
        found = [first(x)]
        assert made[0]() is not None
        found.append(second(x))
        assert made[0]() is None  # that was the last one of them
        assert len(made) == 1
        found.append(third(x))
    assert len(made) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    second(x)
    assert len(made) == 3
    assert all(narrow() is None for narrow in made)


def test_what_is_another_input_is_narrowed_by_itself(emulation, monkeypatch):
    scaled, x = ScaledLinear.of(layer(), "cpu"), torch.randn(3, 64).bfloat16()
    made = narrowings(monkeypatch)
    with shared_input(x, uses=3):
        scaled(x)
        scaled(x.clone())
        scaled(x[:2])
        assert len(made) == 3
        with shared_input(x, uses=2):
            scaled(x)
        assert len(made) == 4
        scaled(x)
        assert len(made) == 4  # the outer one goes on
        x.mul_(2)
        assert torch.equal(scaled(x), ScaledLinear.of(scaled.plain(), "cpu")(x.clone()))
    assert len(made) == 6


def test_each_dtype_of_autocast_is_narrowed(emulation, monkeypatch):
    scaled, x = ScaledLinear.of(layer(torch.float32), "cpu"), torch.randn(3, 64)
    made = narrowings(monkeypatch)
    with shared_input(x, uses=3):
        assert scaled(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert scaled(x).dtype == torch.bfloat16
            scaled(x)
    assert len(made) == 2


def test_other_threads_and_inference_mode_share_nothing(emulation, monkeypatch):
    scaled, x = ScaledLinear.of(layer(), "cpu"), torch.randn(3, 64).bfloat16()
    made = narrowings(monkeypatch)
    with shared_input(x, uses=3), ThreadPoolExecutor(1) as pool:
        scaled(x)
        pool.submit(scaled, x).result()
        assert len(made) == 2
    with torch.inference_mode():
        y = x.clone()
        with shared_input(y, uses=2):
            scaled(y)
            y.mul_(2)
            assert torch.equal(scaled(y), scaled(y.clone()))


def test_a_shared_input_compiles_whole(emulation):
    torch._dynamo.reset()
    first, second = (ScaledLinear.of(layer(), "cpu") for _ in range(2))

    def both(x):
        with shared_input(x, uses=2):
            return first(x) + second(x)

    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize("name", ["self", "cross"])
def test_attention_narrows_keys_and_values_once(emulation, monkeypatch, name):
    """In as many chunks as there are, with the same bytes, and with nothing narrow left beside the norm of the keys."""
    torch.manual_seed(0)
    made = AttentionLayers(64, 4, norm=lambda: nn.RMSNorm(16)).bfloat16().requires_grad_(False)
    for key in ("to_q", "to_k", "to_v"):
        linear = getattr(made, key)
        linear.weight = nn.Parameter(narrowed(linear.weight, E4M3, torch.bfloat16), requires_grad=False)
        setattr(made, key, ScaledLinear.of(linear, "cpu"))
    ops, x, text = TokenOps(chunk_tokens=4), torch.randn(8, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    left = []
    counted = narrowings(monkeypatch)
    rotate = Projections._normed

    def watched(*args):
        left.append(sum(narrow() is not None for narrow in counted))
        return rotate(*args)

    monkeypatch.setattr(Projections, "_normed", watched)
    outputs = []
    for is_shared in (False, True):
        share = shared_input if is_shared else lambda *_, **__: nullcontext()
        monkeypatch.setattr(attention, "shared_input", share)
        counted.clear()
        tokens = x.clone()
        stream = Stream(tokens, lambda part: part * 2, made.projections, made.adder(ops))
        if name == "self":
            self_attention_([stream], ops=ops)
        else:
            cross_attention_(stream, text, ops=ops)
        outputs.append((tokens, len(counted)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert [count for _, count in outputs] == ([6, 4] if name == "self" else [4, 3])
    assert not any(left)
