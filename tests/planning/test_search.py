"""The search is pure: profiles made by hand, and plans to be expected of them."""

from __future__ import annotations

import dataclasses
import re

import pytest
from profiles import BLOCK, BLOCKS, MACHINE, component, profile, work

from vramkit.errors import ConfigError, PlanInfeasible
from vramkit.memory import GIB, MIB
from vramkit.planning.explain import explain
from vramkit.planning.features import Settings
from vramkit.planning.holes import Room
from vramkit.planning.plans import Decode, Plan
from vramkit.planning.profile import Variant
from vramkit.planning.search import search


@pytest.mark.parametrize("vram_gib", [2.3, 2.5, 3, 4, 5, 6, 7, 12])
def test_plans_stay_under_the_budget_and_use_it(vram_gib: float) -> None:
    vram = int(vram_gib * GIB)
    plan = search(profile(), MACHINE, vram)
    assert plan.peak_bytes <= vram
    steps = plan.component("transformer")
    assert (steps.streamed_bytes == 0) == (vram_gib >= 5)
    if steps.streamed_bytes:  # what is left is less than a block
        assert 0 <= vram - steps.device_bytes - GIB <= BLOCK
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("vram_gib", [2.5, 3.13, 3.9, 4.55])
def test_what_stays_of_blocks_is_what_does_not_travel(vram_gib: float) -> None:
    steps = search(profile(flops=1e17), MACHINE, int(vram_gib * GIB)).component("transformer")
    assert steps.granularity == "block_level"
    assert 0 < steps.chosen_bytes == BLOCKS * BLOCK - steps.streamed_bytes


def test_more_memory_is_never_slower() -> None:
    seconds = [search(profile(flops=5e14), MACHINE, int(gib * GIB)).seconds for gib in (2.3, 2.6, 3, 4, 5, 6, 8)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(5 + 0.01)  # all of it stays: what is computed
    link = 50 * BLOCKS * BLOCK / 10e9
    assert link * 0.6 <= seconds[0] <= link * 0.8  # a fourth of it stays


def test_ties_go_to_the_simpler() -> None:
    plan = search(profile(flops=1e17), MACHINE, 4 * GIB)  # computing takes longer than everything else
    assert plan.component("transformer").granularity == "block_level"
    assert plan.component("transformer").slots == 2
    assert plan.phases[0].binds == "compute"
    assert search(profile(), MACHINE, 3 * GIB).phases[0].binds == "link"


def test_the_decode_that_fits_is_taken_the_whole_one_if_it_does() -> None:
    decodes = ((Decode(), 6 * GIB), (Decode(mode="stripes", count=2), 3 * GIB), (Decode(mode="tiles"), GIB))
    assert search(profile(decodes=decodes, flops=1e17), MACHINE, 8 * GIB).decode == Decode()
    assert search(profile(decodes=decodes, flops=1e17), MACHINE, 4 * GIB).decode == Decode(mode="stripes", count=2)
    tiled = search(profile(decodes=decodes), MACHINE, 2 * GIB)
    assert tiled.decode == Decode(mode="tiles")
    assert any("enable_tiling" in note for note in tiled.notes)


def test_the_nearest_budget_that_fits_is_named_and_does() -> None:
    with pytest.raises(PlanInfeasible, match="the decode by vae") as refused:
        search(profile(), MACHINE, GIB)
    assert "2 GiB of activations" in refused.value.binds
    nearest = refused.value.nearest_bytes
    assert search(profile(), MACHINE, nearest).peak_bytes <= nearest
    with pytest.raises(PlanInfeasible) as refused:
        search(profile(), MACHINE, nearest - 1)
    given, _, named = str(refused.value).partition("fits vram=")[2].partition("The nearest budget that fits is ")
    assert given.partition(":")[0] != named.partition(";")[0]


def test_a_budget_above_the_card_is_refused() -> None:
    small = dataclasses.replace(MACHINE, card_bytes=8 * GIB)
    with pytest.raises(ConfigError, match=r"vram=9 GiB was given, but cuda has 8 GiB"):
        search(profile(), small, 9 * GIB)


def test_ample_room_sends_nobody_away_who_need_not_make_room() -> None:
    """Two denoisers that take turns in each step hold all they have, and ample room for holes is what that leaves."""
    holes = Room(needed_bytes=GIB // 16, ample_bytes=GIB)
    works = tuple(
        dataclasses.replace(work("denoise", name, GIB, calls=50), turns=50, holes=holes) for name in ("one", "two")
    )
    both = dataclasses.replace(
        profile(),
        components=(component("one", "denoise", 20), component("two", "denoise", 20)),
        variants=(Variant(settings=Settings(), works=works),),
    )
    for gib in (1.6, 2, 2.6, 3, 4, 5.2, 8):
        found = search(both, MACHINE, int(gib * GIB))
        held = sum(each.device_bytes for each in found.components)
        if held + GIB + holes.needed_bytes <= gib * GIB:
            assert all(held + each.room_bytes <= gib * GIB for each in found.components)
        assert all(each.spare_bytes >= holes.needed_bytes for each in found.components)


def test_what_the_matrix_library_keeps_is_predicted_within_the_margin() -> None:
    bare = dataclasses.replace(MACHINE, margin_bytes=64 * MIB)
    told = dataclasses.replace(bare, workspace_bytes=32 * MIB)
    before, found = (search(profile(flops=5e14), machine, 4 * GIB) for machine in (bare, told))
    assert [phase.peak_bytes + 32 * MIB for phase in before.phases] == [phase.peak_bytes for phase in found.phases]
    assert found.peak_bytes <= 4 * GIB
    assert found.components == before.components


@pytest.mark.parametrize("is_measured", [False, True])
def test_what_the_matrix_library_keeps_is_there_from_the_first_product_on(is_measured: bool) -> None:
    machine = dataclasses.replace(MACHINE, margin_bytes=64 * MIB, is_measured=is_measured)  # measured by a product
    bare, told = (
        search(profile(), each, 4 * GIB) for each in (machine, dataclasses.replace(machine, workspace_bytes=MIB))
    )
    more = [after.peak_bytes - before.peak_bytes for before, after in zip(bare.phases, told.phases, strict=True)]
    assert more == [MIB * is_measured, MIB]


def test_room_is_kept_for_holes_between_activations() -> None:
    spared = dataclasses.replace(profile(), variants=tuple(each.spared(1 / 32) for each in profile().variants))
    assert spared.variants[0].works[0].room_bytes == GIB * 33 // 32
    found = search(spared, MACHINE, 4 * GIB)
    steps = found.component("transformer")
    assert (steps.activation_bytes, steps.spare_bytes) == (GIB, GIB // 8)  # ample
    assert steps.device_bytes + steps.room_bytes <= 4 * GIB
    assert {phase.name: phase.activation_bytes for phase in found.phases} == {"denoise": GIB, "decode": 2 * GIB}
    assert found.floor_bytes == search(profile(), MACHINE, 4 * GIB).floor_bytes + 2 * GIB // 32
    scarce = search(spared, MACHINE, found.floor_bytes)
    assert scarce.component("vae").spare_bytes == 2 * GIB // 32


def test_crowded_activations_are_told_with_the_budget_that_gives_them_room() -> None:
    given = profile(flops=1e14)
    works = [dataclasses.replace(each, holes=Room(128 * MIB, 512 * MIB)) for each in given.variants[0].works]
    crowded = dataclasses.replace(given, variants=(dataclasses.replace(given.variants[0], works=tuple(works)),))
    floor = search(crowded, MACHINE, 8 * GIB).floor_bytes
    (note,) = search(crowded, MACHINE, floor).notes
    assert "beside the activations of vae" in note
    named = re.search(r"vram=([\d.]+) GiB", note)
    assert named is not None
    assert not search(crowded, MACHINE, int(float(named[1]) * GIB)).notes


def test_the_margin_is_kept_free() -> None:
    careful = dataclasses.replace(MACHINE, margin_bytes=512 * MIB)
    plan = search(profile(), careful, 4 * GIB)
    assert plan.peak_bytes <= 4 * GIB - 512 * MIB
    assert plan.floor_bytes == search(profile(), MACHINE, 4 * GIB).floor_bytes + 512 * MIB


def test_host_memory_beyond_its_bound_is_mapped_or_on_disk() -> None:
    everything = search(profile(), MACHINE, 3 * GIB)
    assert everything.component("transformer").store is None
    assert everything.pinned_bytes > 1.5 * GIB
    bounded = search(profile(), MACHINE, 3 * GIB, ram_bytes=GIB)
    assert bounded.component("transformer").store == "mapped"
    assert bounded.pinned_bytes <= GIB
    in_memory = dataclasses.replace(
        profile(),
        components=(component("transformer", "denoise", is_in_files=False), component("vae", "decode", 2)),
    )
    spilled = search(in_memory, MACHINE, 3 * GIB, ram_bytes=GIB)
    assert spilled.component("transformer").store == "disk"
    assert spilled.host_bytes <= GIB


def test_one_more_gib_is_priced() -> None:
    assert search(profile(), MACHINE, 3 * GIB).next_gib.endswith("s")
    assert search(profile(), MACHINE, 20 * GIB).next_gib == "nothing"


@pytest.mark.parametrize(
    ("ranks", "flops", "ram_gib", "shares"),
    [
        (2, 1e15, None, True),  # 5 s of computing, 14 of one link
        (2, 1e16, None, False),  # 50 s
        (8, 1e16, None, True),  # 12.5 s, and memory that eight links may have to wait for
        (8, 1e17, None, False),
        (2, 1e16, 1, True),  # read from files
        (1, 1e16, None, False),
    ],
)
def test_ranks_share_the_reading_where_it_is_what_takes_the_time(
    ranks: int, flops: float, ram_gib: int | None, shares: bool
) -> None:
    ram_bytes = None if ram_gib is None else ram_gib * GIB
    plan = search(profile(flops=flops), MACHINE.times(ranks), 3 * GIB, ram_bytes=ram_bytes)
    steps = plan.component("transformer")
    assert steps.streamed_bytes
    assert steps.shares == shares
    told = "; ranks share the reading" if shares else "; each rank reads all" if ranks > 1 else ""
    assert steps.reason.partition(";")[1:] == tuple(told.partition(";")[1:])
    assert steps.reason in explain(plan)
    assert not plan.component("vae").shares
    assert Plan.from_json(plan.to_json()) == plan
