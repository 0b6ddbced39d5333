"""When modules ask for weights: recorded pass by pass, so that units are formed by what is used together.

Neighbours of the definition are not always used in turn: a block with two streams of tokens defines one after the other and
runs them alternately. A unit of one stream would be loaded, left, and loaded again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from torch import nn

__all__ = ["Times", "Uses"]

_PASSES = 8  # different passes that are remembered


class Times:
    """At which of the recorded moments the modules of a tree are used: one bit for each moment.

    What is used, is used with all that is above and below it. A module that nobody watched goes with the one before it in
    the definition; one that was watched and never used has no moments.
    """

    def __init__(self, root: nn.Module, passes: Sequence[Sequence[nn.Module]], watched: Iterable[nn.Module]) -> None:
        """Place the uses recorded in `passes`, by the modules that were `watched`, in the tree of `root`."""
        self._own = dict.fromkeys(map(id, watched), 0)
        moment = 1
        for modules in passes:
            for module in modules:
                self._own[id(module)] = self._own.get(id(module), 0) | moment
                moment <<= 1
            moment <<= 1  # no two passes are one run
        self._bits: dict[int, int] = {}
        self._known: set[int] = set()
        self._place(root, 0, is_watched=False)
        before = 0
        for module in root.modules():
            if id(module) in self._known:
                before = self._bits[id(module)]
            else:
                self._bits[id(module)] = before

    def first(self, entries: Iterable[nn.Module]) -> float:
        """Return a number that grows with the moment in which one of `entries` is first used; infinity where none is."""
        bits = self._of(entries)
        return (bits & -bits).bit_length() or float("inf")

    def runs(self, entries: Iterable[nn.Module]) -> int:
        """Return how many times `entries` would be loaded together: once for each run of moments that no other has."""
        bits = self._of(entries)
        return (bits & ~(bits << 1)).bit_count()

    def _of(self, entries: Iterable[nn.Module]) -> int:
        bits = 0
        for entry in entries:
            bits |= self._bits[id(entry)]
        return bits

    def _place(self, module: nn.Module, above: int, *, is_watched: bool) -> tuple[int, bool]:
        own = self._own.get(id(module))
        is_watched |= own is not None
        bits, is_known = own or 0, is_watched
        for child in module.children():
            below, is_known_below = self._place(child, above | (own or 0), is_watched=is_watched)
            bits |= below
            is_known |= is_known_below
        self._bits[id(module)] = self._bits.get(id(module), 0) | bits | above
        if is_known:
            self._known.add(id(module))
        return bits, is_known


class Uses:
    """Records which modules asked for weights in the passes of one offloaded module."""

    def __init__(self, *, is_recording: bool = True) -> None:
        """Start with nothing recorded; nothing is added while `is_recording` is False."""
        self.is_recording = is_recording
        self._passes: deque[tuple[nn.Module, ...]] = deque(maxlen=_PASSES)
        self._watched: set[nn.Module] = set()
        self._running: list[nn.Module] = []
        self._groups: list[object] = []  # that they belong to, without immediate repetition
        self.has_returned = False
        """Whether a group was left in some pass for another one, and came back."""

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Say that these modules will be noted when they are used."""
        self._watched.update(modules)

    def note(self, module: nn.Module, group: object) -> None:
        """Record that `module` asked for `group`."""
        if not self.is_recording:
            return
        self._running.append(module)
        if not self._groups or self._groups[-1] is not group:
            self._groups.append(group)

    def end_pass(self) -> None:
        """Remember the pass that ends, if it is a new one."""
        modules, groups = tuple(self._running), self._groups
        self.forget_pass()
        if modules and modules not in self._passes:
            self._passes.append(modules)
            self.has_returned |= len({id(group) for group in groups}) < len(groups)

    def forget_pass(self) -> None:
        """Forget the pass that runs."""
        self._running, self._groups = [], []

    def give_up(self) -> None:
        """Forget everything, and record nothing any more."""
        self._passes.clear()
        self.is_recording = False

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Forget all modules but these, which are still there."""
        present = set(modules)
        self._watched &= present
        self._passes = deque(
            (tuple(module for module in each if module in present) for each in self._passes), maxlen=_PASSES
        )

    def times(self, root: nn.Module) -> Times | None:
        """Return what was recorded for the tree of `root`, or None where nothing was."""
        return Times(root, self._passes, self._watched) if self._passes else None
