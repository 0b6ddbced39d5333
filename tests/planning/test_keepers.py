"""Calls of what keeps tensors: those that find and do the same are run once, and counted as if all had run."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from autoencoders import build_pair
from torch import nn

from vramkit.planning import watch
from vramkit.planning.rehearsal import Rehearsal, rehearse

BLOCKS, WIDTH, ROWS = 4, 512, 1024  # tensors of 2 MiB: none is small
RAN: Counter[str] = Counter()


class Past:
    """What each block left for its next call."""

    def __init__(self) -> None:
        self.queues: dict[Hashable, deque[torch.Tensor]] = defaultdict(deque)
        self.elsewhere: list[torch.Tensor] = []
        self.is_odd = False

    def kept_for(self, layer: nn.Module) -> list[deque[torch.Tensor]]:
        return [self.queues[layer]]

    def way(self) -> Hashable:
        return self.is_odd


Leave = Callable[[Past, deque[torch.Tensor], torch.Tensor, torch.Tensor | None], torch.Tensor | None]


class Block(nn.Module):
    """Adds what it left before, and leaves (and gives) what `leave` makes of its result and of what was left."""

    def __init__(self, leave: Leave) -> None:
        super().__init__()
        self.layer, self.leave = nn.Linear(WIDTH, WIDTH), leave

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        RAN["block"] += 1
        queue = past.queues[self.layer]
        before = queue.popleft() if queue else None
        y: torch.Tensor = self.layer(x)
        if before is not None:
            y = y + before[-ROWS:]
        if past.is_odd:
            y = y.exp().relu()
        given = self.leave(past, queue, y, before)
        return y + 1 if given is None else given


class Clip(nn.Module):
    def __init__(self, leave: Leave, frames: int) -> None:
        super().__init__()
        self.blocks, self.frames = nn.ModuleList(Block(leave) for _ in range(BLOCKS)), frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = Past()
        for frame in range(self.frames):
            past.is_odd = frame == self.frames // 2
            y = x
            for block in self.blocks:
                y = block(y, past)
        return y


def told(module: nn.Module, call: Callable[[], object]) -> tuple[Rehearsal, int]:
    RAN.clear()
    methods = ("forward",) if isinstance(module, Clip) else ("decode",)
    done = rehearse({"it": module}, {"it": methods}, call, device=torch.device("cuda"))
    return done, RAN["block"]


def course(done: Rehearsal) -> list[list[tuple[int, int]]]:
    """What came and went, in order, with numbers in the order of their first use."""
    found = []
    for segment in done.segments:
        numbers: dict[int, int] = {}
        found.append([(numbers.setdefault(number, len(numbers)), size) for number, size in segment.lives])
    return found


def compare(module: nn.Module, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Rehearse with and without running like calls once: it has to make no difference. Returns how often blocks ran."""
    done, ran = told(module, call)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "is_keeper", lambda _: False)
        all_done, all_ran = told(module, call)
    assert done.peak_bytes == all_done.peak_bytes
    assert [(s.component, s.peak_bytes, s.flops) for s in done.segments] == [
        (s.component, s.peak_bytes, s.flops) for s in all_done.segments
    ]
    assert course(done) == course(all_done)
    return ran, all_ran


def steady(past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None) -> None:
    queue.append(y.clone())


def more_each_time(past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None) -> None:
    queue.append(y.clone() if before is None else torch.cat((before, y)))


def one_more(past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None) -> None:
    queue.extend((y.clone(), y.clone()))


def part_of_a_result(past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None) -> None:
    whole = torch.cat((y, y))
    queue.extend((whole[:ROWS], whole[ROWS:]))


def what_was_there(past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None) -> None:
    queue.append(y.clone() if before is None else before)


def in_another_place(past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None) -> None:
    queue.append(y.clone())
    past.elsewhere.append(y)


def and_gives_a_view_of_it(
    past: Past, queue: deque[torch.Tensor], y: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    queue.append(y.clone() if before is None else before)
    return queue[0].view(ROWS, WIDTH)


@pytest.mark.parametrize(
    ("leave", "kinds"),
    [
        (steady, 3),  # with nothing before it, with something, and in another way
        (more_each_time, 12),  # each frame finds more
        (one_more, 3),
    ],
)
def test_calls_that_find_and_leave_the_same_run_once(leave: Leave, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Clip(leave, frames=12).to("meta"), torch.empty(ROWS, WIDTH, device="meta")
    assert compare(net, lambda: net(x), monkeypatch) == (kinds, 12 * BLOCKS)


@pytest.mark.parametrize("leave", [part_of_a_result, in_another_place, and_gives_a_view_of_it])
def test_calls_that_leave_what_cannot_be_told_run_each_time(leave: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Clip(leave, frames=6).to("meta"), torch.empty(ROWS, WIDTH, device="meta")
    assert compare(net, lambda: net(x), monkeypatch) == (6 * BLOCKS, 6 * BLOCKS)


def test_what_is_put_back_is_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Clip(what_was_there, frames=6).to("meta"), torch.empty(ROWS, WIDTH, device="meta")
    compare(net, lambda: net(x), monkeypatch)


@pytest.mark.parametrize("way", ["whole", "stripes", "tiles"])
def test_a_decode_of_wan_is_counted_as_if_all_of_it_had_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build_pair("Wan2.1")[0].to("meta")
    if way == "stripes":
        vae.enable_striping(4)
    elif way == "tiles":
        vae.enable_tiling(64, 64, 48, 48)
    z = torch.empty(1, vae.config.z_dim, 6, 24, 20, device="meta")
    inner: Any = type(vae.decoder.conv_out).forward

    def count(*args: Any) -> Any:
        RAN["block"] += 1
        return inner(*args)

    monkeypatch.setattr(type(vae.decoder.conv_out), "forward", count)
    ran, all_ran = compare(vae, lambda: vae.decode(z), monkeypatch)
    assert ran < all_ran / 2
