"""Whether a call asks for more than another one: what arguments are looked into, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vramkit.planning.calls import PlannedCall
from vramkit.planning.extents import Extent


def is_within(other: Any, planned: Any) -> bool:
    return Extent.of(other).is_within(Extent.of(planned))


def rows(count: int) -> torch.Tensor:
    return torch.empty(count, 4)


def given_by(inner: Any) -> Callable[[], Any]:
    return lambda: inner


def scaled(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return x * by


class Net(torch.nn.Module):
    def one(self) -> None: ...

    def other(self) -> None: ...


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {x},
        lambda x: frozenset({rows(1), x, 3}),
        lambda x: functools.partial(scaled, x),
        lambda x: functools.partial(scaled, by=[x]),
        given_by,
        lambda x: given_by([x]),
        lambda x: functools.partial(given_by(x)),
    ],
)
def test_more_is_more_and_less_is_not(wrap: Callable[[Any], Any]) -> None:
    assert is_within(wrap(rows(2)), wrap(rows(2)))
    assert is_within(wrap(rows(1)), wrap(rows(2)))
    assert not is_within(wrap(rows(3)), wrap(rows(2)))


@pytest.mark.parametrize(
    ("other", "planned"),
    [
        (lambda: 1, lambda: 2),
        (functools.partial(scaled), functools.partial(given_by)),
        (Net().one, Net().other),
        (torch.relu, torch.sigmoid),
        (torch.float64, torch.bfloat16),
        (int, str),
        ({1, 2}, {3}),
        ({rows(2), rows(2)}, {rows(2), rows(1)}),
        (b"more", b"les"),
        (range(3), range(2)),
        (None, int),
        (["a"], str),
    ],
)
def test_what_is_of_another_kind_is_not_within(other: Any, planned: Any) -> None:
    assert not is_within(other, planned)
    assert is_within(planned, planned)
    assert is_within(other, other)


def test_objects_of_bound_methods_and_closures_in_closures_are_not_looked_into() -> None:
    assert is_within(Net().one, Net().one)
    assert is_within(given_by(given_by(rows(3))), given_by(given_by(rows(2))))


def test_what_holds_itself_has_an_end() -> None:
    def again() -> Any:
        return again

    held: list[Any] = [again]
    held.append(held)
    assert is_within(held, held)
    assert is_within(again, again)


def test_what_grows_after_it_was_planned_for_is_more() -> None:
    pictures = [rows(1)]
    planned = PlannedCall({"pictures": pictures, "latents": None}, lambda _: None)
    pictures.append(rows(1))
    again = PlannedCall({"pictures": pictures, "latents": None}, lambda _: None)
    assert not planned.covers(again)
    assert not planned.beside(again, is_first=True).covers(again)
    assert again.covers(again)
