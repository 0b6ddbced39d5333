"""Profile a call on twins without memory, and search a plan for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vramkit.errors import ConfigError, PlanInfeasible, VramkitError
from vramkit.memory import MIB, format_bytes, parse_bytes
from vramkit.planning.calls import PlannedCall
from vramkit.planning.components import components_of, refuse_shared_modules, refuse_without_twins, tied_components
from vramkit.planning.dealing import least_bytes
from vramkit.planning.features import Settings
from vramkit.planning.machine import Machine
from vramkit.planning.narrowing import STORED, Stored, ways_to_store
from vramkit.planning.plans import ALLOWED, Allowed, Plan
from vramkit.planning.profile import Profile, Variant, Work
from vramkit.planning.search import estimate, least_budget, search
from vramkit.planning.twins import Twins, is_pipeline

__all__ = ["Budget", "Planner"]

_NOTHING: Mapping[str, str] = MappingProxyType({})
_NEARLY = 1.02
_FEW_BYTES = 1000  # a number below it that has no unit was meant to be GiB
_WORTH_IT = 0.95  # of the time (or of bytes above the budget): what saves less is not worth less exact results


class Budget:
    """What a plan may use, validated."""

    def __init__(self, vram: int | str, ram: int | str | None, allow: str) -> None:
        self.vram_bytes = _size("vram", vram)
        self.ram_bytes = None if ram is None else _size("ram", ram)
        if allow not in ALLOWED:
            raise ConfigError(f"allow={allow!r}; expected one of {', '.join(map(repr, ALLOWED))}")
        self.allow: Allowed = allow


class Planner:
    """Knows a pipeline (or modules) without memory, and plans calls of it."""

    def __init__(self, target: Any, budget: Budget, device: torch.device, *, ranks: int = 1) -> None:
        """Make twins of the modules of `target`, which is only read.

        With `ranks`, so many devices share the links and the work, each under the whole budget.

        Raises:
            ConfigError: there is no module in it, or one that cannot have a twin.
            ConflictError: two components share a module.
        """
        originals = components_of(target)
        refuse_shared_modules(originals)
        refuse_without_twins(originals)
        self.is_of_pipeline = is_pipeline(target)
        self._budget, self._device = budget, device
        self._model = type(target).__name__ if self.is_of_pipeline or isinstance(target, nn.Module) else "modules"
        self._machine, self._ranks = Machine.of(device).times(ranks), ranks
        self._twins = Twins(target, ranks=ranks)
        self._ways, missing = ways_to_store(budget.allow)
        ties = tied_components(originals)
        self._may_be_narrow = self._twins.components.keys() - ties.keys() - set(ties.values())
        self._notes = (*(f"{name} shares weights with {first}" for name, first in ties.items()), *missing)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the components."""
        return tuple(self._twins.components)

    def renewed(self, target: Any) -> Planner:
        """Return one for `target` as it is now, under the same budget."""
        return Planner(target, self._budget, self._device, ranks=self._ranks)

    def keep_free(self, size_bytes: int, *, note: str) -> None:
        """Leave at least so much of the budget to what no plan knows of; `note` stands in the plans to come."""
        self._machine = dataclasses.replace(self._machine, margin_bytes=max(self._machine.margin_bytes, size_bytes))
        self._notes = (*self._notes, note)

    def plan(self, call: PlannedCall | None, narrow: Mapping[str, str] = _NOTHING) -> Plan:
        """Return the fastest plan under the budget for `call`; None plans for one that nobody knows yet.

        Where results may be less than exact, weights are stored in less only as far as that makes a plan possible, or saves
        a twentieth of its time. Components in `narrow` are stored so already (name of the way): they become no wider.

        Raises:
            PlanInfeasible: nothing fits.
            ConfigError: the call cannot be made, or the budget is above the card.
        """
        tried: list[Variant] = []
        call_notes: list[str] = []
        exact, failures = None, []
        for variants in self._attempts(call, call_notes):
            tried += variants
            try:
                exact = self._search(variants, {}, call, call_notes)
                break
            except PlanInfeasible as error:
                failures.append(error)
                if not error.binds.startswith("the denoise"):
                    break
        begun = {
            name: STORED[way] for name, way in narrow.items() if self._twins.profile(name, STORED[way]) is not None
        }
        chosen = self._narrowing(tried, begun) if self._ways else {}
        if chosen:
            try:
                lesser = self._search(tried, chosen, call, call_notes)
                if exact is None or narrow or lesser.seconds <= exact.seconds * _WORTH_IT:
                    return lesser
            except PlanInfeasible as error:
                failures.append(error)
                exact = None if narrow else exact
        if exact is None:
            raise min(failures, key=lambda each: each.nearest_bytes) from None
        return exact

    def activation_bytes(self, name: str, call: PlannedCall, plan: Plan) -> int:
        """Return what `call` of a component needs beside its weights, set as `plan` says; 0 where nobody can tell."""
        try:
            needed = self._twins.activation_bytes(name, call, Settings.of(plan), self._device)
        except VramkitError:
            raise
        except (RuntimeError, NotImplementedError):
            return 0
        way = STORED.get(plan.component(name).wire_dtype)
        return needed + (0 if way is None else self._twins.widest_bytes(name, way))

    def _attempts(self, call: PlannedCall | None, notes: list[str]) -> Iterator[list[Variant]]:
        """Yield the ways to make the call, and then those that take less in the transformer; add notes to `notes`."""
        if call is None:
            notes.append("the call is not known yet: half of the budget is kept for it until it comes")
            yield [self._unknown()]
            return
        try:
            variants = self._told_apart(call, chunk_tokens=None)
        except VramkitError:
            raise
        except (RuntimeError, NotImplementedError) as error:  # an operator that does nothing without memory
            reason = " ".join(str(error).split())[:200]
            notes.append(f"the call cannot be rehearsed ({reason}): half of the budget is kept for it")
            yield [self._unknown()]
            return
        yield variants
        for tokens in self._twins.features.smaller_chunks():
            yield self._told_apart(call, chunk_tokens=tokens)

    def _told_apart(self, call: PlannedCall, *, chunk_tokens: int | None) -> list[Variant]:
        """Rehearse the call in the ways that differ in what they take, until no other one can be faster."""
        variants = []
        ways = self._twins.rehearsed(
            call, chunk_tokens=chunk_tokens, device=self._device, suffices=lambda way: self._fits(self._spared(way))
        )
        for variant in map(self._spared, ways):
            variants.append(variant)
            if self._is_best(variant):
                break
        return variants

    def _spared(self, variant: Variant) -> Variant:
        return variant.spared(self._machine.holes_share)

    def _fits(self, variant: Variant) -> bool:
        """Whether there is a plan under this budget with weights as they are stored."""
        return least_budget(self._profile([variant], {}), self._machine) <= self._budget.vram_bytes

    def _is_best(self, variant: Variant) -> bool:
        """Whether what is computed takes nearly all of the time under this budget."""
        compute_s = self._machine.compute_seconds(sum(work.flops for work in variant.works))
        seconds, _ = estimate(self._profile([variant], {}), self._machine, self._budget.vram_bytes)
        return seconds <= compute_s * _NEARLY

    def _narrowing(self, variants: Sequence[Variant], chosen: dict[str, Stored]) -> dict[str, Stored]:
        """Choose what is stored in less, and how: again and again the widest way of those that come near to the best."""
        cost = self._cost(variants, chosen)
        while True:
            tries = [
                (self._cost(variants, {**chosen, name: way}), rank, {**chosen, name: way})
                for name in sorted(self._may_be_narrow)
                for rank, way in enumerate(self._ways)
                if self._may_become(name, way, chosen.get(name))
            ]
            best = min((tried for tried, _, _ in tries), default=cost)
            if not _is_better(best, cost, _WORTH_IT):
                return chosen
            near = [each for each in tries if not _is_better(best, each[0], 1 / _NEARLY)]
            cost, _, chosen = min(near, key=lambda each: each[1])

    def _may_become(self, name: str, way: Stored, now: Stored | None) -> bool:
        is_narrower = now is None or self._ways.index(way) > self._ways.index(now)
        return is_narrower and self._twins.profile(name, way) is not None

    def _cost(self, variants: Sequence[Variant], chosen: Mapping[str, Stored]) -> tuple[int, float]:
        """Return what a plan would cost: bytes above the budget, and then seconds."""
        seconds, floor_bytes = estimate(self._profile(variants, chosen), self._machine, self._budget.vram_bytes)
        return max(0, floor_bytes - self._budget.vram_bytes), seconds

    def _profile(self, variants: Sequence[Variant], chosen: Mapping[str, Stored], **told: Any) -> Profile:
        """Return what a search needs, with components stored as `chosen`.

        A call of narrow weights computes what that of wide ones does, and makes a wide copy of a weight while it is used.
        """
        profiles = [self._twins.profile(name, chosen.get(name)) for name in self.names]
        more = {name: self._twins.widest_bytes(name, way) for name, way in chosen.items()}
        return Profile(
            model=self._model,
            call=told.get("call", {}),
            components=tuple(profile for profile in profiles if profile is not None),
            variants=tuple(variant.with_more(more) for variant in variants),
            notes=told.get("notes", ()),
        )

    def _search(
        self, variants: Sequence[Variant], chosen: Mapping[str, Stored], call: PlannedCall | None, notes: Sequence[str]
    ) -> Plan:
        described = {} if call is None else call.described()
        return search(
            self._profile(variants, chosen, call=described, notes=(*self._notes, *notes)),
            self._machine,
            self._budget.vram_bytes,
            ram_bytes=self._budget.ram_bytes,
            allow=self._budget.allow,
        )

    def _unknown(self) -> Variant:
        """A call that takes half of the budget, or as much as weights do where these do not fit the other half.

        So a refusal names the budget of which half is enough for them.
        """
        half = self._budget.vram_bytes // 2
        works = [
            Work(
                phase=each.phase,
                component=each.name,
                activation_bytes=max(half, least_bytes(each) + self._machine.margin_bytes),
                calls=1,
                flops=0,
                turns=1,
            )
            for each in self._profile((), {}).components
        ]
        return Variant(settings=Settings(), works=tuple(works))


def _is_better(cost: tuple[int, float], than: tuple[int, float], share: float) -> bool:
    """Whether a cost is below `share` of another one: in bytes above the budget as long as those are, then in seconds."""
    if than[0]:
        return cost[0] < than[0] * share
    return not cost[0] and cost[1] < than[1] * share


def _size(option: str, given: int | str) -> int:
    try:
        size_bytes = parse_bytes(given)
    except ConfigError as error:
        raise ConfigError(f"{option}={given!r}: {error}") from error
    if not size_bytes:
        raise ConfigError(f'{option}={given!r}; expected more than nothing, such as "6GiB"')
    bare = str(given).strip()
    if bare.replace(".", "", 1).isdigit() and size_bytes < (_FEW_BYTES if isinstance(given, int) else MIB):
        unit = "GiB" if size_bytes < _FEW_BYTES else "MiB"
        raise ConfigError(f'{option}={given!r} is {format_bytes(size_bytes)}; did you mean "{bare}{unit}"?')
    return size_bytes
