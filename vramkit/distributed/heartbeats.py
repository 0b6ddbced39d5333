"""Who of the ranks is alive, and what went wrong with the first one that is not.

Each rank writes to the store that all share, twice a second: that it lives, and how many collectives it has come to. A rank
has failed when it says so (an exception), when its process is gone, when nothing is heard of it, or when others have come to
a collective that it has not come to for `timeout_s`. The first failure is written down once and is what every rank raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vramkit.distributed.hosts import host_of_processes
from vramkit.errors import RankError

__all__ = ["Heartbeats"]

_INTERVAL_S = 0.5
_SILENT_S = 60.0  # of a rank on another host, whose process cannot be looked at
_LEFT_S = 10.0  # of a rank that has left, and will not come any more
_GRACE_S = 10.0  # after a failure, until a process ends that does not raise it: it waits for its device, or hangs
_LOST_S = 3.0  # how long a failed collective waits to be told whose failure it was
_FAILED_STATUS = 70  # EX_SOFTWARE


@dataclasses.dataclass(slots=True)
class _Seen:
    """What was heard of a rank last, and since when it has been so."""

    beat: dict[str, Any]
    changed: float
    behind: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    """By group, at which count others are ahead of it, and since when."""


class Heartbeats:
    """Watches the ranks from a thread of its own, from `start` until `close`."""

    def __init__(self, store: Any, rank: int, members: Sequence[int], *, timeout_s: float) -> None:
        """Watch `members` (ranks of the world) through `store`, as `rank`."""
        self.rank = rank
        self.timeout_s = timeout_s
        self.failure: str | None = None
        """What went wrong with whom, once something has."""
        self._store = store
        self._host = host_of_processes()
        self._members = tuple(members)
        self._counts: dict[str, int] = {}
        self._groups: dict[str, tuple[int, ...]] = {}
        self._seen: dict[int, _Seen] = {}
        self._failed_rank: int | None = None
        self._is_told = False  # whether this process has raised it where somebody gets it
        self._callers: list[int] = []  # threads that are in calls which all ranks make
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vramkit-heartbeats", daemon=True)

    def start(self) -> None:
        """Begin to write and to watch."""
        self._beat()
        self._thread.start()

    def join_group(self, name: str, members: Sequence[int]) -> None:
        """Count the collectives of a group that this rank belongs to; groups of one name are counted together."""
        self._groups[name] = tuple(members)
        self._counts.setdefault(name, 0)

    def step(self, name: str) -> None:
        """Note that this rank has come to the next collective of a group."""
        self._counts[name] += 1

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call that all ranks make together: an exception is told to the others, and a failure elsewhere ends it."""
        self.check()
        self._callers.append(threading.get_ident())
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._callers.remove(threading.get_ident())

    def fail(self, error: BaseException) -> None:
        """Tell the others of an exception of this rank, unless it is one that they know."""
        if isinstance(error, RankError) and self.failure is not None:
            self._is_told = True
            return
        said = " ".join(str(error).split())[:300]
        self._is_told = True
        self._write_down(self.rank, f"{type(error).__name__}{': ' if said else ''}{said}")

    def check(self) -> None:
        """Raise what went wrong with another rank.

        Raises:
            RankError: names the rank and the cause.
        """
        if self.failure is not None:
            self._tell()
            raise RankError(self.failure)
        if self._ended.is_set():
            raise RankError("the mesh was closed; connect() again, and parallelize or offload with the new one")

    def blame(self, error: BaseException) -> RankError:
        """Return who is to blame for a collective that has failed: mostly a rank that is gone, of which word is coming."""
        end = time.monotonic() + _LOST_S
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.05)
        if self.failure is None:
            left = next((rank for rank, seen in self._seen.items() if seen.beat["left"]), None)
            said = f"a collective failed: {' '.join(str(error).split())[:300]}"
            if left is None:
                self._write_down(self.rank, said)
            else:
                self._write_down(left, "it has left before all were done, and others wait for it")
        self._tell()
        return RankError(self.failure or str(error))

    def _tell(self) -> None:
        """Note that the failure is raised now. From a copy thread nobody has it yet: the call may wait for its device."""
        if not self._callers or threading.get_ident() in self._callers:
            self._is_told = True

    def close(self) -> None:
        """End the thread, and let the others know that this rank has not died."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            with contextlib.suppress(Exception):  # whoever holds the store may be gone already
                self._beat(has_left=True)
                if self._failed_rank == self.rank:
                    self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Stay until they have read what went wrong here: the store may end with this process."""
        told = [f"told/{rank}" for rank in self._members if rank != self.rank]
        end = time.monotonic() + _LOST_S
        while not self._store.check(told) and time.monotonic() < end:
            time.sleep(0.05)

    # --- the thread

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            try:
                self._beat()
                self._look()
            except Exception as error:  # noqa: BLE001 - whatever a store raises, whose process is gone
                self._lose_store(error)
            if self.failure is not None:
                self._end_what_hangs()
                return

    def _beat(self, *, has_left: bool = False) -> None:
        said = {
            "at": time.time(),
            "left": has_left,
            "host": self._host,
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "counts": dict(self._counts),  # at once: other threads add to it
        }
        self._store.set(f"beat/{self.rank}", json.dumps(said))

    def _look(self) -> None:
        if self._store.check(["failed"]):
            self._learn(json.loads(self._store.get("failed")))
            self._store.set(f"told/{self.rank}", "")
            return
        now = time.monotonic()
        for rank in self._members:
            if not self._store.check([f"beat/{rank}"]):
                continue
            beat = json.loads(self._store.get(f"beat/{rank}"))
            seen = self._seen.setdefault(rank, _Seen(beat, now))
            if beat["at"] != seen.beat["at"]:
                seen.changed = now
            seen.beat = beat
        for rank in self._members:
            if (cause := self._cause(rank, now)) is not None:
                self._write_down(rank, cause)
                return

    def _cause(self, rank: int, now: float) -> str | None:
        """What is wrong with a rank, if something is."""
        seen = self._seen.get(rank)
        if seen is None:
            return None
        beat = seen.beat
        if not beat["left"] and rank != self.rank:
            if beat["host"] == self._host and _process(beat["pid"]) != beat["process"]:
                return "its process is gone (killed, or out of host memory)"
            if now - seen.changed > _SILENT_S:
                return f"nothing was heard of it for {_SILENT_S:.0f} s, nor of its host {beat['host'].split()[0]}"
        for name, members in self._groups.items():
            if rank not in members:
                continue
            mine = beat["counts"].get(name, 0)
            most = max(each.beat["counts"].get(name, 0) for other, each in self._seen.items() if other in members)
            if most <= mine:
                seen.behind.pop(name, None)
                continue
            if seen.behind.get(name, (None, 0.0))[0] != mine:
                seen.behind[name] = mine, now
            patience_s = min(self.timeout_s, _LEFT_S) if beat["left"] else self.timeout_s
            if now - seen.behind[name][1] > patience_s:
                did = "has left" if beat["left"] else "hangs or is far behind"
                return f"it {did}: others have waited {patience_s:.0f} s for it at collective {mine + 1} ({name})"
        return None

    def _write_down(self, rank: int, cause: str) -> None:
        """Note a failure; the first one that any rank notes is the one that all are told."""
        mine = json.dumps({"rank": rank, "cause": cause})
        try:
            first = self._store.compare_set("failed", "", mine).decode()
            self._store.set(f"told/{self.rank}", "")
        except Exception:  # noqa: BLE001 - the store may be what is gone
            first = mine
        self._learn(json.loads(first or mine))

    def _learn(self, failed: dict[str, Any]) -> None:
        self._failed_rank = failed["rank"]
        self.failure = f"rank {failed['rank']} failed: {failed['cause']}"

    def _lose_store(self, error: Exception) -> None:
        gone = (rank for rank in self._members if (cause := self._cause(rank, time.monotonic())) and "gone" in cause)
        rank = next(gone, 0)
        self._learn(
            {"rank": rank, "cause": f"its process is gone, and with it the ranks' store ({type(error).__name__})"}
        )

    def _end_what_hangs(self) -> None:
        """End this process where it is in a call that cannot see the failure: it waits for its device, or hangs."""
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end:
            if self._ended.wait(_INTERVAL_S) or self._is_told:
                return
        if self._callers or self._failed_rank == self.rank:
            if self.rank == min(rank for rank in self._members if rank != self._failed_rank):
                print(f"error: {self.failure}", file=sys.stderr, flush=True)  # noqa: T201 - nobody else can say it
            os._exit(_FAILED_STATUS)


def _process(pid: int) -> str | None:
    """What tells a process on this host from a later one of the same number; None for one that is gone, or ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return "unknown"  # a system without /proc: silence tells
    return None if fields[0] in "ZX" else fields[19]
