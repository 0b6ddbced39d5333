"""What a call will be, said before there is one: what is refused, and what other calls it stands for."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_pipelines import PIPELINES
from torch import nn

from vramkit import fit, plan
from vramkit.errors import ConfigError, ConflictError, StoreError
from vramkit.memory import GIB

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NAME = "StableDiffusionPipeline"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, mode: str = "thin") -> torch.Tensor:
        found: torch.Tensor = self.inner(x.repeat(16, 1) if mode == "wide" else x)
        return found


@pytest.fixture
def pipe() -> Any:
    return PIPELINES[NAME].make(NAME)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What diffusers and transformers log by handlers as theirs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def test_a_plan_without_a_decode_is_not_for_a_call_with_one(pipe: Any) -> None:
    call = {"num_inference_steps": 2, **PIPELINES[NAME].inputs()}
    with fit(pipe, GIB, device="cpu", **call, output_type="latent") as fitted:
        assert all(phase.name != "decode" for phase in fitted.plan.phases)
        pipe(**call, output_type="np")
        planned = fitted.plan
        assert any(phase.name == "decode" for phase in planned.phases)
        pipe(**call, output_type="pt")  # decodes in the same way
        assert fitted.plan is planned


def test_a_mode_of_as_many_letters_is_planned_for() -> None:
    net, x = Net().eval(), torch.randn(32, 64)
    with fit(net, GIB, device="cpu", example={"x": x, "mode": "thin"}) as fitted, torch.no_grad():
        thin_bytes = fitted.plan.component("Net").activation_bytes
        net(x=x, mode="wide")
        assert fitted.plan.component("Net").activation_bytes > 4 * thin_bytes


def test_a_name_that_is_nearly_an_argument_is_refused_by_calls_that_take_all(pipe: Any) -> None:
    for entry in (fit, plan):
        with pytest.raises(ConfigError, match=r"takes no 'hieght'; the call that is planned may have .*height"):
            entry(pipe, GIB, device="cpu", hieght=64)
    fit(pipe, GIB, device="cpu", **PIPELINES[NAME].inputs(), callback_steps=1).remove()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"height": 63, "width": 64}, "height=63, width=64, and fails: ValueError: .* divisible by 8"),
        ({"prompt": 5}, "prompt=5, and fails: ValueError"),
    ],
)
def test_a_call_that_would_fail_is_refused_by_what_was_given(given: dict[str, Any], reason: str, pipe: Any) -> None:
    call = {name: value for name, value in PIPELINES[NAME].inputs().items() if "prompt" not in given}
    with pytest.raises(ConfigError, match=reason):
        fit(pipe, GIB, device="cpu", **{**call, **given})
    fit(pipe, GIB, device="cpu", **PIPELINES[NAME].inputs()).remove()


@pytest.mark.parametrize(("name", "size"), [("height", -64), ("width", 0), ("num_images_per_prompt", 0), ("batch", -1)])
def test_a_size_below_one_is_refused(name: str, size: int, pipe: Any) -> None:
    with pytest.raises(ConfigError, match=rf"={size} was given .*; expected at least 1"):
        fit(pipe, GIB, device="cpu", **{name: size})


def test_nothing_is_logged_of_a_prompt_that_stands_for_any(pipe: Any, told: list[str]) -> None:
    with fit(pipe, GIB, device="cpu", height=16, width=16):
        assert not told
        pipe("a cat on a log " * 20, height=16, width=16, num_inference_steps=1, output_type="latent")
    assert any("truncated" in line for line in told)  # that of the caller is told of


def test_the_folder_for_weights_on_the_disk(tmp_path: Path) -> None:
    net, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).eval(), torch.randn(2, 64)
    options: dict[str, Any] = {"ram": "1KiB", "device": "cpu", "example": x}
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"disk_folder='.*file' takes no weights: .*; give a folder"):
        fit(net, "80KiB", **options, disk_folder=tmp_path / "file")
    with fit(net, "80KiB", **options, disk_folder=tmp_path / "new"):
        assert list((tmp_path / "new").iterdir())
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.trace(nn.Linear(64, 64), torch.randn(2, 64)), "is compiled by TorchScript"),
        (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8)),
            r"\.1 is a LazyLinear whose weights have no shape",
        ),
    ],
    ids=["traced", "lazy"],
)
def test_a_module_without_a_twin_is_refused(make: Any, reason: str) -> None:
    for entry in (fit, plan):
        with pytest.raises(ConfigError, match=reason):
            entry(make(), GIB, device="cpu", example=torch.randn(2, 64))


def test_names_of_modules_need_not_be_text() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    with fit({0: net}, GIB, device="cpu", example={0: x}) as fitted:
        assert fitted.plan.component("0").activation_bytes


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"disk_folder": 5}, "disk_folder=5; expected the path of a folder"),
        ({"disk_folder": ""}, "disk_folder=''; expected the path of a folder"),
        ({"mesh": 2}, r"mesh=2; expected what vramkit\.distributed\.connect\(\) returns"),
    ],
)
def test_options_of_another_kind_are_refused(option: dict[str, Any], reason: str) -> None:
    net = Net().eval()
    with pytest.raises(ConfigError, match=reason):
        fit(net, GIB, device="cpu", example=torch.randn(2, 64), **option)
    assert type(net) is Net


class Holder(Net):
    """Has something in an attribute, as research code has."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held


HELD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "module of Python": lambda: math,
    "in a dict": lambda: {"a": [threading.RLock(), math], "b": (threading.local(),)},
    "in an object": lambda: SimpleNamespace(lock=threading.Lock(), size=3),
    "generator": lambda: (number for number in range(3)),
    "open file": lambda: Path(os.devnull).open(),  # noqa: SIM115
}


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_module_that_holds_what_has_no_copy_is_planned_for(kind: str) -> None:
    net, x = Holder(HELD[kind]()).eval(), torch.randn(4, 64)
    with torch.no_grad():
        expected = net(x)
        with fit(net, GIB, device="cpu", example=x) as fitted:
            assert torch.equal(net(x), expected)
            assert not any("cannot be rehearsed" in note for note in fitted.plan.notes)
    assert net.held is not None


def test_what_a_rehearsal_would_use_up_is_left_to_the_call() -> None:
    class Counting(Holder):
        def forward(self, x: torch.Tensor, mode: str = "thin") -> torch.Tensor:
            return super().forward(x, mode) * next(self.held)

    net, x = Counting(number for number in range(1, 9)).eval(), torch.randn(4, 64)
    with torch.no_grad(), fit(net, GIB, device="cpu", example=x) as fitted:
        assert torch.equal(net(x), net.inner(x))
        assert torch.equal(net(x), net.inner(x) * 2)
        assert any("it uses a generator, of which there is no copy" in note for note in fitted.plan.notes)


def test_a_module_that_refuses_to_be_copied_is_refused_by_name() -> None:
    class Single(Net):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("there is one of it")

    with pytest.raises(ConfigError, match=r"Single cannot be copied \(RuntimeError: there is one of it\)"):
        fit(Single(), GIB, device="cpu", example=torch.randn(4, 64))


def test_offloading_of_diffusers_is_refused_before_anything_is_copied(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    for refused in (lambda: fit(pipe, GIB, device="cpu"), lambda: plan(pipe, GIB, device="cpu")):
        with pytest.raises(ConflictError, match="carries diffusers' hook 'group_offloading'"):
            refused()
