from __future__ import annotations

import weakref
from typing import Any

import torch

from vramkit.offload.backend import CpuBackend
from vramkit.offload.ring import Pieces, Region, SlotRing


def opened(*plan: Any) -> SlotRing:
    ring = SlotRing(*plan)
    ring.open()
    return ring


class Mark:
    """A fence with a name."""

    def wait(self) -> float:
        return 0.0

    def synchronize(self) -> None: ...


def places(regions: list[Region | None]) -> list[int | None]:
    return [None if region is None else region.first for region in regions]


def test_slots_are_handed_out_in_turn_until_none_is_free() -> None:
    ring = opened(CpuBackend(), 3, 4096)
    taken = [ring.take(4096) for _ in range(4)]
    assert places(taken) == [0, 1, 2, None]
    assert ring.size_bytes == 3 * 4096
    assert taken[1] is not None
    ring.give(taken[1], Mark())
    assert places([ring.take(100), ring.take(100)]) == [1, None]


def test_the_same_turn_comes_back_at_the_same_address() -> None:
    ring = opened(CpuBackend(), 2, 4096)
    seen = []
    for _ in range(6):
        region = ring.take(4096)
        assert region is not None
        seen.append(region.memory.data_ptr())
        ring.give(region, Mark())
    assert seen[:2] * 3 == seen
    assert len(set(seen)) == 2


def test_a_wide_group_takes_adjacent_slots_and_never_wraps() -> None:
    ring = opened(CpuBackend(), 4, 4096)
    first, wide = ring.take(4096), ring.take(3 * 4096)
    assert places([first, wide]) == [0, 1]
    assert wide is not None
    assert wide.count == 3
    assert wide.memory.numel() == 3 * 4096
    assert ring.take(1) is None
    ring.give(wide, Mark())
    assert places([ring.take(4096), ring.take(3 * 4096), ring.take(2 * 4096)]) == [1, None, 2]
    assert opened(CpuBackend(), 4, 4096).take(5 * 4096) is None


def test_memory_is_written_only_after_its_last_reader() -> None:
    ring = opened(CpuBackend(), 2, 4096)
    region, mark = ring.take(2 * 4096), Mark()
    assert region is not None
    ring.give(region, mark)
    again = ring.take(2 * 4096)
    assert again is not None
    assert again.free == [mark, mark]
    ring.give(again, None)  # nothing has read it: the reader before still counts
    once_more = ring.take(1)
    assert once_more is not None
    assert once_more.free == [mark]


def test_memory_outside_the_ring_is_not_given_back_to_it() -> None:
    ring = opened(CpuBackend(), 1, 4096)
    held = ring.take(4096)
    extra = ring.make(100)
    ring.give(extra, Mark())
    assert held is not None
    assert ring.take(1) is None


def test_slots_are_no_inference_tensors() -> None:
    with torch.inference_mode():
        ring = opened(CpuBackend(), 2, 4096)
        region = ring.take(10)
    assert region is not None
    assert not region.memory.is_inference()


def test_reset_takes_everything_back() -> None:
    ring = opened(CpuBackend(), 2, 4096)
    assert places([ring.take(1), ring.take(1)]) == [0, 1]
    ring.reset()
    assert places([ring.take(1), ring.take(1), ring.take(1)]) == [0, 1, None]


def test_a_ring_of_nothing_gives_nothing() -> None:
    ring = opened(CpuBackend(), 2, 0)
    assert ring.size_bytes == 0
    assert ring.take(1) is None


def test_a_closed_ring_has_no_memory_and_gives_nothing_until_it_is_opened() -> None:
    ring = SlotRing(CpuBackend(), 2, 4096)
    assert ring.take(1) is None
    ring.open()
    held = ring.take(1)
    memory = held and weakref.ref(held.memory)
    assert memory is not None
    waited: list[int] = []
    held, mark = None, Mark()
    mark.synchronize = lambda: waited.append(1)  # type: ignore[method-assign]
    ring.give(Region(Pieces(torch.empty(0)), (), 0, 1), mark)
    ring.close()
    assert waited, "whoever gets the memory need not compute on the same stream"
    assert memory() is None
    assert ring.take(1) is None
    ring.open()
    assert places([ring.take(1), ring.take(1)]) == [0, 1]


def test_a_slot_is_cut_once_into_the_pieces_of_groups_of_one_layout() -> None:
    ring = opened(CpuBackend(), 1, 4096)
    found = []
    for _ in range(2):
        region = ring.take(4000)
        assert region is not None
        assert region.pieces[0, 4000] is region.memory
        found.append(region.pieces[1024, 512])
        ring.give(region, Mark())
    assert found[0] is found[1]
    assert (found[0].numel(), found[0].data_ptr() - region.memory.data_ptr()) == (512, 1024)
    wide = ring.take(4096)
    assert wide is not None
    assert wide.pieces[1024, 512] is not found[0]  # of other memory, by the count of who has it
