"""Plans for several ranks: the first one makes them, because what each measures of its device differs a little."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vramkit.distributed.mesh import Mesh
from vramkit.errors import PlanInfeasible
from vramkit.planning.calls import PlannedCall
from vramkit.planning.planner import Planner
from vramkit.planning.plans import Plan

__all__ = ["FirstPlanner"]

_NOTHING: Mapping[str, str] = MappingProxyType({})


class FirstPlanner:
    """A planner whose plans are those of the first rank."""

    def __init__(self, planner: Planner, mesh: Mesh) -> None:
        self._planner, self._mesh = planner, mesh
        self.is_of_pipeline = planner.is_of_pipeline

    @property
    def names(self) -> tuple[str, ...]:
        """Of the components."""
        return self._planner.names

    def keep_free(self, size_bytes: int, *, note: str) -> None:
        """Leave at least so much of the budget to what no plan knows of; see `Planner.keep_free`."""
        self._planner.keep_free(size_bytes, note=note)

    def plan(self, call: PlannedCall | None, narrow: Mapping[str, str] = _NOTHING) -> Plan:
        """Return what the first rank plans for the same call; see `Planner.plan`."""
        with self._mesh.call():
            self._mesh.agree({"call that is planned": None if call is None else call.described()})
            said = self._mesh.all.from_first(self._made(call, narrow) if self._mesh.is_first else None)
        if "plan" not in said:
            raise PlanInfeasible(said["message"], nearest_bytes=said["nearest_bytes"], binds=said["binds"])
        return dataclasses.replace(Plan.from_json(said["plan"]), device=str(self._mesh.device))

    def highest(self, peak_bytes: int | None) -> int | None:
        """Return the most that a call took on any rank, of what each has measured; None where none has."""
        with self._mesh.call():
            measured = self._mesh.all.collect(peak_bytes)
        return max((each for each in measured if each is not None), default=None)

    def renewed(self, target: Any) -> FirstPlanner:
        """Return one for `target` as it is now."""
        return FirstPlanner(self._planner.renewed(target), self._mesh)

    def _made(self, call: PlannedCall | None, narrow: Mapping[str, str]) -> dict[str, Any]:
        try:
            return {"plan": self._planner.plan(call, narrow).to_json()}
        except PlanInfeasible as error:
            return {"message": str(error), "nearest_bytes": error.nearest_bytes, "binds": error.binds}
