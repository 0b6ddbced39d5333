"""What a rehearsal runs once, and that it counts as if all had run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, Stock
from live_bytes import peak_bytes
from torch import nn

from vramkit import PlanInfeasible, plan
from vramkit.memory import GIB
from vramkit.planning.features import Settings
from vramkit.planning.planner import Planner
from vramkit.planning.twins import Twins

FRAMES, BLOCKS, WIDTH = 7, 4, 512
RAN: Counter[str] = Counter()


class Block(nn.Module):
    """Adds what it saw of the frame before, and leaves in a list what `left` makes of its frame and of its result."""

    def __init__(self, left: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.left = nn.Linear(WIDTH, WIDTH), left

    def forward(self, x: torch.Tensor, past: list[Any], at: list[int]) -> torch.Tensor:
        RAN["block"] += 1
        before, here = past[at[0]], at[0]
        y: torch.Tensor = self.layer(x) if before is None else self.layer(torch.cat((before, x)))[-len(x) :] + x
        past[here] = self.left(x, y)
        at[0] += 1
        return y


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        RAN["norm"] += 1
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.mul(x / length, self.weight, out=out)


class Clip(nn.Module):
    """Frame by frame through blocks that share a list, each frame with a norm of its own place."""

    def __init__(self, left: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(left) for _ in range(BLOCKS))
        self.norm = Norm()

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        made, past = torch.empty_like(frames), [None] * BLOCKS
        for place, frame in zip(made.unbind(), frames.unbind(), strict=True):
            x, at = frame, [0]
            for block in self.blocks:
                x = block(x, past, at)
            self.norm(x, out=place)
        return made


def rehearsed(net: nn.Module, frames: torch.Tensor) -> int:
    RAN.clear()
    return plan(net, "1GiB", device="cpu", example=(frames,)).phases[0].activation_bytes


def needed(net: nn.Module, frames: torch.Tensor) -> int:
    with torch.no_grad():
        return peak_bytes(lambda: net(frames), [*net.parameters(), frames])


def test_blocks_that_write_to_lists_run_until_they_write_the_same() -> None:
    net, frames = Clip(lambda x, _: x.clone()), torch.ones(FRAMES, 128, WIDTH)
    found = rehearsed(net, frames)
    assert RAN["block"] == 2 * BLOCKS  # with nothing before it, and with a frame
    assert found - frames.nbytes == pytest.approx(needed(net, frames), rel=1e-3)


@pytest.mark.parametrize("left", [lambda _, y: y, lambda x, _: x[:64], lambda _, y: y[:64]])
def test_what_lies_in_the_memory_of_something_else_is_not_told_and_runs_each_time(left: Any) -> None:
    net, frames = Clip(left), torch.ones(FRAMES, 128, WIDTH)
    found = rehearsed(net, frames)
    assert RAN["block"] == FRAMES * BLOCKS
    assert found - frames.nbytes == pytest.approx(needed(net, frames), rel=1e-3)


def test_a_layer_that_is_no_operator_of_torch_runs_once_for_tensors_that_lie_alike() -> None:
    net, frames = Clip(lambda x, _: x.clone()), torch.ones(FRAMES, 128, WIDTH)
    rehearsed(net, frames)
    assert RAN["norm"] == 1


class Noting(nn.Module):
    """A layer that notes what it returned last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.noted = nn.Linear(WIDTH, WIDTH), torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RAN["noting"] += 1
        self.noted = self.layer(x)
        return self.noted * 1


class Guided:
    """A pipeline that computes frames and then the half of them, and reads what the layer has noted after each."""

    def __init__(self) -> None:
        self.transformer = Noting()

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def __call__(self, frames: torch.Tensor) -> Any:
        for _ in range(3):
            for given in (frames, frames[: FRAMES // 2]):
                frames = frames + self.transformer(given).mean()
                if self.transformer.noted.shape != given.shape:
                    raise AttributeError("noted something else")
        return frames


def test_what_reads_more_than_components_return_is_run_as_a_whole() -> None:
    RAN.clear()
    pipe, frames = Guided(), torch.ones(FRAMES, 128, WIDTH)
    found = plan(pipe, "1GiB", device="cpu", frames=frames)
    assert RAN["noting"] == 2 + 6
    assert not found.notes
    with torch.no_grad():
        taken = peak_bytes(lambda: pipe(frames), [*pipe.transformer.parameters(), frames])
    assert max(phase.activation_bytes for phase in found.phases) == taken + frames.nbytes


def test_an_error_of_the_call_itself_is_that_of_the_user() -> None:
    pipe = Guided()
    pipe.transformer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan(pipe, "1GiB", device="cpu", frames=torch.ones(FRAMES, 128, WIDTH))


def test_what_does_nothing_without_memory_is_not_tried_again() -> None:
    RAN.clear()
    pipe = Guided()
    pipe.transformer.register_forward_hook(
        lambda *_: torch.ones(2, device="meta").to_sparse() if RAN["given"] > 2 else None
    )
    pipe.transformer.register_forward_pre_hook(lambda *_: RAN.update(["given"]))
    found = plan(pipe, "1GiB", device="cpu", frames=torch.ones(FRAMES, 128, WIDTH))
    assert any("cannot be rehearsed" in note for note in found.notes)
    assert RAN["noting"] == 2


class Wider(nn.Module):
    """Gives the middle of something larger, all of which lives as long."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RAN["block"] += 1
        return torch.cat([self.layer(x)] * 3)[len(x) : -len(x)]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wider() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block(x) for block in self.blocks]


def test_what_is_part_of_something_larger_keeps_all_of_it() -> None:
    net, x = Stack(), torch.ones(256, WIDTH)
    found = rehearsed(net, x)
    assert RAN["block"] == 1
    assert found - x.nbytes == pytest.approx(needed(net, x), rel=1e-3)


@pytest.mark.parametrize(("share", "smaller"), [(1.0, False), (0.9, True)])
def test_no_smaller_decode_is_rehearsed_where_the_whole_one_fits(
    share: float, smaller: bool, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = stock.pipeline("Wan2.1")
    call = {"prompt": "a cat", "num_inference_steps": 2, **FAMILIES["Wan2.1"].clip}
    monkeypatch.setattr(Planner, "_is_best", lambda _self, _variant: False)
    tried: list[str] = []
    rehearsed_in = Twins._rehearsed_in

    def noted(self: Twins, settings: Settings, *rest: Any) -> Any:
        tried.append(str(settings.decode))
        return rehearsed_in(self, settings, *rest)

    whole = plan(pipe, GIB, device="cpu", **call)
    monkeypatch.setattr(Twins, "_rehearsed_in", noted)
    with contextlib.suppress(PlanInfeasible):
        plan(pipe, int(whole.floor_bytes * share), device="cpu", **call)
    assert ("tiles" in tried) is smaller
    assert tried.count("whole") == 2  # of each way of guidance
