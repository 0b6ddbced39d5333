"""Components that share a device take turns on it: what is idle makes room when another one begins.

A component holds slots, and weights that stay there. Slots of an idle one are only a head start for its next pass, so they
go first. Two that alternate in every step would lose that head start each time: those that both come back soon after they
made room for one another are partners, and from then on the slots of both stay.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from typing import Protocol

import torch

from vramkit.errors import ConfigError
from vramkit.memory import parse_bytes

__all__ = ["Turns", "chosen_turns", "turns_of"]

_SOON = 3  # passes of all others: guidance runs a transformer two or three times before its control network runs again
_LONG = 16  # passes after which a partner is no longer waited for


class Member(Protocol):
    """A component, as turns see it."""

    @property
    def is_at_rest(self) -> bool:
        """Whether it would need room for slots to run."""

    @property
    def held_bytes(self) -> int:
        """Device memory that it holds now: slots, and weights that stay."""

    @property
    def wanted_bytes(self) -> int:
        """What it holds while it runs."""

    def rest(self, *, resident: bool) -> int:
        """Let go of slots, and of weights that stay if `resident`; return the bytes, 0 where it runs."""


@dataclasses.dataclass(slots=True, eq=False)
class _Seat:
    """What is known of one member."""

    activation_bytes: int = 0
    passes: int = 0
    began: int = 0  # when its latest pass did, counted in passes of all
    gap: int = _LONG  # passes of others between its latest ones
    made_room_for: tuple[weakref.ref[Member], int] | None = None  # with the passes of that one by then
    partners: weakref.WeakSet[Member] = dataclasses.field(default_factory=weakref.WeakSet)


class Turns:
    """Whose turn it is on a device, among the components that were added.

    Without a budget, a component that has no slots gets room by the slots of those that are idle, its partners apart. With a
    budget, the idle ones let go of as much as it takes to keep it, those that have been idle for longest first: slots first,
    then weights that stay. What runs is never taken from; threads that run several at once may together exceed the budget.
    """

    def __init__(self, budget: int | str | None = None) -> None:
        """Take the most device memory that all may hold together while one of them runs: bytes, text, or None.

        Raises:
            ConfigError: `budget` is no size.
        """
        self.budget_bytes = None if budget is None else parse_bytes(budget)
        self._seats: weakref.WeakKeyDictionary[Member, _Seat] = weakref.WeakKeyDictionary()
        self._moment = 0
        self._lock = threading.RLock()

    def add(self, member: Member, *, activation_bytes: int = 0) -> None:
        """Let `member` take turns; `activation_bytes` of the budget are left free while it runs. Again: change that."""
        if activation_bytes < 0:
            raise ConfigError(f"activation_bytes={activation_bytes}; expected at least 0")
        with self._lock:
            self._seats.setdefault(member, _Seat()).activation_bytes = activation_bytes

    def remove(self, member: Member) -> None:
        """Let `member` take no more turns. Not there: nothing to do."""
        with self._lock:
            self._seats.pop(member, None)

    def make_room(self, member: Member) -> None:
        """Let idle ones go as far as `member` needs it, which is about to begin a pass, or to be set up."""
        if len(self._seats) < 2:
            return
        with self._lock:
            own = self._seats.setdefault(member, _Seat())
            self._learn(member, own)
            if self.budget_bytes is None:
                self._without_budget(member, own)
            else:
                self._within(self.budget_bytes, member, own)

    def begin(self, member: Member) -> None:
        """Count a pass of `member`, after room was made for it."""
        with self._lock:
            self._moment += 1
            seat = self._seats.setdefault(member, _Seat())
            between = self._moment - seat.began - 1
            if seat.passes and between:
                seat.gap = between
            seat.passes += 1
            seat.began = self._moment

    def relieve(self, member: Member) -> int:
        """Let all others that are idle go, weights that stay as well, for the device is full; return the bytes."""
        with self._lock:
            return sum(other.rest(resident=True) for other, _ in self._others(member))

    def end(self) -> None:
        """Let everybody go who is idle."""
        with self._lock:
            for member, _ in self._others(None):
                member.rest(resident=False)

    def _learn(self, member: Member, own: _Seat) -> None:
        """See whether `member` is back soon after it made room for another one that ran, and that comes back as soon itself.

        A transformer is back soon after a decode, but the next decode is not.
        """
        if own.made_room_for is None:
            return
        reference, passes = own.made_room_for
        own.made_room_for = None
        other = reference()
        seat = None if other is None else self._seats.get(other)
        if other is None or seat is None or not own.passes or seat.passes == passes:
            return
        if max(self._moment - own.began, seat.gap) <= _SOON:
            own.partners.add(other)
            seat.partners.add(member)

    def _without_budget(self, member: Member, own: _Seat) -> None:
        needs_room = member.is_at_rest
        for other, seat in self._others(member):
            is_overdue = self._moment - seat.began > _LONG
            gives_way = is_overdue or (needs_room and other not in own.partners)
            if gives_way and not other.is_at_rest and other.rest(resident=False):
                seat.made_room_for = weakref.ref(member), own.passes

    def _within(self, budget_bytes: int, member: Member, own: _Seat) -> None:
        needed = max(member.wanted_bytes, member.held_bytes) + own.activation_bytes
        others = sorted(self._others(member), key=lambda pair: pair[1].began)
        for resident in (False, True):
            for other, _ in others:
                if needed + sum(each.held_bytes for each, _ in others) <= budget_bytes:
                    return
                other.rest(resident=resident)

    def _others(self, member: Member | None) -> list[tuple[Member, _Seat]]:
        return [(other, seat) for other, seat in list(self._seats.items()) if other is not member]


def chosen_turns(given: Turns | None, device: torch.device) -> Turns:
    """Return the turns that were `given`, or for None those of all on `device` that have none of their own.

    Raises:
        ConfigError: something else was given.
    """
    if given is None:
        return turns_of(device)
    if not isinstance(given, Turns):
        raise ConfigError(f"turns={given!r}; expected vramkit.Turns, or None for those of the device")
    return given


@functools.cache
def turns_of(device: torch.device) -> Turns:  # noqa: ARG001 (what the cache goes by)
    """Return the turns of all that is offloaded to `device` without turns of its own: a device is one for the process."""
    return Turns()
