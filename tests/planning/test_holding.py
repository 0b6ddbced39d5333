"""What a plan says that a phase takes is what is alive in it, not what the budget would allow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from families import FAMILIES, Stock, models_of
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from vramkit import fit, plan
from vramkit.memory import GIB, MIB
from vramkit.planning.holding import Holding, phase_peaks
from vramkit.planning.profile import Work


def work(phase: str, name: str, activations_mib: int, *, turns: int = 1) -> Work:
    return Work(phase=phase, component=name, activation_bytes=activations_mib * MIB, calls=1, flops=0, turns=turns)


def peaks(budget_mib: int, works: list[Work], **held_mib: tuple[int, int]) -> dict[str, float]:
    """The peaks in MiB, if components hold slots and residents of so many MiB."""
    holdings = {name: Holding(slots * MIB, residents * MIB) for name, (slots, residents) in held_mib.items()}
    return {phase: size / MIB for phase, size in phase_peaks(holdings, works, budget_mib * MIB).items()}


def test_what_fits_together_stays_and_counts_in_every_phase() -> None:
    works = [work("encode", "text", 1), work("denoise", "steps", 20), work("decode", "vae", 30)]
    found = peaks(1000, works, text=(0, 100), steps=(10, 200), vae=(5, 7))
    assert found == {"encode": 323, "denoise": 342, "decode": 352}


def test_slots_of_idle_ones_go_first_and_what_stays_only_if_it_must() -> None:
    works = [work("denoise", "steps", 20), work("decode", "vae", 70)]
    assert peaks(140, works, steps=(40, 30), vae=(0, 20))["decode"] == 120  # less than is allowed: slots go as a whole
    assert peaks(115, works, steps=(40, 30), vae=(0, 20))["decode"] == 90


def test_those_that_alternate_leave_one_another_what_there_is_room_for() -> None:
    works = [work("denoise", "one", 10, turns=4), work("denoise", "two", 10, turns=4)]
    assert peaks(75, works, one=(20, 30), two=(20, 30)) == {"denoise": 60}  # each finds what stays of the other gone
    assert peaks(95, works, one=(20, 30), two=(20, 30)) == {"denoise": 90}  # only its slots
    assert peaks(200, works, one=(20, 30), two=(20, 30)) == {"denoise": 110}


def test_what_is_held_makes_room_for_what_a_pipeline_does_before_its_components() -> None:
    works = [work("encode", "", 40), work("encode", "text", 5), work("denoise", "steps", 20)]
    found = peaks(100, works, text=(30, 5), steps=(20, 30))
    assert found["encode"] == 95  # it would be 125 if all stayed
    assert max(found.values()) <= 100


@pytest.mark.parametrize(
    ("family", "share"), [("Wan2.1", 1.01), ("Wan2.1", 1.2), ("LTX-Video", 1.5), ("HunyuanVideo", 1.2)]
)
@pytest.mark.filterwarnings("ignore:a whole decode does not fit")
def test_the_peaks_of_a_clip_are_those_that_are_predicted(family: str, share: float, stock: Stock) -> None:
    pipeline = stock.pipeline(family)
    call = {"prompt": "a cat", "output_type": "pt", "num_inference_steps": 2, **FAMILIES[family].clip}
    budget = int(plan(pipeline, GIB, device="cpu", **call).floor_bytes * share)
    owner = {part: name for name, model in models_of(pipeline).items() for part in model.modules()}
    held = Counter[str]()  # the most that all hold while a component runs

    def look(part: nn.Module, _given: Any) -> None:
        if part in owner:
            now = sum(offload.held_bytes for offload in fitted.offloads.values())
            held[owner[part]] = max(held[owner[part]], now)

    with fit(pipeline, budget, device="cpu", **call) as fitted:
        hook = register_module_forward_pre_hook(look)
        try:
            for _ in range(2):
                pipeline(**call)
        finally:
            hook.remove()
        by_name = {each.name: each for each in fitted.plan.components}
        coarse = sum(max(each.slot_bytes, each.device_bytes // 20) for each in by_name.values())  # units of tiny models
        for phase in fitted.plan.phases:
            real = max(held[name] + by_name[name].activation_bytes for name in phase.components)
            assert real <= phase.peak_bytes <= min(budget, real + coarse)
