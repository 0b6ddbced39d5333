"""Memory of each rank that the others of its host write into, so that nobody has to compute in order to receive.

A ring of slots lies in a window where there can be one. Making a window is a matter of one rank; that its neighbours see
it, of all of them. They open windows when they first meet for a group whose slot lies in one, in the order in which they
meet, so it does not matter when each of them made its own. Ranks tell one another at each meeting where their slot is.
Where one of them has it in no window, or in one that was not opened together with those of the others, they gather.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from vramkit.distributed.ranks import Ranks
from vramkit.errors import RankError
from vramkit.offload.backend import Arrival

__all__ = ["MakeWindow", "Place", "Pushes", "Window", "Windows"]

_TRIAL_BYTES = 2 * 2**20
_NOT_OPENED, _REFUSED = -1, -2  # in the place of a number
_NOWHERE = (0, _NOT_OPENED, 0)

Place: TypeAlias = tuple[int, int, int]
"""Where a slot is: bytes of its window (0: in none), the number that this was opened by, offset in it."""


class Window(Protocol):
    """A piece of this rank's memory, and those of the others that were opened with it. It does not keep its own alive."""

    def open(self, memory: Tensor) -> None:
        """Get at the windows of all ranks, which do the same now. `memory` is its own, 1-D uint8.

        Raises:
            OSError, RuntimeError: that is not possible.
        """

    def enter(self) -> None:
        """Let pushes come after what all ranks have done on their current streams before they came here."""

    def push(self, given: Tensor, offsets: Sequence[int]) -> None:
        """Copy `given`, after what the current stream has done so far, to its offset in the window of each other rank.

        There is an offset for each rank, of which that of this one is not used.
        """

    def leave(self) -> Arrival:
        """Tell the others that all was pushed; the result stands for that they have said so, too."""

    def close(self) -> None:
        """Let go of all; the memory goes at the same time."""


MakeWindow: TypeAlias = Callable[[int], tuple[Window, Tensor]]
"""Makes a window of so many bytes, and its memory; OSError or RuntimeError where there is no room for it."""


class Pushes:
    """What ranks write into one another's slots for one group."""

    def __init__(self, window: Window, starts: Sequence[int]) -> None:
        """Take the offset of each rank's slot in its window."""
        self._window = window
        self._starts = starts

    def enter(self) -> None:
        """See `Window.enter`: the slots of all may be written to by others then."""
        self._window.enter()

    def push(self, slot: Tensor, start: int, stop: int) -> None:
        """Write what lies between two offsets of this rank's `slot` to the same place in the others'."""
        self._window.push(slot[start:stop], [first + start for first in self._starts])

    def leave(self) -> Arrival:
        """See `Window.leave`: the slot is whole then."""
        return self._window.leave()


class _Known:
    """A window of this rank that is there now."""

    def __init__(self, window: Window, memory: Tensor) -> None:
        self.window = window
        self.size_bytes = memory.nbytes
        self.number = _NOT_OPENED
        self._storage = weakref.ref(memory.untyped_storage())

    def memory(self) -> Tensor:
        """Return the whole of it, for as long as somebody has a slot in it."""
        storage = self._storage()
        assert storage is not None
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Windows:
    """The windows of one rank, and whether there are any. Calls are made by one thread at a time, but for `memory`."""

    def __init__(self, ranks: Ranks, make: MakeWindow | None) -> None:
        """Make windows for `ranks` by `make`; None: there are none."""
        self._ranks = ranks
        self._make = make if ranks.size > 1 else None
        self._has_begun = False
        self._opened = 0
        self._known: dict[int, _Known] = {}  # by address

    @property
    def count(self) -> int:
        """How many there are now."""
        return len(self._known)

    def begin(self) -> None:
        """Find out, once and with all ranks, whether windows can be had, by a small one that is used and let go of.

        Where they cannot on one rank, there are none on all.
        """
        if self._has_begun:
            return
        self._has_begun = True
        trial = self.memory(_TRIAL_BYTES)
        places = self._ranks.rows(_NOWHERE if trial is None else self.place(trial))
        pushes = None if trial is None else self.pushes(trial, places)
        if trial is None or pushes is None:
            self._make = None
            return
        pushes.enter()
        pushes.leave().wait()
        if trial.device.type != "cpu":
            torch.accelerator.synchronize(trial.device)

    def memory(self, size_bytes: int) -> Tensor | None:
        """Return uninitialized memory that is a window while it lives (1-D uint8); None where there can be none."""
        if self._make is None or not size_bytes:
            return None
        with torch.inference_mode(False):
            try:
                window, memory = self._make(size_bytes)
            except (OSError, RuntimeError):
                return None
        self._known[memory.data_ptr()] = _Known(window, memory)
        # Its storage, which lives as long as anything refers to it: the ring, or whoever has a view of a weight.
        weakref.finalize(memory.untyped_storage(), _forget, self._known, memory.data_ptr()).atexit = False
        return memory

    def place(self, slot: Tensor) -> Place:
        """Return where `slot` is, to be told to the others."""
        address = slot.data_ptr()
        for start, known in list(self._known.items()):
            if start <= address < start + known.size_bytes and known.number != _REFUSED:
                return known.size_bytes, known.number, address - start
        return _NOWHERE

    def pushes(self, slot: Tensor, places: Sequence[Sequence[int]]) -> Pushes | None:
        """Return how to write into the slots of all ranks, at `places` as each has told; None where ranks have to gather.

        All ranks make this call, and get the same answer.

        Raises:
            RankError: a rank has failed.
        """
        sizes, numbers, offsets = zip(*places, strict=True)
        if 0 in sizes or len(set(sizes)) > 1 or len(set(numbers)) > 1:
            return None
        known = self._known[slot.data_ptr() - offsets[self._ranks.rank]]
        if known.number == _NOT_OPENED:
            self._open(known)
        return None if known.number == _REFUSED else Pushes(known.window, offsets)

    def _open(self, known: _Known) -> None:
        self._opened += 1
        try:
            with torch.inference_mode(False):
                known.window.open(known.memory())
            is_open = True
        except RankError:
            raise
        except (OSError, RuntimeError):
            is_open = False
        known.number = self._opened if all(self._ranks.numbers(is_open)) else _REFUSED


def _forget(known: dict[int, _Known], address: int) -> None:
    """Let go of a window whose memory goes."""
    if (gone := known.pop(address, None)) is not None:
        gone.window.close()
