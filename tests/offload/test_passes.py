"""Whether a call still runs is told by the stack, however deep whoever asks is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from vramkit.offload.passes import Calls, OpenCall


def deeper(levels: int, ask: Callable[[], bool]) -> bool:
    return deeper(levels - 1, ask) if levels else ask()


def open_call(calls: Calls) -> OpenCall:
    call = OpenCall("forward", sys._getframe(1))
    calls.begin(call)
    return call


def test_a_call_runs_at_every_depth_below_it() -> None:
    calls = Calls()
    open_call(calls)
    for levels in (0, 3, 3, 40, 1, 0, 7):
        assert deeper(levels, calls.is_running_here)


def test_a_call_that_has_returned_does_not_run_whatever_is_as_deep_now() -> None:
    calls = Calls()

    def runs() -> bool:
        open_call(calls)
        return deeper(5, calls.is_running_here)

    assert runs()
    for levels in (0, 4, 5, 6, 7, 50):
        assert not deeper(levels, calls.is_running_here)


def test_a_call_of_another_thread_does_not_run_here() -> None:
    calls, found = Calls(), []
    open_call(calls)
    asking = threading.Thread(target=lambda: found.append(calls.is_running_here()))
    asking.start()
    asking.join()
    assert found == [False]
