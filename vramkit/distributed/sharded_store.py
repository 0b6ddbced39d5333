"""The bytes of a group, of which each rank reads a part over its own link, and which ranks give to one another.

A group is cut into pieces, a piece into as many shares as there are ranks. A rank copies its share of a piece into the slot,
and while the share of the next piece is on its way over the link, it writes the first one into the slots of the others. N
links carry a group in 1/N of the time; beside that only the last piece is written, which is why pieces are small. Where the
slot of a rank is in no window that the others write into (see `windows.py`), all of them gather each piece.

Ranks share the same groups in the same order, because order follows from the passes that all of them make; the copy threads
of several modules take turns as the program told them to. That the order is the same is checked on the host before anything
is sent: what is not the same group on all ranks ends all of them with an error.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Sequence

import torch

from vramkit.distributed.ranks import Ranks, Transfer
from vramkit.distributed.turnstile import Turnstile
from vramkit.distributed.windows import Pushes, Windows
from vramkit.errors import RankError
from vramkit.offload.backend import Arrival
from vramkit.offload.stores import JointStore, PartedStore, Store, StoreKind

__all__ = ["ShardedStore"]

_SHARE_BYTES = 16 * 2**20  # of a piece, at the least: longer than the host takes to issue it
_PIECES = 6  # at the most: what the host does for each it does beside the thread that computes
_LET_GO_S = 1.0
_ALIGNMENT = 256  # bytes, as that of leaves in a slot


class ShardedStore(JointStore):
    """A whole group: the stores of its pieces of memory, and the ranks that share the reading."""

    needs_thread = True  # ranks meet on the host before they gather

    def __init__(
        self,
        name: str,
        stores: Sequence[tuple[int, int, PartedStore]],
        size_bytes: int,
        *,
        ranks: Ranks,
        turnstile: Turnstile,
        windows: Windows,
        carried: Counter[str],
    ) -> None:
        """Share what `stores`, (offset in the slot, bytes, store), put into a slot of `size_bytes`.

        `carried` counts the groups by the way in which ranks gave them to one another.
        """
        self._turnstile, self._windows, self._carried = turnstile, windows, carried
        self._turns: deque[int] = deque()  # of the fills to come
        kinds = {store.kind for _, _, store in stores}
        first: tuple[StoreKind, ...] = ("disk", "mapped", "pageable", "registered")  # that of a file, if there is one
        self.kind: StoreKind = next((kind for kind in first if kind in kinds), "registered")
        self._name = name
        self._ranks = ranks
        layout = [(offset, size) for offset, size, _ in stores]
        self._number = int.from_bytes(hashlib.sha256(f"{name} {layout}".encode()).digest()[:7], "big")
        whole = size_bytes // ranks.size
        share = whole // max(1, min(_PIECES, whole // _SHARE_BYTES)) // _ALIGNMENT * _ALIGNMENT
        count = size_bytes // (share * ranks.size) if share else 0
        self._pieces = []  # (start, stop, where the share of this rank begins, and the next one; what it reads)
        for start in range(0, count * share * ranks.size, max(1, share * ranks.size)):
            own = start + ranks.rank * share
            self._pieces.append(
                (start, start + share * ranks.size, own, own + share, _within(stores, own, own + share))
            )
        self._rest = _within(stores, count * share * ranks.size, size_bytes)  # which each rank reads for itself

    def reserve(self) -> None:
        """Take the turn of a fill that is about to be given to a copy thread."""
        self._turns.append(self._turnstile.take())

    def fill(self, target: torch.Tensor) -> None:
        """Do as `begin` does, and wait."""
        self.begin(target).wait()

    def begin(self, target: torch.Tensor) -> Arrival:
        """When it is its turn, read this rank's shares; those of the others come in behind.

        Raises:
            StoreError: the bytes cannot be had.
            RankError: a rank has failed, or needs another group now.
        """
        with self._turnstile.turn(self._turns.popleft()):
            pushes = self._meet(target)
            self._carried["gathered" if pushes is None else "pushed"] += 1
            return self._gathering(target) if pushes is None else self._pushing(target, pushes)

    def _pushing(self, target: torch.Tensor, pushes: Pushes) -> Arrival:
        pushes.enter()
        for _, _, start, stop, parts in self._pieces:
            for part in parts:
                part.fill(target)
            pushes.push(target, start, stop)
        for part in self._rest:
            part.fill(target)
        return pushes.leave()

    def _gathering(self, target: torch.Tensor) -> Arrival:
        gathered = _Gathered(target)
        for start, stop, _, _, parts in self._pieces:
            for part in parts:
                part.fill(target)
            gathered.transfers.append(self._ranks.gather_(target[start:stop]))
        for part in self._rest:
            part.fill(target)
        return gathered

    def _meet(self, target: torch.Tensor) -> Pushes | None:
        """See that all ranks are here for this group, and learn how to write into their slots, if that is possible."""
        said = self._ranks.rows([self._number, *self._windows.place(target)])
        if len({number for number, *_ in said}) > 1:
            names = self._ranks.collect(self._name)
            wanted = ", ".join(f"rank {rank}: {name!r}" for rank, name in zip(self._ranks.members, names, strict=True))
            raise RankError(
                f"ranks need weights in different orders ({wanted}), and each has only a part of them. All have to make the "
                "same calls of the same module; what skips blocks by the values of tensors cannot share their weights"
            )
        return self._windows.pushes(target, [place for _, *place in said])


class _Gathered:
    """The pieces of a group on their way into a slot."""

    def __init__(self, slot: torch.Tensor) -> None:
        self.transfers: list[Transfer] = []
        self._slot = slot
        self._references = _references(slot)

    def wait(self) -> None:
        """Wait for all of them; see `Transfer.wait`.

        Gloo has what it filled for a moment longer, and whether somebody has a view of a slot is told by counting them.
        """
        while self.transfers:
            self.transfers.pop(0).wait()
        end = time.monotonic() + _LET_GO_S
        while self._slot.device.type == "cpu" and _references(self._slot) > self._references and time.monotonic() < end:
            time.sleep(0)


def _references(slot: torch.Tensor) -> int:
    """Return how many tensors there are over the memory of a slot."""
    count: int = torch._C._storage_Use_Count(slot.untyped_storage()._cdata)  # noqa: SLF001 (torch has no public reader)
    return count


class _Part:
    """Where in a slot a store puts its bytes."""

    def __init__(self, start: int, stop: int, store: Store) -> None:
        self._place = slice(start, stop)
        self._store = store

    def fill(self, slot: torch.Tensor) -> None:
        self._store.fill(slot[self._place])


def _within(stores: Sequence[tuple[int, int, PartedStore]], start: int, stop: int) -> list[_Part]:
    """Return what of `stores` lies between two offsets of the slot."""
    parts = []
    for offset, size, store in stores:
        first, last = max(start, offset), min(stop, offset + size)
        if first < last:
            parts.append(_Part(first, last, store.part(first - offset, last - offset)))
    return parts
