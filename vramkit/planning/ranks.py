"""Whether several ranks share the reading of weights, or each reads all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vramkit.planning.machine import Machine
from vramkit.planning.plans import ComponentPlan
from vramkit.planning.profile import Work

__all__ = ["read_by_ranks"]

# Links of one host that were measured to carry at once what each carries alone; more may be held up by its memory.
_LINKS_AT_ONCE = 2
_CLEARLY = 1.25  # seconds of a plan are estimates: by less than that nothing is said to take longer than another


def read_by_ranks(plan: ComponentPlan, works: Sequence[Work], machine: Machine) -> ComponentPlan:
    """Return `plan`, whose weights `works` use, with who reads what streams; of one rank as it is.

    To give groups to one another costs ranks a little. Where computing clearly takes longer than one link, which brings
    page-locked weights beside it, each rank reads all for itself. So it is with what is decoded, by each at its own pace.
    """
    if machine.ranks == 1 or not plan.streamed_bytes:
        return plan
    compute = sum(machine.compute_seconds(work.flops) for work in works)
    link = sum(machine.link_seconds(plan.streamed_bytes) * work.calls for work in works) * machine.ranks
    link *= max(1, machine.ranks / _LINKS_AT_ONCE)
    is_beside = plan.store is None and machine.device != "cpu" and plan.slots > 1
    shares = plan.phase != "decode" and not (is_beside and compute > link * _CLEARLY)
    how = "ranks share the reading" if shares else "each rank reads all"
    return dataclasses.replace(plan, shares=shares, reason=f"{plan.reason}; {how}")
