"""One rank dies, hangs or runs out of memory: all end, and the others say which one and why."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from rank_group import Faulty

PATIENCE_S = 90  # 5 until a rank counts as hung, 2 of grace; the rest is waiting for a core
FAULTS = {
    "is_killed": (1, "its process is gone"),
    "first_is_killed": (0, "its process is gone"),
    "hangs": (1, "hangs or is far behind"),
    "runs_out_of_memory": (1, "MemoryError: no room for 3 GiB"),
    "first_runs_out_of_memory": (0, "MemoryError: no room for 3 GiB"),
}


@pytest.fixture(scope="module")
def faulty() -> Iterator[dict[str, Faulty]]:
    """All at once, because they mostly wait."""
    started = {fault: Faulty(fault) for fault in FAULTS}
    yield started
    for each in started.values():
        each.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_end_and_say_who_failed(faulty: dict[str, Faulty], fault: str) -> None:
    culprit, cause = FAULTS[fault]
    said, statuses = faulty[fault].end(PATIENCE_S)
    other = said[1 - culprit]
    assert None not in statuses, "a rank has not ended"
    assert other is not None
    assert other.startswith(f"RankError: rank {culprit} failed: ")
    assert cause in other
    killed, hung = -signal.SIGKILL, 70
    assert statuses[culprit] == {"is_killed": killed, "first_is_killed": killed, "hangs": hung}.get(fault, 0)
    if fault.endswith("runs_out_of_memory"):
        assert said[culprit] == "MemoryError: no room for 3 GiB"
