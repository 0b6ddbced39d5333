"""Smaller machines on a larger one: a card with less memory, a slower link, less RAM; and what is left without copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from vramkit.memory import available_ram_bytes
from vramkit.offload.resting import RestingPlace
from vramkit.offload.stores import PinnedStore, Store, StoreKind

__all__ = ["EmptyStore", "SlowStore", "capped", "crowded", "slowed", "without_copies"]

_BALLOON_PIECE_BYTES = 2**30


@contextmanager
def capped(device: torch.device, card_bytes: int) -> Iterator[bool]:
    """Let torch's allocator have `card_bytes` of the device; yields whether that holds (there is none to cap on the CPU)."""
    if device.type != "cuda":
        yield False
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, card_bytes / total), device)
    try:
        yield True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class SlowStore:
    """A store that takes `times` as long: each piece travels so often, the last time in part.

    The link is really busy for that long and the copies are those of the engine, so nothing is timed or waited for.
    """

    def __init__(self, store: Store, times: float) -> None:
        self._store = store
        self._times = times
        self.kind: StoreKind = store.kind
        self.needs_thread = store.needs_thread

    def fill(self, target: Tensor) -> None:
        """Put the bytes into `target`, again and again."""
        rest, whole = math.modf(self._times)
        for _ in range(int(whole)):
            self._store.fill(target)
        part = int(rest * target.numel())
        if part and isinstance(self._store, PinnedStore):
            target[:part].copy_(self._store._memory[:part], non_blocking=True)
        elif part:
            self._store.fill(target[:part])


class EmptyStore:
    """A store without bytes: filling a slot costs nothing and leaves in it what was there."""

    needs_thread = False

    def __init__(self, store: Store) -> None:
        self.kind: StoreKind = store.kind

    def fill(self, target: Tensor) -> None:
        """Do nothing."""


@contextmanager
def slowed(times: float) -> Iterator[None]:
    """Let all that is offloaded inside travel `times` as slowly as the link allows; a number of at least 1.

    Raises:
        ValueError: faster than the link was asked for.
    """
    if times < 1:
        raise ValueError(f"a link {1 / times:.2f} times as fast as the one that is there cannot be emulated")
    with _every_store(lambda store: SlowStore(store, times)):
        yield


@contextmanager
def without_copies() -> Iterator[None]:
    """Leave the copies out of all that is offloaded inside: what is left is the host's part. Results are wrong."""
    with _every_store(EmptyStore):
        yield


@contextmanager
def _every_store(wrap: Callable[[Store], Store]) -> Iterator[None]:
    choose = RestingPlace.store

    def chosen(place: RestingPlace, leaf: Tensor, size_bytes: int | None = None) -> Store:
        return wrap(choose(place, leaf, size_bytes))

    with mock.patch.object(RestingPlace, "store", chosen):  # units are formed anew after a pass: for as long as it runs
        yield


@contextmanager
def crowded(left_bytes: int, *, most_bytes: int | None = None) -> Iterator[int]:
    """Take RAM until `left_bytes` are left, page cache included; yields how much is really left.

    `most_bytes` bounds what is taken, for tests.
    """
    wanted = max(0, available_ram_bytes() - left_bytes)
    wanted = wanted if most_bytes is None else min(wanted, most_bytes)
    balloon = []
    while wanted > 0:
        piece = min(wanted, _BALLOON_PIECE_BYTES)
        balloon.append(torch.ones(piece, dtype=torch.uint8, device="cpu"))  # written to, so that its pages are there
        wanted -= piece
    yield available_ram_bytes()
    balloon.clear()
