"""The order of loads, with groups and a queue made of paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vramkit.offload.backend import CpuBackend
from vramkit.offload.ring import Pieces, SlotRing
from vramkit.offload.stats import Counters
from vramkit.offload.streamer import Streamer


class Done:
    def wait(self) -> float:
        return 0.0

    def synchronize(self) -> None: ...


class Queue:
    """Runs nothing; jobs are done when somebody waits for them."""

    def __init__(self) -> None:
        self.submitted: list[tuple[tuple[object, ...], Done]] = []

    def submit(self, job: Callable[[], object], after: Iterable[object]) -> Done:
        job()
        self.submitted.append((tuple(after), Done()))
        return self.submitted[-1][1]

    def drain(self) -> None: ...

    def close(self) -> None: ...


class Backend(CpuBackend):
    def queue(self, *, threaded: bool) -> Any:
        return Queue()


class Group:
    """Writes its number into its slot, and notes what is done with it."""

    needs_thread = False
    is_joint = False
    is_on_show = True
    kept_writes = None

    def __init__(self, name: str, log: list[str], size_bytes: int = 4096) -> None:
        self.name, self.log, self.size_bytes = name, log, size_bytes
        self.shown: torch.Tensor | None = None
        self.writes = 0

    def version(self) -> int:
        return self.writes

    def reserve(self) -> None:
        self.log.append(f"reserve {self.name}") if self.is_joint else None

    def fill(self, pieces: Pieces) -> Sequence[object]:
        self.log.append(f"load {self.name}")
        pieces.memory.fill_(ord(self.name))
        return ()

    def show_device(self, memory: torch.Tensor, *, remember: bool) -> None:
        self.shown = memory

    def restore(self) -> None:
        self.shown = None

    def put_away(self) -> bool:
        self.shown = None
        return False

    def forget(self, memory: torch.Tensor) -> None:
        pass

    def refresh(self, *, all_of_it: bool = False) -> None:
        pass

    def is_at_rest(self) -> bool:
        return self.shown is None


class Rig:
    def __init__(self, names: str = "abcdef", slots: int = 2, sizes: dict[str, int] | None = None) -> None:
        self.log: list[str] = []
        self.groups = {name: Group(name, self.log, (sizes or {}).get(name, 4096)) for name in names}
        self.counters = Counters()
        self.ring = SlotRing(Backend(), slots, 4096)
        self.ring.open()
        groups: Any = list(self.groups.values())
        self.streamer = Streamer(groups, self.ring, Backend(), self.counters)
        self.streamer.prefill()

    def run(self, order: str, entry_point: str = "forward") -> list[str]:
        """One pass; returns the loads that it caused."""
        start = len(self.log)
        self.streamer.begin_pass(entry_point)
        for name in order:
            self.acquire(name)
            self.streamer.release(cast("Any", self.groups[name]))
            assert self.groups[name].shown is None
        self.streamer.end_pass()
        return [entry.removeprefix("load ") for entry in self.log[start:]]

    def acquire(self, name: str) -> None:
        self.streamer.acquire(cast("Any", self.groups[name]))
        self.check(name)

    def check(self, name: str) -> None:
        shown = self.groups[name].shown
        assert shown is not None
        assert bool((shown == ord(name)).all()), f"{name} was overwritten"

    def wasted(self, passes: Sequence[str]) -> int:
        """Return how many more loads than needed these passes make, which are given as entry point and groups."""
        loads = self.counters.loads
        for each in passes:
            self.run(each[1:], each[0])
        return self.counters.loads - loads - sum(len(each) - 1 for each in passes)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_each_group_is_loaded_once_a_pass_and_ahead_of_its_use(slots: int) -> None:
    rig = Rig(slots=slots)
    assert rig.log == [f"load {name}" for name in "abcdef"[:slots]]
    for _ in range(3):
        loads = rig.run("abcdef")
        assert len(loads) == 6
        assert "".join(loads) == ("abcdef" * 2)[slots : slots + 6]  # the last ones are for the next pass
    assert rig.counters.demand_loads == 0
    assert rig.counters.dropped_loads == 0
    assert rig.counters.passes == 3
    assert rig.counters.loads == 18 + slots
    assert rig.counters.loaded_bytes == (18 + slots) * 4096


def test_the_order_that_runs_is_learned_from_one_pass() -> None:
    rig = Rig()
    rig.run("fedcba")
    demanded = rig.counters.demand_loads
    for _ in range(2):
        rig.run("fedcba")
    assert rig.counters.demand_loads - demanded <= 1
    demanded, dropped = rig.counters.demand_loads, rig.counters.dropped_loads
    rig.run("fedcba")
    assert (rig.counters.demand_loads, rig.counters.dropped_loads) == (demanded, dropped)


def test_groups_that_are_skipped_are_dropped() -> None:
    rig = Rig()
    rig.run("abcdef")
    rig.run("acdef")
    assert rig.counters.dropped_loads == 1  # b in this pass; the next one is expected to go the same way
    rig.run("acdef")
    assert rig.counters.dropped_loads == 1
    assert rig.counters.demand_loads == 0


@pytest.mark.parametrize("is_joint", [False, True])
def test_a_load_of_several_ranks_that_is_dropped_frees_its_slot_when_it_is_all_there(*, is_joint: bool) -> None:
    rig = Rig(slots=2)
    queue = cast("Any", rig.streamer)._queue
    rig.run("abcdef")
    rig.groups["b"].is_joint = is_joint
    rig.streamer.begin_pass("forward")
    rig.acquire("a")
    dropped = queue.submitted[-1][1]  # of b, which is skipped
    for name in "ac":
        rig.streamer.release(cast("Any", rig.groups["a"]))
        rig.acquire(name)
    taken = [after for after, _ in queue.submitted[-2:]]
    assert any(dropped in after for after in taken) is is_joint


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("order", ["ffffff", "abab", "badcfe", "", "aabbccddeeff", "abcdefabcdef", "cab", "fa"])
def test_any_order_is_right(order: str, slots: int) -> None:
    rig = Rig(slots=slots)
    for each in ("abcdef", order, order, "abcdef", order[::-1], "fedcba", order):
        rig.run(each)
    assert rig.streamer.is_clean


def test_a_pass_that_stopped_midway_is_forgotten_unless_it_repeats() -> None:
    rig = Rig()
    rig.run("abcdef")
    rig.run("abc")
    demanded = rig.counters.demand_loads
    rig.run("abcdef")
    assert rig.counters.demand_loads == demanded
    rig.run("abc")
    rig.run("abc")
    dropped = rig.counters.dropped_loads
    rig.run("abc")
    assert rig.counters.dropped_loads == dropped  # d is not fetched in vain any more


def test_weights_that_were_written_after_their_load_are_loaded_again() -> None:
    rig = Rig()
    rig.run("abcdef")
    rig.groups["a"].writes += 1  # it is in a slot already
    assert rig.run("abcdef")[0] == "a"
    held: Any = rig.groups["c"]
    rig.streamer.acquire(held)
    before = rig.counters.loads
    held.writes += 1
    rig.streamer.acquire(held)
    assert rig.counters.loads > before
    rig.streamer.release(held)


def test_acquiring_twice_and_releasing_twice_is_once() -> None:
    rig = Rig()
    group: Any = rig.groups["a"]
    rig.streamer.acquire(group)
    shown = group.shown
    rig.streamer.acquire(group)
    assert group.shown is shown
    rig.streamer.release(group)
    rig.streamer.release(group)
    assert group.shown is None
    assert rig.streamer.is_clean


def test_more_groups_at_once_than_slots_take_memory_of_their_own_and_give_it_back() -> None:
    rig = Rig(slots=1)
    held: list[Any] = [rig.groups[name] for name in "abc"]
    for group in held:
        rig.streamer.acquire(group)
    assert all(bool((group.shown == ord(group.name)).all()) for group in held)
    rig.streamer.release_all()
    assert rig.streamer.is_clean
    assert not any(rig.ring._taken) or rig.streamer._ahead


@pytest.mark.parametrize("slots", [2, 3])
def test_wide_groups_take_several_slots(slots: int) -> None:
    rig = Rig(slots=slots, sizes={"c": 2 * 4096, "e": slots * 4096})
    for order in ("abcdef", "abcdef", "ecba", "cece", "abcdef"):
        rig.run(order)
    assert rig.counters.passes == 5


def test_reset_forgets_what_is_held_and_on_its_way_but_not_the_order() -> None:
    rig = Rig()
    rig.run("fedcba")
    rig.run("fedcba")
    group: Any = rig.groups["f"]
    rig.streamer.acquire(group)
    rig.streamer.reset()
    assert group.shown is None
    assert rig.streamer.is_clean
    demanded = rig.counters.demand_loads
    rig.run("fedcba")
    assert rig.counters.demand_loads <= demanded + 1


FULL, SHORT, ENDS = "fabcdef", "fab", "faf"  # entry point f: all groups, an early exit, skipped blocks


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(
    "pattern",
    [
        [FULL, SHORT],
        [FULL, FULL, SHORT, SHORT],
        [FULL, ENDS],
        [FULL, FULL, ENDS, ENDS],
        [FULL, FULL, FULL, ENDS],
        [FULL, ENDS, ENDS, ENDS],
        ["eabc", "ddef"],  # encode and decode in turn
        ["ddef"],
        ["gab", *["fcdef"] * 3],  # generate: an encoder, then tokens
    ],
)
def test_passes_that_differ_load_what_they_need_once_they_were_seen(pattern: list[str], slots: int) -> None:
    rig = Rig(slots=slots)
    for _ in range(3):
        rig.wasted(pattern)
    dropped = rig.counters.dropped_loads
    assert rig.wasted(pattern * 3) == 0
    assert rig.counters.dropped_loads == dropped


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_pass_that_comes_unexpectedly_drops_no_more_than_the_slots_hold(slots: int) -> None:
    rig = Rig(slots=slots)
    for each in ["fabcdef", "eabc", "ddef", "fac"]:
        rig.run(each[1:], each[0])
    for each in ["ddef", "eabc", "fabcdef", "fabcdef", "fac", "ddef", "fabcdef"]:
        before = rig.counters.dropped_loads
        rig.run(each[1:], each[0])
        assert rig.counters.dropped_loads - before <= 2 * slots  # what its beginning corrects, and what its end guesses


def test_what_is_expected_all_the_same_is_not_dropped() -> None:
    rig = Rig(slots=3)
    for order in ("abcdef", "acbdef", "abcdef", "abcdef"):
        rig.run(order)
    before = rig.counters.dropped_loads
    rig.run("acbdef")  # b was on its way when c came
    assert rig.counters.dropped_loads == before


def test_parts_that_are_called_outside_a_pass_are_followed_and_not_learned() -> None:
    rig = Rig()
    rig.run("abcdef")
    rig.run("abcdef")
    demanded = rig.counters.demand_loads
    for name in "cdef":
        rig.acquire(name)
        rig.streamer.release(cast("Any", rig.groups[name]))
    assert rig.counters.demand_loads == demanded + 1  # c
    rig.run("abcdef")
    rig.run("abcdef")
    assert rig.counters.demand_loads <= demanded + 2


names = st.sampled_from("abcdef")
passes = st.builds("".join, st.tuples(st.sampled_from("fedg"), st.text("abcdef", max_size=8)))
sizes = st.dictionaries(names, st.integers(1, 4 * 4096))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["acquire", "release", "write", "end", "reset", *"fed"]), names)), sizes)
def test_whatever_is_done_the_bytes_are_right(steps: list[tuple[str, str]], sizes: dict[str, int]) -> None:
    rig = Rig(slots=3, sizes=sizes)
    held: set[str] = set()
    for step, name in steps:
        group: Any = rig.groups[name]
        if step == "acquire":
            rig.acquire(name)
            held.add(name)
        elif step == "release":
            rig.streamer.release(group)
            held.discard(name)
        elif step == "write":
            group.writes += 1
        elif step == "end":
            rig.streamer.release_all()
            held.clear()
            rig.streamer.end_pass()
        elif step == "reset":
            rig.streamer.reset()
            held.clear()
        else:
            rig.streamer.begin_pass(step)
        for other in held:
            rig.check(other)
    rig.streamer.release_all()
    assert rig.streamer.is_clean


@settings(deadline=None, max_examples=150)
@given(st.lists(passes, min_size=1, max_size=4), st.integers(1, 4), sizes)
def test_passes_that_repeat_reach_the_bytes_that_they_need(
    pattern: list[str], slots: int, sizes: dict[str, int]
) -> None:
    rig = Rig(slots=slots, sizes=sizes)
    for _ in range(6):
        rig.wasted(pattern)
    dropped = rig.counters.dropped_loads
    assert rig.wasted(pattern * 2) == 0
    assert rig.counters.dropped_loads == dropped
