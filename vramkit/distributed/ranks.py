"""Some of the processes that work together, and what they say to one another.

All of them make the same calls in the same order. Bytes on a device go by NCCL, in order with the device's current stream;
bytes in host memory go by gloo, and while they are waited for, a failure of another rank ends the wait.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vramkit.distributed.heartbeats import Heartbeats
from vramkit.errors import RankError

__all__ = ["Ranks", "Transfer", "ranks_of"]

_POLL = dt.timedelta(seconds=0.2)
_PROCESSORS = 8  # of NCCL for the weights: each carries some 20 GB/s, and two links bring 55
# The name of torch 2.13, and that of before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transfer:
    """A collective that runs. `wait` lets what the calling thread does from then on come after it."""

    def __init__(self, work: Any, heartbeats: Heartbeats, *, on_host: bool) -> None:
        self._work = work
        self._heartbeats = heartbeats
        self._on_host = on_host

    def wait(self) -> None:
        """On the host until it is done; on a device the current stream waits.

        Raises:
            RankError: a rank has failed.
        """
        if not self._on_host:
            self._work.wait()
            return
        while True:
            self._heartbeats.check()
            has_ended = self._work.is_completed()  # before: it may end between a wait that was too short and a look
            try:
                self._work.wait(_POLL)
            except RuntimeError as error:
                if has_ended:
                    raise self._heartbeats.blame(error) from error
            else:
                return


class Ranks:
    """A group of processes, as one of them sees it. Used by one thread at a time."""

    def __init__(
        self,
        name: str,
        groups: Sequence[Sequence[int]],
        rank: int,
        heartbeats: Heartbeats,
        timeout_s: float,
        *,
        is_beside: bool = False,
    ) -> None:
        """Make groups of the world's ranks, and be the one called `name` that has this process, which is `rank`.

        All ranks make all `groups`, each of several ranks in order, as torch asks. What `is_beside` the computation takes
        few processors of a device from it.
        """
        self.name = name
        self.number = next(_numbers)
        """What this group goes by where no object can be handed on."""
        _known[self.number] = self
        self.members = next(tuple(members) for members in groups if rank in members)
        self.rank = self.members.index(rank)
        self.size = len(self.members)
        self._heartbeats = heartbeats
        heartbeats.join_group(name, self.members)
        # Twice as long as what the heartbeats allow, which say whose fault it is.
        self.timeout_s = 2 * timeout_s + 60
        """After how long a wait is given up that the heartbeats have not ended."""
        timeout = dt.timedelta(seconds=self.timeout_s)
        options = _beside(timeout) if is_beside and torch.cuda.is_available() else None
        several = [tuple(members) for members in groups if len(members) > 1]
        made = {each: dist.new_group(each, timeout=timeout, pg_options=options) for each in several}
        self._group = made.get(self.members)
        self._begun: set[torch.device] = set()

    @property
    def is_first(self) -> bool:
        """Whether this is the first of them."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """Torch's group of these processes; None where there is only one."""
        return self._group

    def gather_(self, whole: Tensor) -> Transfer:
        """Fill `whole`, contiguous, of which each rank has its equal part in place, in the order of ranks, from all."""
        parts = whole.view(self.size, -1)
        return self._run(whole, lambda: _all_gather(whole.view(-1), parts[self.rank], group=self._group, async_op=True))

    def begin_on(self, device: torch.device) -> None:
        """Connect the devices of all, from the thread that does this for other groups too, before another one needs it.

        Connecting waits for other ranks and for the device: two threads that do so may wait for each other on two ranks.
        """
        if device.type != "cpu" and device not in self._begun:
            self._begun.add(device)
            self.gather_(torch.zeros(self.size, device=device)).wait()
            torch.accelerator.synchronize(device)

    def exchange(self, out: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int]) -> Transfer:
        """Send rank r the r-th of the `sent` pieces of `given`, and put its piece for this one at the r-th of `received`.

        Both tensors are 1-D; pieces are counted in elements and may be empty.
        """
        options: dict[str, Any] = {"group": self._group, "async_op": True}
        return self._run(out, lambda: dist.all_to_all_single(out, given, list(received), list(sent), **options))

    def broadcast_(self, tensor: Tensor, source: int) -> Transfer:
        """Give all the contiguous `tensor` of rank `source` of this group."""
        options: dict[str, Any] = {"group": self._group, "async_op": True}
        return self._run(tensor, lambda: dist.broadcast(tensor, self.members[source], **options))

    def collect(self, value: Any) -> list[Any]:
        """Return the value of each rank, which travels as JSON through host memory."""
        if self.size == 1:
            return [value]
        sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.numbers(sent.numel())
        longest = max(sizes)
        whole = torch.zeros(self.size * longest, dtype=torch.uint8)
        whole[self.rank * longest : self.rank * longest + sent.numel()] = sent
        self.gather_(whole).wait()
        parts = whole.view(self.size, longest)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def numbers(self, number: int) -> list[int]:
        """Return the whole number of each rank."""
        return [row[0] for row in self.rows([number])]

    def rows(self, row: Sequence[int]) -> list[list[int]]:
        """Return the whole numbers of each rank, of which all have equally many."""
        whole = torch.zeros(self.size, len(row), dtype=torch.int64)
        whole[self.rank] = torch.tensor(row)
        self.gather_(whole).wait()
        rows: list[list[int]] = whole.tolist()
        return rows

    def from_first(self, value: Any) -> Any:
        """Return the value that the first rank gives."""
        return self.collect(value if self.is_first else None)[0]

    def arrive(self) -> Transfer:
        """Tell the others, through host memory, that this rank has come here; the result stands for that all have."""
        return self.gather_(torch.zeros(self.size))

    def barrier(self) -> None:
        """Wait on the host until all have come here."""
        self.arrive().wait()

    def _run(self, tensor: Tensor, start: Any) -> Transfer:
        self._heartbeats.check()
        on_host = tensor.device.type == "cpu"
        if self.size == 1:
            return _Done(None, self._heartbeats, on_host=on_host)
        self._heartbeats.step(self.name)
        try:
            return Transfer(start(), self._heartbeats, on_host=on_host)
        except RankError:
            raise
        except RuntimeError as error:
            raise self._heartbeats.blame(error) from error


def _beside(timeout: dt.timedelta) -> Any:
    """Options of NCCL for what runs beside the computation.

    A kernel that waits for another card holds the processors that it has: they are few, and have few buffers (0.66 GiB
    less of an H200). And it goes before kernels that compute, behind which it would keep the other card waiting.
    """
    options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # noqa: SLF001 (torch warns where it is another than that of the group)
    options.config.max_ctas = _PROCESSORS
    return options


_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, Ranks] = weakref.WeakValueDictionary()


def ranks_of(number: int) -> Ranks:
    """Return the group of a number."""
    return _known[number]


class _Done(Transfer):
    def wait(self) -> None:
        """Nothing to wait for."""
