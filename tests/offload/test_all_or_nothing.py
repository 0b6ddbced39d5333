"""Whatever fails while applying, editing or removing: the module is as it was, and the next call works."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, Codec, mapped_copy, tokens, traces
from sweeps import sweep
from torch import nn

from vramkit import hooks
from vramkit.errors import ConfigError
from vramkit.offload import Offload, apply_group_offloading, apply_model_offload, offload_of, residents
from vramkit.offload.backend import CpuBackend
from vramkit.offload.disk import FileReader, MappedFile, SpillFile
from vramkit.offload.engine import GroupHook
from vramkit.offload.group import ModuleGroup
from vramkit.offload.inventory import Item
from vramkit.offload.resting import RestingPlace
from vramkit.offload.ring import SlotRing
from vramkit.offload.streamer import Streamer
from vramkit.offload.tensor_slot import TensorSlot
from vramkit.offload.workers import Workers

LEVELS = ["block_level", "leaf_level", "model_level"]
PLACES = ["pageable", "mapped", "spilled"]
SEAMS: list[tuple[Any, str]] = [
    *((CpuBackend, name) for name in ("memory", "queue", "fence")),
    *((hooks, name) for name in ("attach", "mark", "wrap_method")),
    *((RestingPlace, name) for name in ("check", "survey", "settle", "tidy", "lock", "stores", "to_device")),
    *((Streamer, name) for name in ("prefill", "_load", "reset", "close")),
    *((threading.Thread, name) for name in ("start",)),
    *((Workers, name) for name in ("submit", "drain", "close")),
    (SpillFile, "__init__"),
    (SpillFile, "add"),
    (MappedFile, "__init__"),
    (FileReader, "__init__"),
    (SlotRing, "__init__"),
    (GroupHook, "__init__"),
    (ModuleGroup, "show_rest"),
    (ModuleGroup, "restore"),
    (TensorSlot, "show"),
    (Item, "move_to"),
    (residents.Resident, "show"),
    (residents.Resident, "restore"),
    (hooks.Attachment, "remove"),
]


class OnPurposeError(OSError, RuntimeError):
    """What a system without memory, threads or file descriptors raises, and torch."""


@contextmanager
def failing(at: int, *, after: bool) -> Iterator[list[str]]:
    """Raise at call number `at` of all seams together, before or after what the call does; yields the names of the calls."""
    calls: list[str] = []

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            is_it = len(calls) == at
            if is_it and not after:
                raise OnPurposeError(f"on purpose, instead of {name}")
            result = method(*args, **kwargs)
            if is_it:
                raise OnPurposeError(f"on purpose, after {name}")
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for holder, name in SEAMS:
            patch.setattr(holder, name, watched(f"{holder.__name__}.{name}", getattr(holder, name)))
        yield calls


class Case:
    """A module with what it was before, and a way of offloading it."""

    def __init__(self, place: str, level: str, folder: Path) -> None:
        self.model = Codec(1, 3).eval()
        self.options: dict[str, Any] = {"offload_type": level}
        if place == "mapped":
            self.module = mapped_copy(self.model, folder)
        else:
            self.module = Codec(1, 3).eval()
            self.module.load_state_dict(self.model.state_dict())
        if place == "spilled":
            self.options["offload_to_disk_path"] = folder / "spill"
        self.spill = folder / "spill"
        self.module.decoder.requires_grad_(place == "pageable")
        self.before = traces(self.module)
        self.threads = set(threading.enumerate())

    def apply(self) -> Offload:
        return apply_group_offloading(self.module, "cpu", **self.options)

    def check_right(self) -> None:
        with torch.no_grad():
            x = tokens(8)
            assert torch.equal(self.module(x), self.model(x))
            assert torch.equal(self.module.decode(self.module.encode(x)), self.model.decode(self.model.encode(x)))

    def check_plain(self) -> None:
        assert offload_of(self.module) is None
        assert traces(self.module) == self.before
        state = self.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in self.module.state_dict().items())
        assert not self.spill.exists() or not list(self.spill.iterdir())
        for _ in range(200):  # a thread that was just being started ends by itself
            if self.threads.issuperset(threading.enumerate()):
                break
            time.sleep(0.01)
        assert self.threads.issuperset(threading.enumerate()), threading.enumerate()


@pytest.fixture
def case(place: str, level: str, tmp_path: Path) -> Case:
    return Case(place, level, tmp_path)


def each_failure(work: Callable[[], object], check: Callable[[], object]) -> int:
    """Run `work` with calls failing in turn, and `check` after each; returns how many failures there were.

    Of each seam the first call and the last one fail: those between are alike.
    """
    with failing(0, after=False) as names:
        work()
    check()
    places: dict[str, list[int]] = {}
    for at, name in enumerate(names, 1):
        places.setdefault(name, []).append(at)
    count = 0
    for at in sorted({at for found in places.values() for at in (found[0], found[-1])}):
        for after in (False, True):
            try:
                with failing(at, after=after):
                    work()
            except OSError:  # also StoreError: what names the failure
                count += 1
            try:
                check()
            except AssertionError as error:
                raise AssertionError(
                    f"{'after' if after else 'instead of'} call {at}, {names[at - 1]}: {error}"
                ) from error
    return count


@sweep("place level", product(PLACES, LEVELS), together=1)
def test_module_is_as_it_was_whatever_fails_while_applying(case: Case) -> None:
    applied: list[Offload] = []

    def check() -> None:
        while applied:
            applied.pop().remove()
        case.check_plain()

    assert each_failure(lambda: applied.append(case.apply()), check) > 25
    offload = case.apply()
    case.check_right()
    offload.remove()
    case.check_plain()


@sweep("place level", product(reversed(PLACES), LEVELS), together=1)
def test_remove_goes_to_its_end_whatever_fails_in_it(case: Case) -> None:
    case.apply().remove()

    def check() -> None:
        case.check_plain()
        offloads[0].remove()
        case.check_plain()
        case.check_right()
        offloads[0] = case.apply()
        case.check_right()

    def remove() -> None:
        offloads[0].remove()

    offloads = [case.apply()]
    assert each_failure(remove, check) > 10
    offloads[0].remove()
    case.check_plain()


@sweep("place level", product(reversed(PLACES), ["block_level", "model_level"]), together=1)
def test_module_is_offloaded_or_as_it_was_whatever_fails_in_edit(case: Case) -> None:
    offloads = [case.apply()]

    def edit() -> None:
        with offloads[0].edit():
            pass

    def check() -> None:
        offload = offloads[0]
        assert offload.is_active == (offload_of(case.module) is offload)
        with suppress(OSError):  # a load that began in the edit failed behind its back, or found no thread
            case.check_right()
        case.check_right()
        offload.remove()
        case.check_plain()
        offloads[0] = case.apply()

    assert each_failure(edit, check) > 25
    offloads[0].remove()


@pytest.mark.parametrize("place", ["pageable", "mapped"])
def test_no_component_is_offloaded_when_one_of_them_fails(place: str, tmp_path: Path) -> None:
    cases = [Case(place, "model_level", tmp_path / str(at)) for at in range(2) if not (tmp_path / str(at)).mkdir()]
    components = {str(at): case.module for at, case in enumerate(cases)}
    applied: list[Any] = []

    def check() -> None:
        while applied:
            applied.pop().remove()
        for case in cases:
            case.check_plain()

    assert each_failure(lambda: applied.append(apply_model_offload(components, "cpu")), check) > 20
    offload = apply_model_offload(components, "cpu")
    for case in cases:
        case.check_right()
    offload.remove()
    check()


@pytest.mark.parametrize("level", LEVELS)
def test_scripted_part_is_refused_by_name_before_anything_changes(level: str) -> None:
    model = BlockNet().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.blocks[1] = torch.jit.trace(model.blocks[1], torch.randn(1, 2, 48))
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    other = BlockNet().eval()
    for apply in (
        partial(apply_group_offloading, model, "cpu", offload_type=level, store="pageable"),
        partial(apply_model_offload, {"first": other, "second": model}, "cpu"),
    ):
        with pytest.raises(ConfigError, match=r"blocks\.1 is compiled by TorchScript"):
            apply()
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        assert all(parameter.requires_grad for parameter in model.parameters())
        parts = [part for part in (*model.modules(), *other.modules()) if not isinstance(part, torch.jit.ScriptModule)]
        assert not any(part._forward_pre_hooks or part._state_dict_pre_hooks for part in parts)
    model.blocks[1] = nn.Identity()
    apply_group_offloading(model, "cpu", offload_type=level, store="pageable").remove()


class Sealed(nn.Module):
    """A class that lets nobody set its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(48, 48)
        self.scale = nn.Parameter(torch.randn(48, 48))
        self.__dict__["sealed"] = True

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("sealed"):
            raise AttributeError(f"{name} is sealed")
        super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) @ self.scale


class SealedRNN(nn.GRU):
    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("sealed") and not name.startswith("_flat"):  # which torch sets in the forward
            raise AttributeError(f"{name} is sealed")
        super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)[0]


@pytest.mark.parametrize("level", LEVELS)
def test_class_that_refuses_to_set_attributes_streams(level: str) -> None:
    model = nn.Sequential(*(Sealed() for _ in range(4)), *(SealedRNN(48, 48) for _ in range(3)))
    for part in model:
        part.eval() if isinstance(part, SealedRNN) else part.__dict__.update(training=False)
        part.__dict__["sealed"] = True
    x = torch.randn(2, 6, 48)
    with torch.no_grad():
        expected = model(x)
        before = traces(model)
        offload = apply_group_offloading(model, "cpu", offload_type=level, slots=1, store="pageable")
        for _ in range(2):
            assert torch.equal(model(x), expected)
        offload.remove()
        assert traces(model) == before
        assert torch.equal(model(x), expected)
