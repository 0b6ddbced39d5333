"""One rank dies, hangs or runs out of memory: all end, and the others say which one and why."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from rank_group import Faulty

from vramkit.distributed import heartbeats
from vramkit.errors import RankError

PATIENCE_S = 90  # 5 until a rank counts as hung, 2 of grace; the rest is waiting for a core
FAULTS = {
    "is_killed": (1, "its process is gone"),
    "first_is_killed": (0, "its process is gone"),
    "hangs": (1, "hangs or is far behind"),
    "runs_out_of_memory": (1, "MemoryError: no room for 3 GiB"),
    "first_runs_out_of_memory": (0, "MemoryError: no room for 3 GiB"),
}


def test_all_ranks_end_and_say_who_failed() -> None:
    """All faults at once, because ranks mostly wait, and in one test, so that one worker starts them."""
    faulty = {fault: Faulty(fault) for fault in FAULTS}
    try:
        for fault, ranks in faulty.items():
            check_end(fault, *ranks.end(PATIENCE_S))
    finally:
        for ranks in faulty.values():
            ranks.close()


def check_end(fault: str, said: list[str | None], statuses: list[int | None]) -> None:
    culprit, cause = FAULTS[fault]
    other = said[1 - culprit]
    assert None not in statuses, f"{fault}: a rank has not ended"
    assert other is not None
    assert other.startswith(f"RankError: rank {culprit} failed: ")
    assert cause in other
    killed, hung = -signal.SIGKILL, 70
    assert statuses[culprit] == {"is_killed": killed, "first_is_killed": killed, "hangs": hung}.get(fault, 0)
    if fault.endswith("runs_out_of_memory"):
        assert said[culprit] == "MemoryError: no room for 3 GiB"


@pytest.mark.parametrize("in_copy_thread", [True, False])
def test_a_call_that_waits_for_its_device_ends_whatever_copy_threads_were_told(
    monkeypatch: pytest.MonkeyPatch, in_copy_thread: bool
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(heartbeats, "_GRACE_S", 0.05)
    monkeypatch.setattr(heartbeats, "_INTERVAL_S", 0.01)
    watched = heartbeats.Heartbeats(None, 0, [0, 1], timeout_s=1)

    def learn() -> None:
        with pytest.raises(RankError, match="rank 1 failed: it is gone"):
            watched.check()

    with watched.call():
        watched._learn({"rank": 1, "cause": "it is gone"})
        other = threading.Thread(target=learn)
        if in_copy_thread:
            other.start()
            other.join()
        else:
            learn()
        watched._end_what_hangs()
    assert ended == ([70] if in_copy_thread else [])
