"""Ctrl-C at any moment of planning, of applying and of each part of a call: what follows is as if nothing had been."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, Stock, models_of, seeded
from modules import traces
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from vramkit import Fit, fit, offload_of, plan
from vramkit.memory import GIB
from vramkit.offload.backend import CpuBackend
from vramkit.offload.turns import Turns

CALL = {"prompt": "a cat", "output_type": "pt", "num_inference_steps": 2, **FAMILIES["Wan2.1"].clip}
PHASES = ("encode", "denoise", "decode")


class Clock:
    """Interrupts at the n-th tick of a phase; before it is wound it counts them."""

    def __init__(self) -> None:
        self.phase, self.left, self.ticks = "", -1, 0
        self._in = ""

    def enter(self, phase: str, **_: Any) -> None:
        self._in = phase

    def wind(self, phase: str, moment: int) -> None:
        self.phase, self.left, self.ticks, self._in = phase, moment, 0, ""

    def tick(self) -> None:
        if self.phase not in ("", self._in):
            return
        self.ticks += 1
        if self.ticks == self.left:
            raise KeyboardInterrupt


class Operators(TorchDispatchMode):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._clock.tick()
        return func(*args, **(kwargs or {}))


@contextmanager
def of_operators(clock: Clock, _patch: pytest.MonkeyPatch) -> Iterator[None]:
    with Operators(clock):
        yield


@contextmanager
def of_modules(clock: Clock, _patch: pytest.MonkeyPatch) -> Iterator[None]:
    hook = register_module_forward_hook(lambda *_: clock.tick())
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def of_turns_and_memory(clock: Clock, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """When slots are allocated, room is made, a pass begins."""

    def ticking(method: Callable[..., Any]) -> Callable[..., Any]:
        def tick(*args: Any, **kwargs: Any) -> Any:
            clock.tick()
            found = method(*args, **kwargs)
            clock.tick()
            return found

        return tick

    with patch.context() as patched:
        for kind, name in ((CpuBackend, "memory"), (Turns, "make_room"), (Turns, "begin")):
            patched.setattr(kind, name, ticking(getattr(kind, name)))
        yield


def clip(pipeline: Any) -> torch.Tensor:
    torch.manual_seed(5)
    frames: torch.Tensor = pipeline(**CALL, generator=seeded()).frames
    return frames


def traces_of(pipeline: Any) -> dict[str, Any]:
    parts = models_of(pipeline)
    return {name: traces(part) for name, part in parts.items()} | {
        f"type of {name}": type(part) for name, part in (*parts.items(), ("pipeline", pipeline))
    }


def as_it_is(pipeline: Any) -> tuple[torch.Tensor, dict[str, Any], int]:
    """Its clip, its traces after offloading that nobody interrupted, and a budget under which it streams."""
    expected, budget = clip(pipeline), plan(pipeline, GIB, device="cpu", **CALL).floor_bytes + 20_000
    with fit(pipeline, budget, device="cpu", **CALL) as fitted:
        assert torch.equal(clip(pipeline), expected)
        assert any(each.loads for each in fitted.stats().values())
    return expected, traces_of(pipeline), budget


def moments(total: int, most: int) -> list[int]:
    """The first and the last moments, and some between them."""
    step = max(1, total // most)
    return sorted({1, 2, total - 1, total, *range(3, total, step)} - {0, -1})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "source",
    [
        of_modules,
        pytest.param(of_operators, marks=pytest.mark.thorough),
        pytest.param(of_turns_and_memory, marks=pytest.mark.thorough),
    ],
)
def test_a_call_that_was_interrupted_leaves_the_next_one_as_it_was(
    source: Any, phase: str, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = stock.pipeline("Wan2.1")
    expected, before, budget = as_it_is(pipeline)
    clock, fitted = Clock(), fit(pipeline, budget, device="cpu", **CALL)
    pipeline.on_phase = clock.enter
    with source(clock, monkeypatch):
        clock.wind(phase, -1)
        clip(pipeline)
        assert clock.ticks > 0
        for moment in moments(clock.ticks, 4):
            clock.wind(phase, moment)
            with contextlib.suppress(KeyboardInterrupt):  # a call may have fewer moments than the first one
                clip(pipeline)
            clock.wind(phase, -1)
            assert torch.equal(clip(pipeline), expected)
        clock.wind(phase, 1)
        with pytest.raises(KeyboardInterrupt):
            clip(pipeline)
    pipeline.on_phase = None
    fitted.remove()
    assert traces_of(pipeline) == before
    assert torch.equal(clip(pipeline), expected)


@pytest.mark.parametrize("source", [of_operators, pytest.param(of_turns_and_memory, marks=pytest.mark.thorough)])
def test_fit_that_was_interrupted_leaves_the_pipeline_as_it_was(
    source: Any, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, clock = stock.pipeline("Wan2.1"), Clock()
    expected, before, budget = as_it_is(pipeline)

    def fitted() -> Fit:
        return fit(pipeline, budget, device="cpu", **CALL)

    with source(clock, monkeypatch):
        clock.wind("", -1)
        fitted().remove()
        for moment in moments(clock.ticks, 4):
            clock.wind("", moment)
            try:
                handle = fitted()
            except KeyboardInterrupt:
                assert traces_of(pipeline) == before
                continue
            try:
                handle.remove()
            except KeyboardInterrupt:
                handle.remove()
            assert traces_of(pipeline) == before
    assert traces_of(pipeline) == before
    assert torch.equal(clip(pipeline), expected)


class Greedy(nn.Module):
    """Blocks, the third of which finds no memory the first time that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.is_full = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = torch.tanh(block(x))
            if index == 2 and self.is_full:
                self.is_full = False
                raise torch.OutOfMemoryError("no memory")
        return x


@pytest.mark.parametrize("source", [of_modules, of_turns_and_memory])
@pytest.mark.filterwarnings("ignore:the device had no room")
def test_the_second_try_of_what_found_no_memory(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, clock = Greedy().eval().requires_grad_(False), torch.randn(2, 64), Clock()
    net.blocks[1].requires_grad_()
    expected, before = net(x), traces(net)

    def again() -> torch.Tensor:
        net.is_full = True
        try:
            found: torch.Tensor = net(x)
        except torch.OutOfMemoryError:
            found = net(x)
        return found

    with torch.no_grad(), source(clock, monkeypatch):
        clock.wind("", -1)
        with fit(net, 60_000, device="cpu", example=x):
            assert torch.equal(again(), expected)
        for moment in range(1, clock.ticks + 1):
            clock.wind("", -1)
            with fit(net, 60_000, device="cpu", example=x):
                clock.wind("", moment)
                try:
                    again()
                except KeyboardInterrupt:
                    net.is_full = False
                clock.wind("", -1)
                assert torch.equal(net(x), expected)
            clock.wind("", -1)
            assert traces(net) == before


@pytest.mark.thorough
def test_signals_at_random_moments(stock: Stock) -> None:
    pipeline = stock.pipeline("Wan2.1")
    expected, before, budget = as_it_is(pipeline)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    generator = torch.Generator().manual_seed(1)
    try:
        for _ in range(30):
            fitted = fit(pipeline, budget, device="cpu", **CALL)
            for _ in range(3):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.001 + float(torch.rand(1, generator=generator)) / 4)
                    clip(pipeline)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    pass
                assert torch.equal(clip(pipeline), expected)
            fitted.remove()
            assert traces_of(pipeline) == before
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + float(torch.rand(1, generator=generator)))
                fit(pipeline, budget, device="cpu", **CALL).remove()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                is_lost = any(offload_of(part) is not None for part in models_of(pipeline).values())
                assert is_lost or traces_of(pipeline) == before
                if is_lost:  # it came after the end of `fit`, or inside of `remove`
                    return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
