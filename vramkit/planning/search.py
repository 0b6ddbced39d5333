"""From what a call needs and a budget to a plan. Pure: nothing is measured or changed here.

A phase takes ``activations + what stays of its weights + slots`` of memory, and ``max(compute, streamed bytes / link)`` of
time. Among the plans under the budget the fastest is taken, and the simplest of those that are about as fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from vramkit.errors import ConfigError, PlanInfeasible
from vramkit.memory import GIB, format_bytes
from vramkit.planning.components import PHASES
from vramkit.planning.holding import Holding, phase_peaks, room_before
from vramkit.planning.machine import Machine
from vramkit.planning.narrowing import STORED
from vramkit.planning.plans import Allowed, ComponentPlan, PhasePlan, Plan
from vramkit.planning.profile import ComponentProfile, Cut, Profile, Variant, Work, order_of
from vramkit.planning.ranks import read_by_ranks

__all__ = ["estimate", "least_bytes", "search"]

# What a ring loses beside the longer of the two, as a share of the time on the link: computing is a little slower while the
# device is written to, and of layers, which differ, two slots are too few (docs/architecture.md). One slot overlaps nothing.
_OVERLAP: Mapping[tuple[str, int], float] = {
    ("block_level", 2): 0.02,
    ("block_level", 3): 0.02,
    ("leaf_level", 2): 0.08,
    ("leaf_level", 3): 0.02,
}
_SAME = 1.005  # times that are no nearer to each other than this are told apart
_STEPS = 24  # how finely memory is dealt out to what stays


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """One component, cut in one way, with some of its units staying."""

    profile: ComponentProfile
    cut: Cut
    chosen_bytes: int
    resident_bytes: int
    streamed_bytes: int
    slot_bytes: int

    @property
    def slots(self) -> int:
        return self.cut.slots if self.streamed_bytes else 0

    @property
    def device_bytes(self) -> int:
        return self.resident_bytes + self.slots * self.slot_bytes


def search(
    profile: Profile,
    machine: Machine,
    vram_bytes: int,
    *,
    ram_bytes: int | None = None,
    allow: Allowed = "exact",
) -> Plan:
    """Return the fastest plan under `vram_bytes` of device memory.

    Args:
        profile: what the call needs.
        machine: what the device does.
        vram_bytes: the budget.
        ram_bytes: bound on process and page-locked memory; None for none.
        allow: which classes of results.

    Raises:
        PlanInfeasible: nothing fits; names the nearest budget that does and what binds.
        ConfigError: the budget is above the card.
    """
    if machine.card_bytes is not None and vram_bytes > machine.card_bytes:
        raise ConfigError(
            f"vram={format_bytes(vram_bytes)} was given, but {machine.device} has {format_bytes(machine.card_bytes)}"
        )
    budget_bytes = vram_bytes - machine.margin_bytes
    found: list[tuple[float, Variant, dict[str, _Choice]]] = []
    for variant in profile.variants:
        dealer = _Fit(profile.components, variant, machine)
        choices = dealer.choose(budget_bytes)
        if choices is not None:
            found.append((dealer.seconds(choices, budget_bytes), variant, choices))
    floor_bytes, binds = _floor(profile, machine)
    if not found:
        raise PlanInfeasible(
            f"no plan of {profile.model} fits vram={format_bytes(vram_bytes)}: {binds}. The nearest budget that fits is "
            f"{_rounded_up(floor_bytes)}; a smaller picture or fewer frames need less",
            nearest_bytes=floor_bytes,
            binds=binds,
        )
    fastest = min(seconds for seconds, _, _ in found)
    _, variant, choices = next(each for each in found if each[0] <= fastest * _SAME)
    settings = variant.settings
    plan = Plan(
        model=profile.model,
        device=machine.device,
        vram_bytes=vram_bytes,
        ram_bytes=ram_bytes,
        allow=allow,
        call=profile.call,
        components=_stored(choices, variant.works, ram_bytes, machine, budget_bytes),
        phases=tuple(_phases(variant.works, choices, machine, budget_bytes)),
        order=order_of(variant.works),
        before_bytes=room_before(variant.works),
        guidance=settings.guidance,
        chunk_tokens=settings.chunk_tokens,
        decode=settings.decode,
        link_gbps=machine.link_gbps,
        tflops=machine.tflops,
        is_measured=machine.is_measured,
        margin_bytes=machine.margin_bytes,
        floor_bytes=floor_bytes,
        next_gib="",
        notes=profile.notes,
    )
    next_gib = _next_gib(profile, machine, plan)
    return dataclasses.replace(plan, next_gib=next_gib, notes=plan.notes + tuple(_notes(plan)))


def estimate(profile: Profile, machine: Machine, vram_bytes: int) -> tuple[float, int]:
    """Return the seconds of the fastest plan under `vram_bytes` (infinite where none fits), and the smallest budget."""
    budget_bytes, fastest = vram_bytes - machine.margin_bytes, math.inf
    for variant in profile.variants:
        dealer = _Fit(profile.components, variant, machine)
        choices = dealer.choose(budget_bytes)
        if choices is not None:
            fastest = min(fastest, dealer.seconds(choices, budget_bytes))
    return fastest, _floor(profile, machine)[0]


def least_bytes(profile: ComponentProfile) -> int:
    """Return the device memory that a component holds at the least while it runs."""
    return _least(profile).device_bytes


class _Fit:
    """Deals memory out to the components of one variant."""

    def __init__(self, profiles: Sequence[ComponentProfile], variant: Variant, machine: Machine) -> None:
        self._profiles = {profile.name: profile for profile in profiles}
        self._works = variant.works
        self._machine = machine

    def least(self) -> tuple[int, Work]:
        """Return the smallest budget that fits, and the work that needs it."""
        held = {name: least_bytes(profile) for name, profile in self._profiles.items()}
        needs = [(work.room_bytes + held.get(work.component, 0), work) for work in self._works]
        return max(needs, key=lambda need: need[0], default=(max(held.values()), _NOTHING))

    def choose(self, budget_bytes: int) -> dict[str, _Choice] | None:
        """Return the fastest choices under the budget, None where nothing fits."""
        if self.least()[0] > budget_bytes:
            return None
        least = {name: least_bytes(each) for name, each in self._profiles.items()}
        room = budget_bytes - self._machine.slack_bytes
        caps = {name: max(least[name], room - self._ample(name)) for name in self._profiles}
        found = [{name: self._best(each, caps[name], reloads=True) for name, each in self._profiles.items()}]
        most = _most_room(self._works)
        if sum(least.values()) <= budget_bytes - most:
            ample = max([most, *map(self._ample, self._profiles)])
            found.append(self._dealt(max(sum(least.values()), room - ample)))
        return min(found, key=lambda choices: self.seconds(choices, budget_bytes))

    def seconds(self, choices: Mapping[str, _Choice], budget_bytes: int) -> float:
        """Return how long the call takes."""
        reloads = not _fit_together(choices, self._works, budget_bytes)
        return _seconds(choices, self._works, self._machine, reloads=reloads)

    def _dealt(self, shared: int) -> dict[str, _Choice]:
        """Deal bytes out to components that hold them all the time."""
        choices = {name: _least(profile) for name, profile in self._profiles.items()}
        for by_time in (True, False):  # first where it saves time, then wherever there is room
            for name in self._by_value():
                room = shared - sum(choice.device_bytes for other, choice in choices.items() if other != name)
                best = self._best(self._profiles[name], room, reloads=False)
                if not by_time or self._time(best, reloads=False) < self._time(choices[name], reloads=False) / _SAME:
                    choices[name] = best
        return choices

    def _ample(self, name: str) -> int:
        return max((work.ample_bytes for work in self._works if work.component == name), default=0)

    def _by_value(self) -> list[str]:
        """Return the components, those first whose weights are used most often."""
        return sorted(self._profiles, key=lambda name: -sum(w.calls for w in self._works if w.component == name))

    def _best(self, profile: ComponentProfile, cap_bytes: int, *, reloads: bool) -> _Choice:
        candidates = [whole] if (whole := _all_resident(profile)).device_bytes <= cap_bytes else []
        for cut in profile.cuts:
            candidates += _filled(profile, cut, cap_bytes)
        candidates = candidates or [_least(profile)]
        seconds = [self._time(choice, reloads=reloads) for choice in candidates]
        return next(choice for choice, each in zip(candidates, seconds, strict=True) if each <= min(seconds) * _SAME)

    def _time(self, choice: _Choice, *, reloads: bool) -> float:
        works = [work for work in self._works if work.component == choice.profile.name]
        return sum(_work_seconds(choice, work, self._machine, reloads=reloads) for work in works)


_NOTHING = Work(phase="encode", component="", activation_bytes=0, calls=0, flops=0, turns=0)


def _all_resident(profile: ComponentProfile) -> _Choice:
    cut = profile.cuts[0]
    return _placed(profile, cut, sum(cut.sizes))


def _placed(profile: ComponentProfile, cut: Cut, chosen_bytes: int) -> _Choice:
    return _Choice(profile, cut, chosen_bytes, *cut.placed(chosen_bytes))


def _least(profile: ComponentProfile) -> _Choice:
    every = [_all_resident(profile), *(_placed(profile, cut, 0) for cut in profile.cuts)]
    return min(every, key=lambda choice: choice.device_bytes)


def _filled(profile: ComponentProfile, cut: Cut, cap_bytes: int) -> list[_Choice]:
    """Return the choice that uses `cap_bytes` best with this cut: as much of it staying as goes beside the slots."""
    bare = _placed(profile, cut, 0)
    if bare.device_bytes > cap_bytes:
        return []
    low, high, best = 0, sum(cut.sizes), bare
    for _ in range(_STEPS):
        middle = (low + high + 1) // 2
        tried = _placed(profile, cut, middle)
        if tried.device_bytes <= cap_bytes and tried.streamed_bytes:
            low = middle
            best = min(best, tried, key=lambda choice: choice.streamed_bytes)
        else:
            high = middle - 1
    return [best]


def _work_seconds(choice: _Choice | None, work: Work, machine: Machine, *, reloads: bool) -> float:
    compute = machine.compute_seconds(work.flops)
    if choice is not None and reloads:  # what stays comes at the beginning of each turn
        compute += machine.link_seconds(choice.resident_bytes) * work.turns
    if choice is None or not choice.streamed_bytes:
        return compute
    link = machine.link_seconds(choice.streamed_bytes) * work.calls
    if choice.slots == 1:
        return compute + link
    return max(compute, link) + link * _OVERLAP[choice.cut.granularity, choice.slots]


def _seconds(choices: Mapping[str, _Choice], works: Sequence[Work], machine: Machine, *, reloads: bool) -> float:
    return sum(_work_seconds(choices.get(work.component), work, machine, reloads=reloads) for work in works)


def _fit_together(choices: Mapping[str, _Choice], works: Sequence[Work], budget_bytes: int) -> bool:
    """Whether nothing that a component holds need make room for another one."""
    return _most_room(works) + sum(choice.device_bytes for choice in choices.values()) <= budget_bytes


def _most_room(works: Sequence[Work]) -> int:
    """Return what weights leave to any of `works`, at the least."""
    return max((work.room_bytes for work in works), default=0)


def _floor(profile: Profile, machine: Machine) -> tuple[int, str]:
    """Return the smallest budget that fits, and what asks for it."""
    least = []
    for variant in profile.variants:
        size_bytes, work = _Fit(profile.components, variant, machine).least()
        least.append((size_bytes, work, variant))
    size_bytes, work, variant = min(least, key=lambda each: each[0])  # the simplest of those that are alike
    weights = size_bytes - work.room_bytes
    how = f" ({variant.settings.decode})" if work.phase == "decode" and variant.settings.decode is not None else ""
    binds = (
        f"the {work.phase} by {work.component or 'the pipeline'}{how} takes {format_bytes(work.activation_bytes)} of "
        f"activations beside the {format_bytes(weights)} that it holds at the least"
    )
    return size_bytes + machine.margin_bytes, binds


def _rounded_up(size_bytes: int) -> str:
    """Print a size so that what is printed is enough."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit:
            return f"{-(-size_bytes * 100 // unit) / 100:g} {name}"
    return f"{size_bytes} B"


def _notes(plan: Plan) -> Iterator[str]:
    """Say what makes other bytes than a resident run that nothing was chosen for."""
    if plan.decode is not None and plan.decode.mode == "tiles":
        yield "the decode is in tiles: the bytes of a resident run with vae.enable_tiling(), not of a whole decode"
    if plan.decode is not None and plan.decode.mode == "stripes":
        yield f"the decode is in {plan.decode}: the numbers of a whole decode, up to the rounding of kernels of that size"
    if plan.chunk_tokens is not None:
        yield f"the transformer computes {plan.chunk_tokens} tokens at a time, which rounds otherwise"
    for each in plan.components:
        if each.wire_dtype in STORED:
            yield f"{each.name} is stored in {each.wire_dtype}: {STORED[each.wire_dtype].described()}"


def _next_gib(profile: Profile, machine: Machine, plan: Plan) -> str:
    """Say what one more GiB would buy."""
    best = plan.seconds
    for variant in profile.variants:
        dealer = _Fit(profile.components, variant, machine)
        more = dealer.choose(plan.vram_bytes + GIB - machine.margin_bytes)
        if more is not None:
            best = min(best, dealer.seconds(more, plan.vram_bytes + GIB - machine.margin_bytes))
    saved = plan.seconds - best
    if saved < plan.seconds * 0.005:
        return "nothing"
    return f"{saved:.3g} s of {plan.seconds:.3g} s"


def _phases(
    works: Sequence[Work], choices: Mapping[str, _Choice], machine: Machine, budget_bytes: int
) -> Iterator[PhasePlan]:
    reloads = not _fit_together(choices, works, budget_bytes)
    held = {
        name: Holding(each.device_bytes - each.resident_bytes, each.resident_bytes) for name, each in choices.items()
    }
    peaks = phase_peaks(held, works, budget_bytes)
    for phase in PHASES:
        ours = [work for work in works if work.phase == phase]
        if not ours:
            continue

        activations = max(work.activation_bytes for work in ours)
        compute = sum(machine.compute_seconds(work.flops) for work in ours)
        link = sum(
            machine.link_seconds(choices[work.component].streamed_bytes) * work.calls
            for work in ours
            if work.component in choices
        )
        yield PhasePlan(
            name=phase,
            components=order_of(ours),
            activation_bytes=activations,
            peak_bytes=peaks[phase],
            seconds=_seconds(choices, ours, machine, reloads=reloads),
            binds="link" if link > compute else "compute",
        )


def _stored(
    choices: Mapping[str, _Choice],
    works: Sequence[Work],
    ram_bytes: int | None,
    machine: Machine,
    budget_bytes: int,
) -> tuple[ComponentPlan, ...]:
    """Choose where weights rest: page-locked as long as that is allowed, then in their files, then on disk."""
    left = ram_bytes
    plans = []
    for choice in sorted(choices.values(), key=lambda choice: choice.streamed_bytes):
        at_rest = choice.profile.weight_bytes  # a copy of what is on the device stays in host memory, to be given back
        in_files = choice.profile.is_in_files
        pins = choice.streamed_bytes + choice.cut.table_bytes if machine.device != "cpu" else 0
        store: str | None = None
        host = 0 if in_files else at_rest
        if left is not None and max(host, pins) > left:
            store = ("mapped" if in_files else "disk") if choice.streamed_bytes else None
            host, pins = (0, 0) if store else (host, 0)
        if left is not None:
            left = max(0, left - max(host, pins))
        ours = [work for work in works if work.component == choice.profile.name]
        plan = _component(choice, ours, store, pins, host)
        plan = dataclasses.replace(plan, spare_bytes=_spare(plan, ours, budget_bytes))
        plans.append(read_by_ranks(plan, ours, machine))
    by_name = {plan.name: plan for plan in plans}
    return tuple(by_name[name] for name in choices)


def _component(
    choice: _Choice, ours: Sequence[Work], store: str | None, pinned_bytes: int, host_bytes: int
) -> ComponentPlan:
    profile, cut = choice.profile, choice.cut
    streams = choice.streamed_bytes > 0
    return ComponentPlan(
        name=profile.name,
        phase=profile.phase,
        granularity=cut.granularity if streams else "resident",
        weight_bytes=profile.weight_bytes,
        resident_bytes=choice.resident_bytes,
        chosen_bytes=choice.chosen_bytes,
        streamed_bytes=choice.streamed_bytes,
        slots=choice.slots,
        slot_bytes=choice.slot_bytes if streams else 0,
        unit_bytes=cut.unit_bytes if streams else None,
        activation_bytes=max((work.activation_bytes for work in ours), default=0),
        table_bytes=cut.table_bytes,
        store=store,
        wire_dtype=profile.wire_dtype,
        quality_db=profile.quality_db,
        pinned_bytes=pinned_bytes,
        host_bytes=host_bytes,
        reason=_reason(choice),
    )


def _spare(plan: ComponentPlan, ours: Sequence[Work], budget_bytes: int) -> int:
    """What is kept free beside activations: ample room where the budget has it, else what there has to be."""
    ample = max((work.ample_bytes for work in ours), default=0) - plan.activation_bytes
    needed = _most_room(ours) - plan.activation_bytes
    return max(needed, min(ample, budget_bytes - plan.device_bytes - plan.activation_bytes))


def _reason(choice: _Choice) -> str:
    if not choice.streamed_bytes:
        return "all of it fits"
    what = "blocks" if choice.cut.granularity == "block_level" else "layers"
    stays = f", {format_bytes(choice.chosen_bytes)} of them stay" if choice.chosen_bytes else ""
    return f"{what} through {choice.slots} {'slot' if choice.slots == 1 else 'slots'}{stays}"
