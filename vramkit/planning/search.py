"""From what a call needs and a budget to a plan. Pure: nothing is measured or changed here.

A phase takes ``activations + what stays of its weights + slots`` of memory, and ``max(compute, streamed bytes / link)`` of
time. Among the plans under the budget the fastest is taken, and the simplest of those that are about as fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from vramkit.errors import ConfigError, PlanInfeasible
from vramkit.memory import GIB, format_apart, format_bytes, format_enough
from vramkit.planning.components import PHASES
from vramkit.planning.dealing import Choice, Dealer, ample_room, fit_together, most_room, seconds_of, simplest
from vramkit.planning.holding import Holding, phase_peaks, room_before
from vramkit.planning.machine import Machine
from vramkit.planning.narrowing import STORED
from vramkit.planning.plans import Allowed, ComponentPlan, PhasePlan, Plan
from vramkit.planning.profile import Profile, Variant, Work, order_of
from vramkit.planning.ranks import read_by_ranks

__all__ = ["estimate", "least_budget", "search"]


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
        card, given = format_apart(machine.card_bytes, vram_bytes)
        raise ConfigError(f"vram={given} was given, but {machine.device} has {card}")
    budget_bytes = vram_bytes - machine.margin_bytes
    found: list[tuple[float, Variant, dict[str, Choice]]] = []
    for variant in profile.variants:
        dealer = Dealer(profile.components, variant, machine)
        choices = dealer.choose(budget_bytes)
        if choices is not None:
            found.append((dealer.seconds(choices, budget_bytes), variant, choices))
    floor_bytes, binds = _floor(profile, machine)
    if not found:
        given, nearest = format_apart(vram_bytes, floor_bytes)
        raise PlanInfeasible(
            f"no plan of {profile.model} fits vram={given}: {binds}. The nearest budget that fits is "
            f"{nearest}; a smaller call (picture, frames, tokens, batch) needs less",
            nearest_bytes=floor_bytes,
            binds=binds,
        )
    _, variant, choices = simplest(found, [seconds for seconds, _, _ in found])
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
    notes = (*plan.notes, *_notes(plan), *_crowded(plan, variant.works))
    return dataclasses.replace(plan, next_gib=_next_gib(profile, machine, plan), notes=notes)


def estimate(profile: Profile, machine: Machine, vram_bytes: int) -> tuple[float, int]:
    """Return the seconds of the fastest plan under `vram_bytes` (infinite where none fits), and the smallest budget."""
    budget_bytes, fastest = vram_bytes - machine.margin_bytes, math.inf
    for variant in profile.variants:
        dealer = Dealer(profile.components, variant, machine)
        choices = dealer.choose(budget_bytes)
        if choices is not None:
            fastest = min(fastest, dealer.seconds(choices, budget_bytes))
    return fastest, least_budget(profile, machine)


def least_budget(profile: Profile, machine: Machine) -> int:
    """Return the smallest budget that fits."""
    return _floor(profile, machine)[0]


def _floor(profile: Profile, machine: Machine) -> tuple[int, str]:
    """Return the smallest budget that fits, and what asks for it."""
    least = []
    for variant in profile.variants:
        size_bytes, work = Dealer(profile.components, variant, machine).least()
        least.append((size_bytes, work, variant))
    size_bytes, work, variant = min(least, key=lambda each: each[0])  # the simplest of those that are alike
    weights = size_bytes - work.room_bytes
    how = f" ({variant.settings.decode})" if work.phase == "decode" and variant.settings.decode is not None else ""
    binds = (
        f"the {work.phase} by {work.component or 'the pipeline'}{how} takes {format_bytes(work.activation_bytes)} of "
        f"activations beside the {format_bytes(weights)} that it holds at the least"
    )
    return size_bytes + machine.margin_bytes, binds


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


def _crowded(plan: Plan, works: Sequence[Work]) -> Iterator[str]:
    """Say whose activations lie so close that the allocator has to make room between them."""
    for each in plan.components:
        ours = [work for work in works if work.component == each.name]
        missing = ample_room(ours) - each.activation_bytes - each.spare_bytes
        if missing > 0:
            yield (
                f"{format_bytes(each.spare_bytes)} are free beside the activations of {each.name}: torch's allocator gives "
                f"memory back and takes it again where it finds no hole, which takes time; it need not with "
                f"vram={format_enough(plan.vram_bytes + missing)}"
            )


def _next_gib(profile: Profile, machine: Machine, plan: Plan) -> str:
    """Say what one more GiB would buy."""
    best = plan.seconds
    for variant in profile.variants:
        dealer = Dealer(profile.components, variant, machine)
        more = dealer.choose(plan.vram_bytes + GIB - machine.margin_bytes)
        if more is not None:
            best = min(best, dealer.seconds(more, plan.vram_bytes + GIB - machine.margin_bytes))
    saved = plan.seconds - best
    if saved < plan.seconds * 0.005:
        return "nothing"
    return f"{saved:.3g} s of {plan.seconds:.3g} s"


def _phases(
    works: Sequence[Work], choices: Mapping[str, Choice], machine: Machine, budget_bytes: int
) -> Iterator[PhasePlan]:
    reloads = not fit_together(choices, works, budget_bytes)
    held = {
        name: Holding(each.device_bytes - each.resident_bytes, each.resident_bytes) for name, each in choices.items()
    }
    peaks = phase_peaks(held, works, budget_bytes)
    multiplied = machine.is_measured  # by a product
    for phase in PHASES:
        ours = [work for work in works if work.phase == phase]
        if not ours:
            continue
        multiplied |= any(work.flops for work in ours)
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
            peak_bytes=peaks[phase] + machine.workspace_bytes * multiplied,
            seconds=seconds_of(choices, ours, machine, reloads=reloads),
            binds="link" if link > compute else "compute",
        )


def _stored(
    choices: Mapping[str, Choice],
    works: Sequence[Work],
    ram_bytes: int | None,
    machine: Machine,
    budget_bytes: int,
) -> tuple[ComponentPlan, ...]:
    """Choose where weights rest: page-locked as long as that is allowed, then in their files, then on disk."""
    left = ram_bytes
    together = fit_together(choices, works, budget_bytes)
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
        beside = sum(each.device_bytes for each in choices.values() if each is not choice) if together else 0
        plan = dataclasses.replace(plan, spare_bytes=_spare(plan, ours, budget_bytes - beside))
        plans.append(read_by_ranks(plan, ours, machine))
    by_name = {plan.name: plan for plan in plans}
    return tuple(by_name[name] for name in choices)


def _component(
    choice: Choice, ours: Sequence[Work], store: str | None, pinned_bytes: int, host_bytes: int
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
    """What is kept free beside activations: ample room where the budget has it, else what there has to be.

    `budget_bytes` are what other components leave that need not make room.
    """
    ample = ample_room(ours) - plan.activation_bytes
    needed = most_room(ours) - plan.activation_bytes
    return max(needed, min(ample, budget_bytes - plan.device_bytes - plan.activation_bytes))


def _reason(choice: Choice) -> str:
    if not choice.streamed_bytes:
        return "all of it fits"
    what = "blocks" if choice.cut.granularity == "block_level" else "layers"
    stays = f", {format_bytes(choice.chosen_bytes)} of them stay" if choice.chosen_bytes else ""
    return f"{what} through {choice.slots} {'slot' if choice.slots == 1 else 'slots'}{stays}"
