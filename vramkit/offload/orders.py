"""What passes were like, and so what is expected next. Knows nothing of devices and loads.

A pass has a *shape*: the entry point that it began with and the groups that it used, in turn. Passes of one module differ:
``encode`` and ``decode`` use different parts, a step with a block cache skips blocks. They follow one another with some
regularity, so the shape that is expected next is the one that came next when the last passes were the same as now.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

__all__ = ["Orders"]

_HISTORY = 256  # passes that are remembered: two runs of a sampler of 50 steps with guidance
_CONTEXT = 32  # passes that are compared to tell what comes next
_SUSPECTS = 16

Group = TypeVar("Group")


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape(Generic[Group]):
    """A pass: the entry point (None: between entry points) and its groups, in turn."""

    entry_point: str | None
    groups: tuple[Group, ...]

    def starts_with(self, groups: tuple[Group, ...]) -> bool:
        count = len(groups)
        # The last one first: shapes that differ mostly differ there, and this is asked of hundreds of them.
        return self.groups[count - 1 : count] == groups[-1:] and self.groups[:count] == groups


class Orders(Generic[Group]):
    """The shapes of the passes so far, the pass that runs, and the plan for it and for those that follow it.

    The plan is only a guess. Groups are compared by identity.
    """

    def __init__(self, definition: Sequence[Group]) -> None:
        """Expect the groups in the order of `definition` until they have run."""
        self._definition = _Shape(None, tuple(definition))
        self._followers = dict(pairwise(definition))  # what came after a group when it was used last
        self._history: deque[_Shape[Group]] = deque(maxlen=_HISTORY)
        self._suspects: deque[_Shape[Group]] = deque(maxlen=_SUSPECTS)  # seen once, maybe because something was raised
        self._entry_point: str | None = None
        self._seen: list[Group] = []  # this pass so far
        self._plan: list[_Shape[Group]] = []  # this pass and those after it
        self._cursor = 0  # place in the first shape of the plan that is expected next

    @property
    def is_midway(self) -> bool:
        """Whether groups were used since the last pass ended."""
        return bool(self._seen)

    def begin(self, entry_point: str) -> None:
        """Begin a pass. What was used since the last one ended, outside of passes, is forgotten."""
        self._seen.clear()
        self._entry_point = entry_point
        if self._plan and not self._cursor and self._plan[0].entry_point == entry_point:
            return
        shape = _likely(self._history, lambda shape: shape.entry_point == entry_point)
        if shape is not None:
            self._replan(shape)
        elif self._cursor:  # else the plan stands: it may hold within this entry point, or the first group will tell
            self._replan()

    def use(self, group: Group) -> bool:
        """Note that `group` is used now; tell whether it was expected. If not, the plan has changed."""
        self._seen.append(group)
        if not self._plan:
            self.ahead(1)  # makes one
        planned = self._plan[0].groups if self._plan else ()
        if self._cursor < len(planned) and planned[self._cursor] == group:
            self._cursor += 1
            return True
        self._replan(self._continued())
        self._cursor = len(self._seen)
        return False

    def end(self) -> None:
        """Learn the pass that ends; nothing to do where none began and nothing was used.

        A new shape that is the beginning of a known one counts only when it is seen again: an exception may have ended it.
        """
        shape = _Shape(self._entry_point, tuple(self._seen))
        self._seen.clear()
        self._entry_point = None
        if shape.entry_point is None and not shape.groups:
            return
        known = next((past for past in reversed(self._history) if past == shape), None)
        if known is None and shape not in self._suspects and any(map(_begins_as(shape), self._history)):
            self._suspects.append(shape)
            self._replan()
            return
        self._followers.update(pairwise(shape.groups))
        planned = self._plan[0] if self._plan and self._plan[0] == shape else None
        self._history.append(known or planned or shape)
        self._replan(*(self._plan[1:] if planned else ()))

    def reset(self) -> None:
        """Forget the pass that runs. What was learned stays."""
        self._seen.clear()
        self._entry_point = None
        self._replan()

    def ahead(self, count: int) -> list[Group]:
        """Return the `count` groups that are expected next, across the ends of passes; less where passes use nothing."""
        coming = list(self._plan[0].groups[self._cursor : self._cursor + count]) if self._plan else []
        following = 1 if self._plan else 0
        while len(coming) < count and following <= 2 * count:
            if following == len(self._plan):
                past = [*self._history, *self._plan]
                self._plan.append(_likely(past, lambda _: True) or self._definition)
            coming += self._plan[following].groups[: count - len(coming)]
            following += 1
        return coming

    def _replan(self, *shapes: _Shape[Group]) -> None:
        self._plan, self._cursor = list(shapes), 0

    def _continued(self) -> _Shape[Group]:
        """Return how a pass may go on that has not gone as planned with its latest group."""
        seen = tuple(self._seen)
        fits = _begins_as(_Shape(self._entry_point, seen))
        known = _likely(self._history, fits)
        if known is not None:
            return known
        planned = self._plan[0].groups[self._cursor :] if self._plan else ()
        if seen[-1] in planned:  # something was skipped
            return _Shape(self._entry_point, seen + planned[planned.index(seen[-1]) + 1 :])
        return _Shape(self._entry_point, seen + self._chain(seen[-1]))

    def _chain(self, group: Group) -> tuple[Group, ...]:
        """Return what came after `group` when it was used last, what came after that, and so on."""
        chain = {group: None}
        follower = self._followers.get(group)
        while follower is not None and follower not in chain:
            chain[follower] = None
            follower = self._followers.get(follower)
        return tuple(chain)[1:]


def _begins_as(shape: _Shape[Group]) -> Callable[[_Shape[Group]], bool]:
    return lambda other: other.entry_point == shape.entry_point and other.starts_with(shape.groups)


def _likely(past: Sequence[_Shape[Group]], fits: Callable[[_Shape[Group]], bool]) -> _Shape[Group] | None:
    """Return the shape that fits and came after the longest run of passes like the latest ones; the latest of several."""
    best, best_length = None, -1
    for at in range(len(past) - 1, -1, -1):
        most = min(at, _CONTEXT)
        if best_length >= most:
            break
        if fits(past[at]):
            length = 0
            while length < most and past[at - 1 - length] is past[-1 - length]:
                length += 1
            if length > best_length:
                best, best_length = past[at], length
    return best
