"""Components on one device take turns: what is idle makes room, partners keep their slots, and no byte changes."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Block, BlockNet, mapped_copy, tokens
from torch import nn

from vramkit.errors import ConfigError
from vramkit.offload import Offload, Turns, apply_group_offloading, offload_of
from vramkit.offload.group import ModuleGroup
from vramkit.offload.ring import SlotRing


class Paper:
    """A component that notes what it is asked."""

    def __init__(self, name: str, turns: Turns, slots: int = 10, resident: int = 0) -> None:
        self.name, self.turns, self.slots, self.resident = name, turns, slots, resident
        self.is_at_rest, self.has_resident, self.is_running = True, False, False
        self.rests = 0
        turns.add(self)
        turns.make_room(self)  # as it is set up
        self.is_at_rest, self.has_resident = False, True

    @property
    def held_bytes(self) -> int:
        return (0 if self.is_at_rest else self.slots) + (self.resident if self.has_resident else 0)

    @property
    def wanted_bytes(self) -> int:
        return self.slots + self.resident

    def rest(self, *, resident: bool) -> int:
        if self.is_running:
            return 0
        before = self.held_bytes
        self.rests += not self.is_at_rest
        self.is_at_rest = True
        self.has_resident &= not resident
        return before - self.held_bytes

    def run(self) -> None:
        self.turns.make_room(self)
        self.turns.begin(self)
        self.is_at_rest, self.has_resident = False, True


def paper(names: str, **options: Any) -> dict[str, Paper]:
    turns = Turns(options.pop("budget", None))
    return {name: Paper(name, turns, **options) for name in names}


def played(members: dict[str, Paper], order: str) -> list[str]:
    """Run passes in `order`; after each, who has slots."""
    held = []
    for name in order:
        members[name].run()
        held.append("".join(each.name for each in members.values() if not each.is_at_rest))
    return held


def test_idle_slots_go_when_another_component_begins() -> None:
    members = paper("etv")
    assert played(members, "eettttttv" * 3) == [*"eettttttv"] * 3


@pytest.mark.parametrize("step", ["ct", "ctt", "cctt", "cttt", "ab", "xyt"])
def test_components_that_alternate_in_every_step_keep_their_slots(step: str) -> None:
    members = paper("".join(sorted(set(step))))
    played(members, step * 3)
    before = sum(member.rests for member in members.values())
    assert before <= 10
    played(members, step * 20)
    assert sum(member.rests for member in members.values()) == before


def test_partners_make_room_for_all_others_and_for_one_another_after_a_while() -> None:
    members = paper("ceft")
    assert played(members, "ef" * 2 + "tc" * 5)[-1] == "ct", "two text encoders that alternated make room for the steps"
    assert played(members, "t" * 20)[-1] == "t"
    assert played(members, "ct")[-1] == "ct"


def test_a_second_transformer_takes_over() -> None:
    members = paper("ab")
    assert played(members, "a" * 20 + "b" * 20 + "a" * 2)[-1] == "a"


def test_what_runs_is_not_taken_from() -> None:
    members = paper("ab")
    members["a"].run()
    members["a"].is_running = True
    assert played(members, "b") == ["ab"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000, ("abc", "abc")),
        (60, ("abc", "abc")),
        (50, ("bc", "abc")),
        (45, ("c", "abc")),
        (30, ("c", "bc")),
        (0, ("c", "c")),
    ],
)
def test_a_budget_takes_slots_first_and_then_weights_that_stay(budget: int, expected: tuple[str, str]) -> None:
    members = paper("abc", budget=budget, slots=10, resident=10)
    held = played(members, "abc")[-1]
    assert (held, "".join(m.name for m in members.values() if m.has_resident)) == expected


def test_activations_are_left_free_and_budgets_of_nonsense_refused() -> None:
    members = paper("ab", budget=40, slots=20)
    members["a"].turns.add(members["b"], activation_bytes=5)
    assert played(members, "ab") == ["ab", "b"]
    assert played(members, "a") == ["ab"], "a needs no activations, so both fit"
    with pytest.raises(ConfigError, match="much"):
        Turns("much")
    with pytest.raises(ConfigError, match="activation_bytes=-1"):
        members["a"].turns.add(members["b"], activation_bytes=-1)


# --- with modules


class Trio:
    """Three models of different sizes that were offloaded by three plain calls."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.models = {name: BlockNet(blocks).eval() for name, blocks in (("text", 6), ("dit", 8), ("vae", 6))}
        self.modules = {name: mapped_copy(model, folder) for name, model in self.models.items()}
        self.offloads = {
            name: apply_group_offloading(module, "cpu", **options) for name, module in self.modules.items()
        }

    def run(self, name: str) -> None:
        x = tokens(8)
        with torch.no_grad():
            assert torch.equal(self.modules[name](x), self.models[name](x))

    def awake(self) -> list[str]:
        return [name for name, offload in self.offloads.items() if not offload.is_at_rest]

    def remove(self) -> None:
        for offload in self.offloads.values():
            offload.remove()


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_components_of_plain_calls_take_turns(level: str, tmp_path: Path) -> None:
    trio = Trio(tmp_path, offload_type=level, num_blocks_per_group=2 if level == "block_level" else None, slots=2)
    assert trio.awake() == ["vae"], "while they are set up, too"
    held = [offload.held_bytes for offload in trio.offloads.values()]
    for name in ("text", "text", *["dit"] * 6, "vae", "text", *["dit"] * 6, "vae"):
        trio.run(name)
        assert trio.awake() == [name]
        slots = {each: offload.stats().slots * offload.stats().slot_bytes for each, offload in trio.offloads.items()}
        assert sum(slots[each] for each in trio.awake()) == slots[name] > 0
    assert held[2] > trio.offloads["vae"].stats().resident_bytes
    assert trio.offloads["dit"].stats().demand_loads <= 6, (
        "of 12 passes only the two first ones begin with nothing loaded"
    )
    trio.remove()


def test_whole_components_and_those_that_stay_take_turns_as_far_as_they_need_room(tmp_path: Path) -> None:
    trio = Trio(tmp_path)
    trio.offloads["text"].remove()
    trio.offloads["text"] = apply_group_offloading(trio.modules["text"], "cpu", offload_type="model_level")
    trio.run("dit")
    trio.run("text")
    assert trio.awake() == []
    trio.offloads["vae"].adapt(resident="1 MB")  # all of it
    trio.run("dit")
    trio.run("vae")
    assert trio.awake() == ["dit", "vae"]
    assert trio.offloads["vae"].stats().slots == 0
    trio.remove()


def test_two_that_alternate_do_not_load_more_than_they_use(tmp_path: Path) -> None:
    trio = Trio(tmp_path)
    for _ in range(3):
        trio.run("vae")
        trio.run("dit")
    dropped = trio.offloads["dit"].stats().dropped_loads, trio.offloads["vae"].stats().dropped_loads
    for _ in range(4):
        trio.run("vae")
        trio.run("dit")
    assert trio.awake() == ["dit", "vae"]
    assert dropped == (trio.offloads["dit"].stats().dropped_loads, trio.offloads["vae"].stats().dropped_loads)
    trio.remove()


def test_models_in_two_threads_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    trio = Trio(tmp_path)
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(15):
                trio.run(name)
        except BaseException as error:  # noqa: BLE001 (shown in the main thread)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in trio.modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    trio.remove()


def test_a_nested_component_leaves_the_outer_one_alone(tmp_path: Path) -> None:
    inner, model = BlockNet(4).eval(), BlockNet(6).eval()
    streamed = mapped_copy(inner, tmp_path)

    class Outer(BlockNet):
        def forward(self, x: torch.Tensor, net: nn.Module) -> torch.Tensor:
            x = self.embed(x)
            for at, block in enumerate(self.blocks):
                x = block(x)
                if at == 3:
                    x = x + net(x[..., :8]).mean()
            return self.head(x)

    model.__class__ = Outer
    module = mapped_copy(model, tmp_path)
    offloads = [apply_group_offloading(each, "cpu") for each in (streamed, module)]
    with torch.no_grad():
        for _ in range(3):
            x = tokens(8)
            assert torch.equal(module(x, streamed), model(x, inner))
    for offload in offloads:
        offload.remove()


def test_a_shared_budget_decides_about_weights_that_stay(tmp_path: Path) -> None:
    model = BlockNet(8).eval()
    first, second = mapped_copy(model, tmp_path), mapped_copy(model, tmp_path)
    turns = Turns()
    offloads = [apply_group_offloading(each, "cpu", resident="100 kB", turns=turns) for each in (first, second)]
    whole = offloads[0].wanted_bytes
    assert all(offload.held_bytes <= whole for offload in offloads)
    x = tokens(8)
    with torch.no_grad():
        expected = model(x)
        for budget, both in ((2 * whole, True), (whole, False), (2 * whole, True)):
            turns.budget_bytes = budget
            for module in (first, second, first, second):
                assert torch.equal(module(x), expected)
                assert sum(offload.held_bytes for offload in offloads) <= budget
            assert (offloads[0].held_bytes == whole) == both
    assert not any(offload.stats().returned_bytes for offload in offloads)
    for offload in offloads:
        offload.remove()


# --- rest


def device_memory(offload: Offload) -> list[weakref.ref[Any]]:
    engine: Any = offload._engine
    placed = [resident.on_device for resident in engine.assembly.residents if not resident.is_buffer]
    return [weakref.ref(engine.ring._memory), *map(weakref.ref, placed)]


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
@pytest.mark.parametrize("place", ["ram", "file"])
def test_at_rest_nothing_is_on_the_device_and_the_next_pass_is_the_same(place: str, level: str, tmp_path: Path) -> None:
    model = BlockNet(6).eval()
    module = mapped_copy(model, tmp_path) if place == "file" else copy.deepcopy(model)
    offload = apply_group_offloading(module, "cpu", offload_type=level, resident="60 kB")
    x = tokens(8)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            assert torch.equal(module(x), expected)
    memory = device_memory(offload)
    held = offload.held_bytes
    assert offload.rest() == held
    assert not [ref for ref in memory if ref() is not None]
    assert (offload.held_bytes, offload.is_at_rest, offload.rest()) == (0, True, 0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(values, model.state_dict()[name]) for name, values in module.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), model.parameters(), strict=True))
    loads = offload.stats().demand_loads
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    assert offload.held_bytes == held
    if level != "model_level":
        assert offload.stats().demand_loads == loads, "what is expected is loaded when the pass begins"
    assert offload.stats().returned_bytes == 0
    offload.remove()


@pytest.mark.parametrize("place", ["ram", "file"])
def test_what_is_written_to_a_weight_that_stays_is_kept_over_a_rest(place: str, tmp_path: Path) -> None:
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    module = mapped_copy(model, tmp_path) if place == "file" else copy.deepcopy(model)
    offload = apply_group_offloading(module, "cpu", resident="1 MB")
    x = tokens(48)
    with torch.no_grad():
        for net in (module, model):
            net[1].up.weight.mul_(-1)  # on the device
        assert torch.equal(module(x), model(x))
        offload.rest()
        for net in (module, model):
            net[1].up.weight.add_(1)  # at rest
        assert torch.equal(module(x), model(x))
    offload.remove()
    assert torch.equal(module[1].up.weight, model[1].up.weight)


def test_a_view_that_somebody_keeps_outlives_a_rest(tmp_path: Path) -> None:
    class Keeper(BlockNet):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return super().forward(x), self.blocks[2].up.weight.detach()[3:]

    model = Keeper(6).eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu")
    with torch.no_grad():
        x = tokens(8)
        result, kept = module(x)
        values = kept.clone()
        offload.rest()
        for _ in range(3):
            again, other = module(x)
            assert torch.equal(result, again)
            assert torch.equal(other, values)
        assert torch.equal(kept, values)
    assert offload.stats().kept_bytes > 0
    offload.remove()


def test_no_copy_is_under_way_when_slots_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mapped_copy(BlockNet(8).eval(), tmp_path)
    running, begun = [0], [0]
    fill, close = ModuleGroup.fill, SlotRing.close

    def slow(self: ModuleGroup, memory: torch.Tensor) -> Any:
        begun[0] += 1
        running[0] += 1
        time.sleep(0.02)
        arrivals = fill(self, memory)
        running[0] -= 1
        return arrivals

    seen: list[int] = []

    def closing(self: SlotRing) -> None:
        seen.append(running[0])
        close(self)

    monkeypatch.setattr(ModuleGroup, "fill", slow)
    monkeypatch.setattr(SlotRing, "close", closing)
    offload = apply_group_offloading(module, "cpu", slots=4)
    offload.rest()
    assert seen == [0]
    assert begun[0] < 4, "what had not begun is not copied any more"
    offload.remove()


def test_what_runs_does_not_rest_and_what_was_torn_off_does(tmp_path: Path) -> None:
    class Probe(BlockNet):
        probe: Callable[[], None] | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](self.embed(x))
            if self.probe is not None:
                self.probe()
            return super().forward(tokens(8))

    module = mapped_copy(Probe().eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu")
    answers: list[int] = []

    def ask() -> None:
        answers.append(offload.rest())
        thread = threading.Thread(target=lambda: answers.append(offload.rest()))
        thread.start()
        thread.join()

    def tear() -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        module.probe = ask
        module(tokens(8))
        assert answers == [0, 0]
        module.probe = tear
        with pytest.raises(KeyboardInterrupt):
            module(tokens(8))
        assert offload.rest() > 0
        assert module.blocks[0].up.weight is dict(module.named_parameters())["blocks.0.up.weight"]
        module.probe = None
        assert module(tokens(8)).isfinite().all()
    offload.remove()


def test_turns_forget_what_is_gone(tmp_path: Path) -> None:
    turns = Turns()
    offload = apply_group_offloading(mapped_copy(BlockNet().eval(), tmp_path), "cpu", turns=turns)
    assert len(turns._seats) == 1
    offload.remove()
    assert len(turns._seats) == 0
    module = mapped_copy(BlockNet().eval(), tmp_path)
    apply_group_offloading(module, "cpu", turns=turns)
    del module, offload
    for _ in range(100):  # a load that is under way refers to its module
        gc.collect()
        if not turns._seats:
            break
        time.sleep(0.02)
    assert len(turns._seats) == 0


def test_the_same_options_with_other_turns_change_the_turns(tmp_path: Path) -> None:
    module = mapped_copy(BlockNet().eval(), tmp_path)
    first, second = Turns(), Turns(10)
    offload = apply_group_offloading(module, "cpu", turns=first)
    assert apply_group_offloading(module, "cpu", turns=second) is offload is offload_of(module)
    assert (len(first._seats), len(second._seats)) == (0, 1)
    assert list(itertools.islice(second._seats, 1)) == [offload]
    offload.remove()


def test_nonsense_changes_no_turns() -> None:
    module, turns = BlockNet().eval(), Turns()
    with pytest.raises(ConfigError, match="turns='mine'"):
        apply_group_offloading(module, "cpu", turns="mine")  # type: ignore[arg-type]
    offload = apply_group_offloading(module, "cpu", turns=turns)
    with pytest.raises(ConfigError, match="turns='mine'"):
        offload.join("mine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="activation_bytes=-3"):
        offload.join(Turns(), activation_bytes=-3)
    assert list(turns._seats) == [offload]
    offload.remove()
