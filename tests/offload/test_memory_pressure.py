"""A device that others use too: with less room there are fewer slots and less that stays, one warning, the same bytes."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, Codec, mapped_copy, tokens
from test_all_or_nothing import each_failure

from vramkit.errors import ConfigError, ConflictError
from vramkit.offload import Offload, apply_group_offloading, config, offload_of
from vramkit.offload.backend import CpuBackend


class Device:
    """Memory that the CPU tier takes for slots and for what stays, with a limit."""

    def __init__(self) -> None:
        self.capacity = 10**12
        self.used = self.peak = 0

    def give_back(self, size_bytes: int) -> None:
        self.used -= size_bytes


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found, memory = Device(), CpuBackend.memory

    def limited(self: CpuBackend, size_bytes: int) -> torch.Tensor:
        if found.used + size_bytes > found.capacity:
            raise torch.OutOfMemoryError(f"tried to allocate {size_bytes}, {found.capacity - found.used} are free")
        made = memory(self, size_bytes)
        found.used += size_bytes
        found.peak = max(found.peak, found.used)
        weakref.finalize(made.untyped_storage(), found.give_back, size_bytes)
        return made

    monkeypatch.setattr(CpuBackend, "memory", limited)
    monkeypatch.setattr(config, "_LEAST_HALVED_BYTES", 30_000)
    gc.collect()
    return found


class Case:
    """A model in a file and its streamed copy."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = BlockNet(8).eval()
        self.module = mapped_copy(self.model, folder)
        self.options = options

    def apply(self) -> Offload:
        return apply_group_offloading(self.module, "cpu", **self.options)

    def check(self, passes: int = 2) -> None:
        with torch.no_grad():
            for _ in range(passes):
                x = tokens(8)
                assert torch.equal(self.module(x), self.model(x))


@contextmanager
def warned(count: int = 1) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    said = [str(each.message) for each in seen]
    assert sum("no room" in each for each in said) == count, said


BLOCK = 40_960  # a slot of a block of BlockNet


@pytest.mark.parametrize(
    ("blocks_of_room", "slots", "resident_below"),
    [(9.5, 4, 5 * BLOCK), (6.5, 2, 5 * BLOCK), (4, 2, 3 * BLOCK), (2.6, 2, BLOCK), (1.6, 1, BLOCK)],
)
def test_applying_takes_what_there_is_room_for(
    blocks_of_room: float, slots: int, resident_below: int, device: Device, tmp_path: Path
) -> None:
    case = Case(tmp_path, slots=4, resident=4 * BLOCK)
    device.capacity = int(blocks_of_room * BLOCK)
    with warned(int(slots < 4)):
        offload = case.apply()
        case.check()
    stats = offload.stats()
    assert stats.slots == slots
    assert stats.resident_bytes <= resident_below
    assert device.peak <= device.capacity
    assert case.apply() is offload, "it is still the offloading that was asked for"
    offload.remove()


def test_without_room_for_one_slot_nothing_is_applied(device: Device, tmp_path: Path) -> None:
    case = Case(tmp_path)
    device.capacity = BLOCK // 2
    with pytest.raises(torch.OutOfMemoryError):
        case.apply()
    assert offload_of(case.module) is None
    case.check()


@pytest.mark.parametrize("call", ["forward", "part"])
def test_what_others_took_meanwhile_is_done_without(call: str, device: Device, tmp_path: Path) -> None:
    case = Case(tmp_path, slots=3, resident=3 * BLOCK)
    offload = case.apply()
    case.check()
    offload.rest()
    device.capacity = device.used + int(2.7 * BLOCK)
    if call == "part":  # a block that is called past its module cannot change what it runs in: the next call can
        with warned(0), torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
            case.module.blocks[0](tokens(48))
        with warned():
            case.check()
    else:
        with warned():
            case.check()
            case.check()
    assert offload.stats().slots == 2
    assert device.used <= device.capacity
    device.capacity = 10**12
    offload.adapt()
    assert offload.stats().slots == 3
    assert offload.stats().resident_bytes >= 2.5 * BLOCK
    case.check()
    offload.remove()


def test_others_that_are_idle_give_theirs_before_slots_are_given_up(device: Device, tmp_path: Path) -> None:
    first, second = Case(tmp_path, resident=4 * BLOCK), Case(tmp_path, resident=4 * BLOCK)
    idle = first.apply()
    first.check()
    device.capacity = device.used + 3 * BLOCK
    with warned(0):
        offload = second.apply()
        second.check()
    assert offload.stats().resident_bytes > 3 * BLOCK
    assert idle.held_bytes == 0
    with warned(0):
        first.check()
    assert offload.held_bytes < 2 * BLOCK
    for each in (idle, offload):
        each.remove()


class Hungry(BlockNet):
    """Computes what takes device memory, as the device sees it."""

    needs = 0
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.blocks[0](self.embed(x))
        work = CpuBackend().memory(self.needs)
        del work
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x)


def test_a_pass_that_runs_out_of_memory_is_reported_and_the_next_one_has_more(device: Device, tmp_path: Path) -> None:
    case = Case(tmp_path, slots=3, resident=4 * BLOCK)
    case.module.__class__ = case.model.__class__ = Hungry
    case.module.needs = 0
    offload = case.apply()
    case.check()
    device.capacity = device.used + BLOCK
    case.module.needs = 4 * BLOCK
    said = r"no room for Hungry.*Let go of .*KiB for another try.*2 slots and 0 B"
    with pytest.warns(RuntimeWarning, match=said), pytest.raises(torch.OutOfMemoryError):
        case.check()
    assert offload.held_bytes == 0
    case.check()
    assert (offload.stats().slots, offload.stats().resident_bytes < BLOCK) == (2, True)
    case.module.needs = int(6.5 * BLOCK)
    with warned(0):
        with pytest.raises(torch.OutOfMemoryError):
            case.check()
        case.check()
    assert offload.stats().slots == 1
    case.module.needs = 10**9
    with warned(0), pytest.raises(torch.OutOfMemoryError):
        case.check()
    assert offload.held_bytes > 0, "there was nothing left to give"
    offload.remove()


def test_a_retry_in_the_handler_of_the_error_is_not_taken_for_another_one(device: Device, tmp_path: Path) -> None:
    case = Case(tmp_path, slots=2, resident=4 * BLOCK)
    case.module.__class__ = case.model.__class__ = Hungry
    offload = case.apply()
    case.module.needs = 10**9
    device.capacity = 10**8
    with warned():
        try:
            case.check()
        except torch.OutOfMemoryError:
            case.module.needs = 0
            case.check(4)
    assert offload.stats().slots == 2
    offload.remove()


def test_there_may_be_no_room_for_new_slots_where_views_keep_the_old_ones(device: Device, tmp_path: Path) -> None:
    class Keeper(BlockNet):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.blocks[2].up.weight.detach()

    case = Case(tmp_path)
    case.module.__class__ = case.model.__class__ = Keeper
    offload = case.apply()
    device.capacity = device.used - 1
    with torch.no_grad(), warned():
        x = tokens(8)
        kept = case.module(x)[1]  # the ring is theirs, and there is no room for another one
        del kept
        assert torch.equal(case.module(x)[0], case.model(x)[0])
    offload.remove()


# --- adapt


def test_slots_and_what_stays_change_while_it_is_on(device: Device, tmp_path: Path) -> None:
    case = Case(tmp_path)
    offload = case.apply()
    case.check()
    for slots, resident in ((4, "80 kB"), (1, 0), (2, "200 kB"), (3, "120 kB"), (2, 10**9)):
        offload.adapt(slots=slots, resident=resident)
        stats = offload.stats()
        assert stats.slots == slots or (resident == 10**9 and stats.streamed_bytes == 0)
        case.check()
    assert offload.stats().resident_bytes > 8 * 37_000
    offload.adapt(resident=0)
    assert (offload.config.slots, offload.config.resident_bytes) == (2, 0)
    assert offload.stats().returned_bytes == 0
    case.check()
    assert offload.stats().loads > 0
    offload.remove()
    assert offload_of(case.module) is None


def test_what_stays_in_any_case_does_not_move(tmp_path: Path) -> None:
    case = Case(tmp_path, resident="200 kB")
    offload = case.apply()
    case.check()
    before = {id(r.slot.rest): r.on_device for r in offload._engine.assembly.residents}
    pointers = {key: tensor.data_ptr() for key, tensor in before.items()}
    gone = [weakref.ref(tensor) for tensor in before.values()]
    del before
    offload.adapt(slots=3)
    after = {id(r.slot.rest): r.on_device.data_ptr() for r in offload._engine.assembly.residents}
    assert after == pointers
    offload.adapt(resident=0)
    gc.collect()
    assert sum(ref() is None for ref in gone) > 4
    case.check()
    offload.remove()


def test_adapting_keeps_what_was_written(tmp_path: Path) -> None:
    model = BlockNet(6).eval()
    module = copy.deepcopy(model)
    offload = apply_group_offloading(module, "cpu", resident="1 MB")
    with torch.no_grad():
        for net in (module, model):
            net.blocks[1].up.weight.mul_(-1)
        offload.adapt(resident=0)
        for net in (module, model):
            net.blocks[2].up.weight.mul_(-1)
        offload.adapt(resident="1 MB")
        x = tokens(8)
        assert torch.equal(module(x), model(x))
    offload.remove()


def test_adapt_refuses_nonsense_and_what_runs(tmp_path: Path) -> None:
    case = Case(tmp_path)
    offload = case.apply()
    for options in ({"slots": 0}, {"slots": True}, {"resident": "lots"}, {"resident": -1}):
        with pytest.raises(ConfigError):
            offload.adapt(**options)
    assert offload.config.slots == 2

    hook = case.module.blocks[3].register_forward_hook(lambda *_: offload.adapt(slots=3))
    with torch.no_grad(), pytest.raises(ConflictError, match="BlockNet is running"):
        case.module(tokens(8))
    hook.remove()
    case.check()
    offload.remove()
    with pytest.raises(ConflictError, match="not offloaded any more"):
        offload.adapt(slots=3)


@pytest.mark.parametrize("work", ["adapt", "rest"])
def test_adapting_and_resting_are_all_or_nothing(work: str, tmp_path: Path) -> None:
    model = Codec().eval()
    module = mapped_copy(model, tmp_path)
    offloads = [apply_group_offloading(module, "cpu", resident="40 kB")]
    options = [{"slots": 3, "resident": "90 kB"}, {"slots": 2, "resident": "40 kB"}]

    def right() -> None:
        with torch.no_grad():
            x = tokens(8)
            assert torch.equal(module.decode(module.encode(x)), model.decode(model.encode(x)))

    def change() -> None:
        if work == "adapt":
            offloads[0].adapt(**options[0])
        else:
            offloads[0].rest()
            right()

    def check() -> None:
        offload = offloads[0]
        assert offload.is_active == (offload_of(module) is offload)
        with suppress(OSError):  # a load that began meanwhile failed behind its back, or found no thread
            right()
        right()
        if not offload.is_active:
            offloads[0] = apply_group_offloading(module, "cpu", resident="40 kB")
        options.reverse()

    assert each_failure(change, check) > 15
    offloads[0].remove()


def test_a_callable_is_what_it_is_after_giving_memory(device: Device, tmp_path: Path) -> None:
    model = Codec().eval()
    module = mapped_copy(model, tmp_path)
    offload = apply_group_offloading(module, "cpu", slots=3, resident="60 kB")
    method: Callable[[torch.Tensor], torch.Tensor] = module.encode  # somebody holds the wrapper
    with torch.no_grad():
        x = tokens(8)
        method(x)
        offload.rest()
        device.capacity = device.used + 2 * BLOCK
        with warned():
            assert torch.equal(method(x), model.encode(x))
    offload.remove()
