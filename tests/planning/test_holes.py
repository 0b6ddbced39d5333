"""Holes between tensors, played on numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vramkit.memory import MIB
from vramkit.planning.holes import Course, Lives, Room, is_small, room_for
from vramkit.planning.rehearsal import rehearse

PAGE = 12 * MIB


def lives(*sizes: int) -> Lives:
    """Read ``1, 2, -1``: tensor 1 is made, 2 is made, 1 dies; a tensor has as many pages as its number."""
    return [(abs(number), number * PAGE) for number in sizes]


def test_tensors_that_die_in_the_order_of_a_stack_leave_no_holes():
    assert room_for(lives(1, 2, 3, -3, -2, 4, -4, -1)) == Room(0, 0)


def test_a_hole_that_is_too_small_for_what_comes_costs_pages_or_a_wait():
    # 2 and 3 are free, with 1 between them; what 5 asks for is there, in no one place.
    found = room_for(lives(2, 1, 3, -2, -3, 5))
    assert found == Room(needed_bytes=0, ample_bytes=2 * PAGE)


def test_pages_that_are_in_use_in_part_cannot_be_given_back():
    half = PAGE // 2
    some = [(number, size) for number in range(1, 9) for size in (half,)]  # two to a page
    every_other = [(number, -half) for number in range(1, 9, 2)]
    found = room_for([*some, *every_other, (9, 4 * half)])
    assert found.needed_bytes > 0
    assert found.ample_bytes >= found.needed_bytes


def test_nothing_wants_no_room():
    assert room_for([]) == Room(0, 0)


def test_room_is_at_least_what_was_measured():
    assert Room(1, 50).at_least(10) == Room(10, 50)
    assert Room(20, 30).at_least(18) == Room(20, 72)


def test_a_course_is_what_was_made_and_died_and_what_is_told_of_the_rest():
    whole = lives(-1, 2, 3, 4, -2)
    assert Course.of(whole, gone=[], born=[]) == Course(lives(2, -2))
    assert Course.of(whole, gone=[1, None], born=[4]) == Course(lives(-1, 2, 4, -2), gone=(1, None), born=(4,))
    assert Course.of(whole, gone=[1], born=[5, 4]) == Course(lives(2, -2))  # nobody knows when 5 was made


@pytest.mark.parametrize(("size_bytes", "expected"), [(0, True), (MIB, True), (MIB + 1, False)])
def test_small_tensors_lie_elsewhere(size_bytes, expected):
    assert is_small(size_bytes) is expected


@given(st.lists(st.tuples(st.integers(MIB + 1, 60 * MIB), st.integers(0, 5)), max_size=40))
def test_what_is_needed_is_never_more_than_what_is_ample(made):
    alive: list[tuple[int, int]] = []
    events: Lives = []
    for number, (size_bytes, at) in enumerate(made):
        if at < len(alive):
            events.append((alive[at][0], -alive[at][1]))
            del alive[at]
        events.append((number, size_bytes))
        alive.append((number, size_bytes))
    found = room_for(events)
    assert 0 <= found.needed_bytes <= found.ample_bytes


class Uneven(nn.Module):
    """Makes tensors of many sizes, of which every other one lives on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for rows in range(8, 40):
            passing = x[:rows] * self.scale
            kept.append(x[: rows // 2] * self.scale)
            del passing
        return torch.cat(kept)


@pytest.mark.parametrize(("device", "has_holes"), [("cpu", False), ("cuda", True)])
def test_a_rehearsal_for_an_accelerator_tells_what_came_and_went(device, has_holes):
    module = Uneven().to("meta")
    x = torch.empty(40, MIB // 4, device="meta")
    done = rehearse({"it": module}, {"it": ("forward",)}, lambda: module(x), device=torch.device(device))
    told = max((segment.lives for segment in done.segments), key=len)
    assert bool(told) is has_holes
    if has_holes:
        made = [size for _, size in told if size > 0]
        gone = [-size for _, size in told if size < 0]
        assert sum(made) - sum(gone) <= done.peak_bytes
        assert room_for(told).ample_bytes > 0


def test_blocks_that_are_run_once_leave_the_same_holes_as_all_of_them():
    class Block(Uneven):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)[:40].mean()

    blocks = nn.ModuleList(Block() for _ in range(4)).to("meta")
    root = nn.Module()
    root.blocks = blocks
    x = torch.empty(40, MIB // 4, device="meta")

    def call() -> None:
        y = x
        for block in blocks:
            y = block(y)

    def events(module: nn.Module) -> list[int]:
        done = rehearse({"it": module}, {"it": ()}, call, device=torch.device("cuda"))
        return sorted(size for segment in done.segments for _, size in segment.lives)

    plain = nn.Module()
    for number, block in enumerate(blocks):
        plain.add_module(f"block{number}", block)  # in no list: all of them are run
    assert events(root) == events(plain)
