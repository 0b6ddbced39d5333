"""parameters_on_meta: weights without memory, everything else as it would be."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CASES, TiedNet
from torch import nn

from vramkit.casting import apply_layerwise_casting
from vramkit.offload import parameters_on_meta


class Marked(nn.Parameter):
    """A class of parameters, as libraries make them to know theirs."""


class Rotary(nn.Module):
    """Values in a buffer that no file holds, in one that files hold, in attributes, and in what is made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("inv_freq", 1.0 / 10 ** torch.arange(3.0), persistent=False)
        self.register_buffer("mean", torch.full((6,), 2.0))
        self.freqs = torch.polar(torch.ones(6), torch.arange(6.0))
        self.tables = [torch.arange(4), torch.ones(2)]
        self.by_name = {"sin": torch.arange(3.0).sin()}


class Initialized(nn.Module):
    """Every way in which constructors write to a parameter that they have registered."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6, padding_idx=1)
        self.weight = nn.Parameter(torch.empty(6, 6))
        for fill in (
            nn.init.kaiming_uniform_,
            nn.init.xavier_normal_,
            nn.init.orthogonal_,
            nn.init.zeros_,
            nn.init.eye_,
        ):
            fill(self.weight)
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.weight.data.normal_(0.0, 0.02)
        self.table.weight.data[self.table.padding_idx].zero_()
        self.weight.data.copy_(torch.ones(6, 6))
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.weight[:2] = torch.zeros(2, 6)
            self.weight.add_(torch.ones(6, 6))


def test_parameters_alone_are_on_meta() -> None:
    with parameters_on_meta():
        module = Rotary()
    plain = Rotary()
    assert {p.device.type for p in module.parameters()} == {"meta"}
    for name, buffer in plain.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer)
    assert torch.equal(module.freqs, plain.freqs)
    assert torch.equal(module.by_name["sin"], plain.by_name["sin"])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.tables, plain.tables, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_shapes_dtypes_and_ties_are_those_of_the_ordinary_way(case: str) -> None:
    kind = CASES[case][0]
    with parameters_on_meta():
        module = kind()
    plain = kind()
    for (name, ours), (other, theirs) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert (type(ours), ours.requires_grad, ours.device.type) == (type(theirs), theirs.requires_grad, "meta")


def test_one_parameter_in_several_modules_is_one() -> None:
    net, weight = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Parameter(torch.ones(4, 4))
    with parameters_on_meta():
        net[0].weight = weight
        with parameters_on_meta():
            net[1].weight = weight
        others = [nn.ParameterList([nn.Parameter(torch.ones(2))]) for _ in range(50)]  # ids come again
    assert net[0].weight is net[1].weight
    assert net[0].weight.is_meta
    assert len({id(other[0]) for other in others}) == 50


def test_ties_survive() -> None:
    with parameters_on_meta():
        module = TiedNet()
        twin = copy.deepcopy(module)
    for net in (module, twin):
        assert net.head.weight is net.tokens.weight
        assert net.blocks[4].up.weight is net.blocks[1].up.weight


def test_class_attributes_and_requires_grad_survive() -> None:
    module = nn.Module()
    weight = Marked(torch.ones(3, dtype=torch.float64), requires_grad=False)
    weight.scale = 2.0
    with parameters_on_meta():
        module.weight = weight
        module.register_parameter("other", nn.Parameter(torch.ones(2)))
        module.none = None
        module.register_parameter("absent", None)
    assert type(module.weight) is Marked
    assert module.weight.scale == 2.0
    assert (module.weight.dtype, module.weight.requires_grad, module.weight.is_meta) == (torch.float64, False, True)
    assert (type(module.other), module.other.requires_grad) == (nn.Parameter, True)
    assert module.absent is None
    assert torch.equal(weight, torch.ones(3, dtype=torch.float64))  # the one that was given is its owner's


def test_weights_made_of_other_tensors_go_by_their_parts() -> None:
    layer = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=None)
    weight = layer[0].weight
    module = nn.Module()
    with parameters_on_meta():
        module.weight = weight
    assert type(module.weight) is type(weight)
    assert {part.device.type for part in (module.weight, module.weight.stored, module.weight.scale)} == {"meta"}
    assert weight.stored.device.type == "cpu"


def test_initialization_runs_without_effect() -> None:
    before = torch.get_rng_state()
    with parameters_on_meta():
        module = Initialized()
        others = [nn.LSTM(4, 4, num_layers=2), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))]
        lazy = nn.LazyLinear(4)
    assert all(parameter.is_meta for part in (module, *others) for parameter in part.parameters())
    assert nn.parameter.is_lazy(lazy.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_ends_nests_and_gives_way_to_errors() -> None:
    with parameters_on_meta():
        with pytest.raises(ZeroDivisionError), parameters_on_meta():
            raise ZeroDivisionError
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_are_left_alone() -> None:
    entered, built = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def build() -> None:
        entered.wait(30)
        seen["outside"] = nn.Linear(2, 2).weight.is_meta
        with parameters_on_meta():
            seen["inside"] = nn.Linear(2, 2).weight.is_meta
        built.set()

    thread = threading.Thread(target=build)
    thread.start()
    with parameters_on_meta():
        entered.set()
        assert built.wait(30)
        seen["here"] = nn.Linear(2, 2).weight.is_meta
    thread.join()
    assert seen == {"outside": False, "inside": True, "here": True}


def test_threads_that_come_and_go_disturb_nobody() -> None:
    failures: list[BaseException] = []

    def build(inside: bool) -> None:
        try:
            for _ in range(150):
                if inside:
                    with parameters_on_meta():
                        assert nn.LayerNorm(2).weight.is_meta
                else:
                    assert not nn.LayerNorm(2).weight.is_meta
        except BaseException as error:  # noqa: BLE001 - reported below
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=build, args=(at % 2 == 0,)) for at in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_a_parameter_may_be_larger_than_memory() -> None:
    class Experts(nn.Module):
        def __init__(self, fill: Callable[..., torch.Tensor]) -> None:
            super().__init__()
            self.weight = nn.Parameter(fill(2**20, 2**26, dtype=torch.bfloat16))
            self.register_buffer("mask", torch.empty(3, 3).fill_(1.0).triu_(1), persistent=False)

    for fill in (torch.empty, torch.zeros):
        with parameters_on_meta():
            module = Experts(fill)
            with pytest.raises(RuntimeError, match=r"invalid|negative"):
                torch.empty(-1)
        assert (module.weight.nbytes, module.weight.dtype, module.weight.is_meta) == (2**47, torch.bfloat16, True)
        assert module.mask.sum() == 3
    with pytest.raises(RuntimeError, match=r"allocate|memory"):
        Experts(torch.empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_large_zeros_that_stay_are_zeros(dtype: torch.dtype) -> None:
    with parameters_on_meta():
        made = [
            torch.zeros(2048, 8192, dtype=dtype),
            torch.zeros((2048, 8192), dtype=dtype, device="cpu"),
            torch.zeros(size=(2048, 8192), dtype=dtype),
            torch.zeros(3, dtype=dtype),
            torch.zeros(2048, 8192, dtype=dtype, device="meta"),
        ]
        assert not dtype.is_floating_point or torch.zeros(2**23, dtype=dtype, requires_grad=True).requires_grad
    assert [zeros.is_meta for zeros in made] == [False] * 4 + [True]
    assert [tuple(zeros.shape) for zeros in made] == [(2048, 8192)] * 3 + [(3,), (2048, 8192)]
    assert all(zeros.dtype == dtype and zeros.is_contiguous() for zeros in made)
    assert not any(zeros.any() for zeros in made[:4])
    assert made[0].fill_(1).all()


_PEAK = """
import resource, torch
from vramkit.offload import parameters_on_meta
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def zeros(): return torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(16384, 8192))])
def build(): return torch.nn.Sequential(*(torch.nn.Linear(16384, 8192) for _ in range(6)), zeros())
with parameters_on_meta(): torch.nn.Linear(8, 8)
before = peak()
with parameters_on_meta(): model = build()
print(sum(p.nbytes for p in model.parameters()), (peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_large_parameters_are_never_in_ram() -> None:
    result = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    size_bytes, growth = map(int, result.stdout.split())
    assert size_bytes > 3 * 2**30
    assert growth < 16 * 2**20
