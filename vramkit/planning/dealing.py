"""Device memory dealt out to the components of a call: which of their units stay, and through how many slots others go.

Of choices that take as long as the fastest one, nearly, the simplest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from vramkit.planning.machine import Machine
from vramkit.planning.profile import ComponentProfile, Cut, Variant, Work

__all__ = ["Choice", "Dealer", "ample_room", "fit_together", "least_bytes", "most_room", "seconds_of", "simplest"]

T = TypeVar("T")

# What a ring loses beside the longer of the two, as a share of the time on the link: computing is a little slower while the
# device is written to, and of layers, which differ, two slots are too few (docs/architecture.md). One slot overlaps nothing.
_OVERLAP: Mapping[tuple[str, int], float] = {
    ("block_level", 2): 0.02,
    ("block_level", 3): 0.02,
    ("leaf_level", 2): 0.08,
    ("leaf_level", 3): 0.02,
}
_SAME = 1.005  # times that are no nearer to each other than this are told apart
_STEPS = 24  # how finely memory is dealt out to what stays


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One component, cut in one way, with some of its units staying."""

    profile: ComponentProfile
    cut: Cut
    chosen_bytes: int
    resident_bytes: int
    streamed_bytes: int
    slot_bytes: int

    @property
    def slots(self) -> int:
        """How many there are; none where all of it stays."""
        return self.cut.slots if self.streamed_bytes else 0

    @property
    def device_bytes(self) -> int:
        """What it holds of the device while it runs."""
        return self.resident_bytes + self.slots * self.slot_bytes


class Dealer:
    """Deals memory out to the components of one variant."""

    def __init__(self, profiles: Sequence[ComponentProfile], variant: Variant, machine: Machine) -> None:
        self._profiles = {profile.name: profile for profile in profiles}
        self._works = variant.works
        self._machine = machine
        self._least = {name: least_bytes(profile) for name, profile in self._profiles.items()}

    def least(self) -> tuple[int, Work]:
        """Return the smallest budget that fits, and the work that needs it."""
        needs = [(work.room_bytes + self._least.get(work.component, 0), work) for work in self._works]
        return max(needs, key=lambda need: need[0], default=(max(self._least.values()), _NOTHING))

    def choose(self, budget_bytes: int) -> dict[str, Choice] | None:
        """Return the fastest choices under the budget, None where nothing fits."""
        if self.least()[0] > budget_bytes:
            return None
        room = budget_bytes - self._machine.slack_bytes
        caps = {name: max(least, room - self._ample(name)) for name, least in self._least.items()}
        found = [{name: self._best(each, caps[name], reloads=True) for name, each in self._profiles.items()}]
        most, least = most_room(self._works), sum(self._least.values())
        if least <= budget_bytes - most:
            ample = max([most, *map(self._ample, self._profiles)])
            found.append(self._dealt(max(least, room - ample)))
        return min(found, key=lambda choices: self.seconds(choices, budget_bytes))

    def seconds(self, choices: Mapping[str, Choice], budget_bytes: int) -> float:
        """Return how long the call takes."""
        reloads = not fit_together(choices, self._works, budget_bytes)
        return seconds_of(choices, self._works, self._machine, reloads=reloads)

    def _dealt(self, shared: int) -> dict[str, Choice]:
        """Deal bytes out to components that hold them all the time."""
        choices = {name: _least(profile) for name, profile in self._profiles.items()}
        for by_time in (True, False):  # first where it saves time, then wherever there is room
            for name in self._by_value():
                room = shared - sum(choice.device_bytes for other, choice in choices.items() if other != name)
                best = self._best(self._profiles[name], room, reloads=False)
                if not by_time or self._time(best, reloads=False) < self._time(choices[name], reloads=False) / _SAME:
                    choices[name] = best
        return choices

    def _ample(self, name: str) -> int:
        return ample_room([work for work in self._works if work.component == name])

    def _by_value(self) -> list[str]:
        """Return the components, those first whose weights are used most often."""
        return sorted(self._profiles, key=lambda name: -sum(w.calls for w in self._works if w.component == name))

    def _best(self, profile: ComponentProfile, cap_bytes: int, *, reloads: bool) -> Choice:
        candidates = [whole] if (whole := _all_resident(profile)).device_bytes <= cap_bytes else []
        for cut in profile.cuts:
            candidates += _filled(profile, cut, cap_bytes)
        candidates = candidates or [_least(profile)]
        return simplest(candidates, [self._time(choice, reloads=reloads) for choice in candidates])

    def _time(self, choice: Choice, *, reloads: bool) -> float:
        works = [work for work in self._works if work.component == choice.profile.name]
        return sum(_work_seconds(choice, work, self._machine, reloads=reloads) for work in works)


def simplest(found: Sequence[T], seconds: Sequence[float]) -> T:
    """Return the first of what takes no longer than the fastest, but for what is not worth being told apart."""
    enough = min(seconds) * _SAME
    return next(each for each, taken in zip(found, seconds, strict=True) if taken <= enough)


def least_bytes(profile: ComponentProfile) -> int:
    """Return the device memory that a component holds at the least while it runs."""
    return _least(profile).device_bytes


_NOTHING = Work(phase="encode", component="", activation_bytes=0, calls=0, flops=0, turns=0)


def _all_resident(profile: ComponentProfile) -> Choice:
    cut = profile.cuts[0]
    return _placed(profile, cut, sum(cut.sizes))


def _placed(profile: ComponentProfile, cut: Cut, chosen_bytes: int) -> Choice:
    return Choice(profile, cut, chosen_bytes, *cut.placed(chosen_bytes))


def _least(profile: ComponentProfile) -> Choice:
    every = [_all_resident(profile), *(_placed(profile, cut, 0) for cut in profile.cuts)]
    return min(every, key=lambda choice: choice.device_bytes)


def _filled(profile: ComponentProfile, cut: Cut, cap_bytes: int) -> list[Choice]:
    """Return the choice that uses `cap_bytes` best with this cut: as much of it staying as goes beside the slots."""
    bare = _placed(profile, cut, 0)
    if bare.device_bytes > cap_bytes:
        return []
    low, high, best = 0, sum(cut.sizes), bare
    for _ in range(_STEPS):
        middle = (low + high + 1) // 2
        tried = _placed(profile, cut, middle)
        if tried.device_bytes <= cap_bytes and tried.streamed_bytes:
            low = middle
            best = min(best, tried, key=lambda choice: choice.streamed_bytes)
        else:
            high = middle - 1
    return [_exact(best) if cut.granularity == "block_level" else best]


def _exact(choice: Choice) -> Choice:
    """Return the choice that asks for what it gets: blocks are what they are, and the last one may not go into the rest."""
    tried = _placed(choice.profile, choice.cut, sum(choice.cut.sizes) - choice.streamed_bytes)
    return tried if tried.streamed_bytes == choice.streamed_bytes else choice


def _work_seconds(choice: Choice | None, work: Work, machine: Machine, *, reloads: bool) -> float:
    compute = machine.compute_seconds(work.flops)
    if choice is not None and reloads:  # what stays comes at the beginning of each turn
        compute += machine.link_seconds(choice.resident_bytes) * work.turns
    if choice is None or not choice.streamed_bytes:
        return compute
    link = machine.link_seconds(choice.streamed_bytes) * work.calls
    if choice.slots == 1:
        return compute + link
    return max(compute, link) + link * _OVERLAP[choice.cut.granularity, choice.slots]


def seconds_of(choices: Mapping[str, Choice], works: Sequence[Work], machine: Machine, *, reloads: bool) -> float:
    """Return how long `works` take; with `reloads` what stays is loaded once a turn."""
    return sum(_work_seconds(choices.get(work.component), work, machine, reloads=reloads) for work in works)


def fit_together(choices: Mapping[str, Choice], works: Sequence[Work], budget_bytes: int) -> bool:
    """Whether nothing that a component holds need make room for another one."""
    return most_room(works) + sum(choice.device_bytes for choice in choices.values()) <= budget_bytes


def most_room(works: Sequence[Work]) -> int:
    """Return what weights leave to any of `works`, at the least."""
    return max((work.room_bytes for work in works), default=0)


def ample_room(works: Sequence[Work]) -> int:
    """Return what weights that could as well travel leave to any of `works`, at the least."""
    return max((work.ample_bytes for work in works), default=0)
