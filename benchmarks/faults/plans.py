"""Modules with caches of keys and values, planned for while something fails: caches and module stay what they would be.

A plan is made by calls of twins with copies of the arguments. What ends such a call, what cannot be copied, budgets without
room and calls that end in the middle leave the caller's cache as the resident run leaves its own, to the byte.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.faults._cases import Failing, tried
from benchmarks.faults._graphs import WIDTH, OnPurposeError, same
from vramkit import PlanInfeasible, fit
from vramkit.errors import ConfigError
from vramkit.memory import module_bytes
from vramkit.offload import offload_of

__all__ = ["COUNT", "run"]

COUNT = 500
_CALLS = 4
_MOST_TOKENS = 400  # of a cache that has its memory from the beginning: half of them are beyond what rehearsals copy


@dataclasses.dataclass
class _Grown:
    """A cache whose tensors are made anew by each call, as ``DynamicCache`` of transformers."""

    layers: Any


@dataclasses.dataclass
class _Written:
    """A cache that calls write to, as ``StaticCache``; `memory` is [layers, 2, batch, tokens, WIDTH]."""

    memory: torch.Tensor
    filled: list[int]


class _Layer(nn.Module):
    """Attention to what is in the cache."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        query, *new = self.up(x).chunk(3, -1)
        keys, values = _updated(cache, self.at, new)
        out: torch.Tensor = x + self.down(torch.softmax(query @ keys.mT, -1) @ values)
        return out


class _Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(at) for at in range(layers))

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x, cache))
        return x


def _updated(cache: Any, at: int, new: list[torch.Tensor]) -> Any:
    """Put keys and values, each [batch, tokens, WIDTH], behind those of a layer; return all of them."""
    if isinstance(cache, _Written):
        begin, end = cache.filled[at], cache.filled[at] + new[0].shape[1]
        for place, tensor in zip(cache.memory[at], new, strict=True):
            place[:, begin:end] = tensor
        cache.filled[at] = end
        return cache.memory[at, :, :, :end]
    layers = cache.layers if isinstance(cache, _Grown) else cache
    before = layers[at]
    layers[at] = tuple(new) if before is None else tuple(map(torch.cat, zip(before, new, strict=True), (1, 1)))
    return layers[at]


def _drawn_cache(draw: random.Random, layers: int, batch: int) -> Any:
    kind = draw.choice(["list", "dict", "grown", "written"])
    if kind == "written":
        tokens = draw.choice([40, _MOST_TOKENS * 8 // layers])
        return _Written(torch.zeros(layers, 2, batch, tokens, WIDTH), [0] * layers)
    empty: Any = dict.fromkeys(range(layers)) if kind == "dict" else [None] * layers
    return _Grown(empty) if kind == "grown" else empty


def _tensors(cache: Any) -> list[torch.Tensor]:
    if isinstance(cache, _Written):
        return [cache.memory, torch.tensor(cache.filled)]
    layers = cache.layers if isinstance(cache, _Grown) else cache
    each = layers.values() if isinstance(layers, dict) else layers
    return [torch.stack(pair) for pair in each if isinstance(pair, tuple)]


def _are_equal(one: Any, other: Any) -> bool:
    mine, theirs = _tensors(one), _tensors(other)
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def run(count: int, seed: int) -> dict[str, int]:
    """Plan for `count` modules."""
    return tried("plans", count, seed, _try)


def _try(draw: random.Random, folder: Path, counts: Counter[str]) -> None:  # noqa: ARG001 (nothing is written)
    resident, batch = _Model(draw.randint(1, 8)).eval(), draw.randint(1, 2)
    module = copy.deepcopy(resident)
    caches = [_drawn_cache(draw, len(resident.layers), batch)]
    with torch.no_grad():
        for _ in range(draw.randint(0, 2)):
            resident(torch.randn(batch, draw.randint(1, 4), WIDTH), caches[0])
    caches.append(copy.deepcopy(caches[0]))
    x = torch.randn(batch, draw.randint(1, 4), WIDTH)
    fitted, ended = _fitted(draw, module, x, caches[1])
    counts[ended] += 1
    assert _are_equal(*caches), f"planning has written to the cache; {ended}"
    if fitted is None:
        assert offload_of(module) is None
    else:
        for at in range(_CALLS):
            _call_both(draw, resident, module, x if at == 0 else torch.randn(batch, 1, WIDTH), caches, counts)
        fitted.remove()
    assert offload_of(module) is None
    assert same(resident, module), f"other weights after remove(); {ended}"
    with torch.no_grad():
        assert torch.equal(resident(x, caches[0]), module(x, caches[1])), f"other bytes after remove(); {ended}"


def _fitted(draw: random.Random, module: nn.Module, x: torch.Tensor, cache: Any) -> tuple[Any, str]:
    """Plan for the call, with room for it or without, and let something fail; return the handle, if any, and the outcome."""
    way, options = draw.choice(["known", "not known yet", "fails", "cannot be copied"]), {"device": "cpu"}
    given: Any = None if way == "not known yet" else {"x": x, "cache": cache}
    if way == "cannot be copied":
        given["cache"] = [cache, threading.Lock()]
    error = draw.choice([OnPurposeError("on purpose"), RuntimeError("on purpose"), MemoryError("on purpose")])
    failing = Failing(draw.randint(1, 12) if way == "fails" else 0, error)
    with failing.patched((_Layer, "forward")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                return fit(module, "1KiB", example=given, **options), "planned with no room"
            except PlanInfeasible as infeasible:
                least = infeasible.nearest_bytes
            more = draw.choice([0, 1000, module_bytes(module)])
            return fit(module, least + more, example=given, **options), f"planned, the call {way}"
        except PlanInfeasible:
            if way != "fails":
                raise
            return None, "refused, the call fails: PlanInfeasible"
        except (ConfigError, OnPurposeError, RuntimeError, MemoryError) as refusal:
            if refusal is not error and way != "cannot be copied":
                raise
            return None, f"refused, the call {way}: {type(refusal).__name__}"


def _call_both(
    draw: random.Random, resident: Any, module: Any, x: torch.Tensor, caches: list[Any], counts: Counter[str]
) -> None:
    """One call of each, which may end in a layer; AssertionError where they, or their caches, differ."""
    fails_in = draw.randrange(len(resident.layers)) if draw.random() < 0.2 else None
    before, ends = copy.deepcopy(caches[1]), []
    for twin, cache in ((module, caches[1]), (resident, caches[0])):
        try:
            with torch.no_grad(), _failing(twin, fails_in):
                ends.append(twin(x, cache))
        except PlanInfeasible:  # noqa: PERF203 (each may end)
            assert _are_equal(before, cache), "a refused call has written to the cache"
            counts["calls without room for a cache that grew"] += 1
            return
        except OnPurposeError as error:
            ends.append(error)
    given, expected = ends
    assert _are_equal(*caches), "other bytes in the cache"
    if fails_in is None:
        assert torch.equal(given, expected), "other bytes"
    else:
        assert type(given) is type(expected) is OnPurposeError, f"{given!r} instead of the error of a layer"
    counts["calls with the same bytes" if fails_in is None else "calls that ended by the error of a layer"] += 1


@contextlib.contextmanager
def _failing(model: Any, at: int | None) -> Iterator[None]:
    """Let layer `at` of a model fail, but no copy of it; None: none."""
    if at is None:
        yield
        return

    def fail(layer: nn.Module, _args: Any) -> None:
        if layer is model.layers[at]:
            raise OnPurposeError

    handle = model.layers[at].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
