"""What is expected next, by the passes before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vramkit.offload import apply_group_offloading
from vramkit.offload.orders import Orders


def run(orders: Orders[str], *passes: str) -> list[bool]:
    """Run passes, given as entry point and groups; return whether each group of the last one was expected."""
    expected: list[bool] = []
    for each in passes:
        orders.begin(each[0])
        expected = [orders.use(group) for group in each[1:]]
        orders.end()
    return expected


def ahead(orders: Orders[str], count: int) -> str:
    return "".join(orders.ahead(count))


def test_the_definition_is_expected_until_something_has_run() -> None:
    orders = Orders("abcd")
    assert ahead(orders, 6) == "abcdab"
    assert all(run(orders, "fabcd"))


def test_a_part_that_was_never_entered_goes_on_as_it_is_defined() -> None:
    orders = Orders("abcdef")
    assert run(orders, "ddef") == [False, True, True]
    assert ahead(orders, 4) == "defd"


def test_the_plan_goes_across_the_ends_of_passes() -> None:
    orders = Orders("abcdef")
    run(orders, *["eabc", "ddef"] * 2)
    assert ahead(orders, 9) == "abcdefabc"
    orders.begin("d")
    assert ahead(orders, 3) == "def"


def test_more_than_one_pass_is_compared() -> None:
    orders = Orders("abc")
    run(orders, *["fabc", "fabc", "fac", "fac"] * 2)
    assert ahead(orders, 10) == "abcabcacac"
    run(orders, "fabc", "fabc")
    assert ahead(orders, 4) == "acac"


def test_an_entry_point_decides_between_shapes() -> None:
    orders = Orders("abcd")
    run(orders, "eab", "dcd", "eab", "dcd")
    orders.begin("d")
    assert ahead(orders, 2) == "cd"
    run(orders, "dcd", "eab")
    orders.begin("g")  # says nothing: what was expected stays expected
    assert ahead(orders, 2) == "cd"


def test_a_pass_that_turns_out_to_be_another_known_one_goes_on_as_that() -> None:
    orders = Orders("abcd")
    run(orders, "fabcd", "facdb", "fabcd", "fabcd")
    assert run(orders, "facdb") == [True, False, True, True]


def test_of_several_shapes_that_fit_the_one_that_came_after_the_same_passes_is_taken() -> None:
    orders = Orders("abcdxy")
    run(orders, *["fabc", "facx", "fabc", "facy"] * 2, "fabc")
    orders.begin("f")
    assert [orders.use("a"), orders.use("c"), orders.use("x")] == [True, True, True]


def test_a_group_that_nothing_known_explains_is_followed_by_what_followed_it_last() -> None:
    orders = Orders("abcdef")
    run(orders, "fabcdef", "gcebd")
    orders.begin("f")
    assert not orders.use("b")
    assert ahead(orders, 4) == "cdef"  # later in the pass that was expected
    assert not orders.use("e")
    assert not orders.use("b")  # passed already: d came after it, when it was used last
    assert ahead(orders, 1) == "d"


def test_the_beginning_of_a_known_pass_counts_when_it_is_seen_again() -> None:
    orders = Orders("abcd")
    run(orders, "fabcd", "fab")
    assert ahead(orders, 4) == "abcd"
    run(orders, "fab")
    assert ahead(orders, 4) == "abab"


def test_what_is_used_between_passes_is_not_learned() -> None:
    orders = Orders("abcd")
    run(orders, "fabcd")
    orders.use("c")
    assert ahead(orders, 1) == "d"
    assert all(run(orders, "fabcd"))


def test_a_pass_that_was_torn_off_is_not_learned() -> None:
    orders = Orders("abcd")
    run(orders, "fabcd")
    orders.begin("f")
    orders.use("c")
    orders.reset()
    assert not orders.is_midway
    assert ahead(orders, 5) == "abcda"


def test_nothing_is_expected_where_there_is_nothing() -> None:
    orders = Orders("")
    run(orders, *"fff")
    assert orders.ahead(3) == []


def test_passes_that_use_nothing_are_passes() -> None:
    orders = Orders("abcd")
    run(orders, *["eab", "f", "dcd"] * 3)
    assert ahead(orders, 2) == "ab"
    run(orders, "eab")
    assert ahead(orders, 2) == "cd"
    orders.begin("f")
    assert ahead(orders, 2) == "cd"


passes = st.builds("".join, st.tuples(st.sampled_from("fed"), st.text("abcdef", max_size=8)))


@given(st.lists(passes, max_size=12), st.integers(0, 20))
def test_no_more_is_expected_than_asked_for(sequence: list[str], count: int) -> None:
    orders = Orders("abcdef")
    assert len(orders.ahead(count)) == count
    for each in sequence:
        run(orders, each)
        assert len(orders.ahead(count)) <= count


@given(st.lists(passes, min_size=1, max_size=4))
def test_passes_that_repeat_become_expected(pattern: list[str]) -> None:
    orders = Orders("abcdef")
    run(orders, *pattern * 5)
    assert all(all(run(orders, each)) for each in pattern * 2)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.decoder = nn.ModuleList(nn.Linear(32, 32) for _ in range(7))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder:
            x = layer(x)
        return x

    def decode(self, x: torch.Tensor, *, is_short: bool = False) -> torch.Tensor:
        for layer in self.decoder[4:] if is_short else self.decoder:
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(x)

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encode(x)
        for _ in range(4):
            x = self(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("needed", "use"),
    [
        (5, lambda net, x: net.encode(x)),
        (7, lambda net, x: net.decode(x)),
        (5 + 7, lambda net, x: net.decode(net.encode(x))),
        (7 + 3, lambda net, x: net.decode(net.decode(x), is_short=True)),
        (5 + 4 * 7, lambda net, x: net.generate(x)),
        (5 + 7 + 7, lambda net, x: net(net.decode(net.encode(x)))),
    ],
)
def test_what_is_used_in_turn_travels_once_per_use(
    needed: int, use: Callable[[Autoencoder, torch.Tensor], torch.Tensor]
) -> None:
    torch.manual_seed(0)
    net, x = Autoencoder().eval(), torch.randn(2, 32)
    expected = use(net, x)
    offload = apply_group_offloading(net, "cpu")
    for _ in range(3):
        assert torch.equal(use(net, x), expected)
    before = offload.stats()
    for _ in range(3):
        assert torch.equal(use(net, x), expected)
    after = offload.stats()
    assert after.loads - before.loads == 3 * needed
    assert after.demand_loads == before.demand_loads
    assert after.dropped_loads == before.dropped_loads


@torch.no_grad()
def test_a_pass_that_raised_is_not_expected_again() -> None:
    net, x = Autoencoder().eval(), torch.randn(2, 32)
    offload = apply_group_offloading(net, "cpu")
    for _ in range(2):
        net.decode(x)
    net.decoder[3].forward = lambda x: x @ x
    with pytest.raises(RuntimeError, match="shapes"):
        net.decode(x)
    del net.decoder[3].forward
    net.decode(x)
    before = offload.stats()
    net.decode(x)
    after = offload.stats()
    assert (after.loads - before.loads, after.demand_loads, after.dropped_loads) == (
        7,
        before.demand_loads,
        before.dropped_loads,
    )
