"""A plan as a table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence

from vramkit.memory import format_bytes
from vramkit.planning.plans import ComponentPlan, PhasePlan, Plan

__all__ = ["explain"]


def explain(plan: Plan) -> str:
    """Say what stays, streams and is page-locked, why, and what each phase takes."""
    figures = "measured" if plan.is_measured else "assumed"
    holes = max((each.spare_bytes for each in plan.components), default=0)
    ram = "any" if plan.ram_bytes is None else format_bytes(plan.ram_bytes)
    lines = [
        f"{plan.model} on {plan.device}: {format_bytes(plan.vram_bytes)} on the device, {ram} of host memory, {plan.allow}",
        f"link {plan.link_gbps:.3g} GB/s, {plan.tflops:.3g} TFLOP/s ({figures})",
        "",
        *_table(
            ("component", "weights", "stays", "streams", "slots", "at rest", "page-locked", "in RAM", "stored", "why"),
            [_component(each) for each in plan.components],
        ),
        "",
        *_table(("phase", "by", "activations", "peak", "seconds", "binds"), [_phase(each) for each in plan.phases]),
        "",
        f"peak {format_bytes(plan.peak_bytes)} of {format_bytes(plan.vram_bytes)}"
        + (f", {format_bytes(plan.margin_bytes)} kept for what is no tensor" if plan.margin_bytes else "")
        + (f", {format_bytes(holes)} for holes between tensors" if holes else "")
        + f"; computed in this way it wants {format_bytes(plan.floor_bytes)} at the least",
        f"host memory {format_bytes(plan.host_bytes)}, page-locked up to {format_bytes(plan.pinned_bytes)}",
        f"{_seconds(plan.seconds)} s in all; one more GiB would save {plan.next_gib}",
    ]
    lines += [
        f"{what}: {how}"
        for what, how in (
            ("order", " -> ".join(plan.order)),
            ("guidance", plan.guidance),
            ("tokens at a time", plan.chunk_tokens),
            ("decode", plan.decode),
        )
        if how
    ]
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


def _component(plan: ComponentPlan) -> tuple[str, ...]:
    slots = f"{plan.slots} x {format_bytes(plan.slot_bytes)}" if plan.slots else "-"
    stored = plan.wire_dtype if plan.quality_db is None else f"{plan.wire_dtype} ({plan.quality_db:g} dB)"
    return (
        plan.name,
        format_bytes(plan.weight_bytes),
        format_bytes(plan.resident_bytes),
        format_bytes(plan.streamed_bytes) if plan.streamed_bytes else "-",
        slots,
        plan.store or "by itself",
        format_bytes(plan.pinned_bytes),
        format_bytes(plan.host_bytes),
        stored,
        plan.reason,
    )


def _phase(plan: PhasePlan) -> tuple[str, ...]:
    return (
        plan.name,
        ", ".join(plan.components) or "-",
        format_bytes(plan.activation_bytes),
        format_bytes(plan.peak_bytes),
        _seconds(plan.seconds),
        plan.binds,
    )


def _seconds(seconds: float) -> str:
    """Three digits, and whole seconds from a thousand on: 2800 and not 2.8e+03."""
    return f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out in columns, numbers to the right of their column's beginning."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
