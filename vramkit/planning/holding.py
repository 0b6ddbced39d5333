"""What components hold of a device while they take turns on it, foretold: by the rules that they will go by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from vramkit.offload.turns import Turns
from vramkit.planning.components import PHASES
from vramkit.planning.profile import Work

__all__ = ["Holding", "phase_peaks", "room_before"]

_ROUNDS = 3  # of components that alternate: by then what they leave one another no longer changes
_CALLS = 2  # the first one begins with what applying left on the device, later ones with what the one before left


@dataclasses.dataclass(eq=False)
class Holding:
    """What one component has on the device at a moment: slots, and weights that stay. Sizes in bytes."""

    slots_bytes: int
    resident_bytes: int
    has_slots: bool = False
    has_residents: bool = False

    @property
    def is_at_rest(self) -> bool:
        """Whether it would need room for slots to run."""
        return not self.has_slots

    @property
    def held_bytes(self) -> int:
        """What it holds now."""
        return self.slots_bytes * self.has_slots + self.resident_bytes * self.has_residents

    @property
    def wanted_bytes(self) -> int:
        """What it holds while it runs."""
        return self.slots_bytes + self.resident_bytes

    def rest(self, *, resident: bool) -> int:
        """Let go of slots, and of weights that stay if `resident`; return the bytes."""
        before = self.held_bytes
        self.has_slots, self.has_residents = False, self.has_residents and not resident
        return before - self.held_bytes

    def wake(self, turns: Turns) -> None:
        """Have all of it, after others made room."""
        turns.make_room(self)
        self.has_slots = self.has_residents = True


def room_before(works: Iterable[Work]) -> int:
    """Return what a call needs before a component computes: the pipeline makes ready what it was given."""
    return max((work.room_bytes for work in works if not work.component), default=0)


def phase_peaks(holdings: Mapping[str, Holding], works: Sequence[Work], budget_bytes: int) -> dict[str, int]:
    """Return by phase the most that is alive in calls that do `works`: activations, and what all hold meanwhile.

    Args:
        holdings: one for each component, in the order in which they are offloaded; nothing is held yet.
        works: of a call, in the order of their first time.
        budget_bytes: what the turns of a plan keep to.
    """
    turns = Turns(budget_bytes)
    for name, holding in holdings.items():  # as `Applied` does it: what is computed is told afterwards
        turns.add(holding)
        holding.wake(turns)
        ours = [work.room_bytes for work in works if work.component == name]
        turns.add(holding, activation_bytes=max(ours, default=0))
    call = Holding(0, 0)
    turns.add(call, activation_bytes=room_before(works))
    peaks: dict[str, int] = {}
    for phase in PHASES * _CALLS:
        ours_now = [work for work in works if work.phase == phase]
        rounds = min(_ROUNDS, max((work.turns for work in ours_now), default=0))
        for work in ours_now * rounds:
            holding_now = holdings.get(work.component)
            if holding_now is None:
                turns.make_room(call)
            else:
                holding_now.wake(turns)
                turns.begin(holding_now)
            alive = work.activation_bytes + sum(each.held_bytes for each in holdings.values())
            peaks[phase] = max(peaks.get(phase, 0), alive)
    return peaks
