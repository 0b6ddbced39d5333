"""Weights in less than they were given in: chosen where it is allowed, as far as it is needed, and told."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, build_pair
from live_bytes import peak_bytes
from torch import nn

from vramkit import PlanInfeasible, fit, plan
from vramkit.memory import module_bytes
from vramkit.pipelines.networks.layers import FeedForward
from vramkit.planning.calls import module_calls
from vramkit.planning.features import Settings
from vramkit.planning.narrowing import STORED, ways_to_store
from vramkit.planning.twins import Twins
from vramkit.quant import quantization_of

QUALITY = Path(__file__).parents[2] / "benchmarks" / "results" / "quality.json"
BACKENDS = {"int8": "quanto int8", "fp8": "fp8 e4m3", "nf4": "bitsandbytes nf4"}


class Net(nn.Module):
    """Eleven layers that are narrowed, and one that is named as fragile."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(11))
        self.proj_out = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        out: torch.Tensor = self.proj_out(x)
        return out


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(requires_grad=False)


def example() -> torch.Tensor:
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKENDS)
def test_bounds_are_those_that_were_measured(name: str) -> None:
    rows = [row for row in json.loads(QUALITY.read_text())["rows"] if row["backend"] == BACKENDS[name]]
    assert len(rows) == 5
    way = STORED[name]
    assert way.weights_db == min(row["weights_db"] for row in rows)
    assert way.layer_db == min(row["worst_layer_db"] for row in rows)
    assert way.forward_db == min(row["forward_db"] for row in rows)


def test_classes_of_results() -> None:
    assert [way.name for way in ways_to_store("exact")[0]] == []
    assert [way.name for way in ways_to_store("bounded")[0]] == ["int8", "fp8", "nf4"]
    assert [way.name for way in ways_to_store("any")[0]] == ["int8", "fp8", "nf4", "nf4 throughout"]


# Narrowing saves nothing; then enough as soon as all of it stays; then every bit counts.
@pytest.mark.parametrize(("vram", "way"), [(4_000_000, "as stored"), (1_600_000, "int8"), (900_000, "nf4")])
def test_as_far_as_it_is_needed_and_told(net: Net, vram: int, way: str) -> None:
    x, model = example(), copy.deepcopy(net)
    expected = net(x)
    with fit(model, vram, device="cpu", example=x, allow="bounded") as fitted, torch.no_grad():
        planned, real = fitted.plan.component("Net"), fitted.stats()["Net"]
        assert planned.wire_dtype == way
        found = model(x)
        assert planned.weight_bytes == module_bytes(model)
        assert real.resident_bytes + real.slots * real.slot_bytes <= planned.device_bytes
        assert fitted.plan.peak_bytes <= vram
        noise = float((found - expected).norm() / expected.norm())
        if way == "as stored":
            assert noise == 0
        else:
            assert 0 < noise < 10 ** (-STORED[way].forward_db / 20)  # type: ignore[operator]
            assert planned.quality_db == STORED[way].weights_db
            assert f"{STORED[way].forward_db:g} dB in that of a model" in fitted.explain()
    assert quantization_of(model) is None  # rounded, and ordinary
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_any_narrows_what_is_fragile_and_says_that_nobody_measured_it(net: Net) -> None:
    # Room for all of it in nf4, if the fragile layer is as well.
    planned = plan(net, 720_000, device="cpu", example=example(), allow="any")
    assert planned.component("Net").wire_dtype == "nf4 throughout"
    assert planned.component("Net").quality_db is None
    assert any("was not measured" in note for note in planned.notes)
    bounded = plan(net, 720_000, device="cpu", example=example(), allow="bounded")
    assert bounded.component("Net").wire_dtype == "nf4"
    assert bounded.seconds > planned.seconds


def test_exact_is_never_narrow(net: Net) -> None:
    for vram in (300_000, 900_000):
        assert plan(net, vram, device="cpu", example=example()).component("Net").wire_dtype == "as stored"


def test_only_what_binds_is_narrow(net: Net) -> None:
    modules = {"one": copy.deepcopy(net), "two": nn.Sequential(nn.Linear(64, 64)).eval()}
    given: dict[str, Any] = {"one": example(), "two": torch.randn(4, 64)}
    planned = plan(modules, 1_600_000, device="cpu", example=given, allow="bounded")
    assert planned.component("one").wire_dtype == "int8"
    assert planned.component("two").wire_dtype == "as stored"


def test_narrow_weights_become_no_wider_when_a_call_is_planned_anew(net: Net) -> None:
    x, model = example(), copy.deepcopy(net)
    with fit(model, 1_600_000, device="cpu", example=x, allow="bounded") as fitted, torch.no_grad():
        first = model(x)
        larger = torch.cat([x] * 30)
        model(larger)
        assert fitted.plan.component("Net").wire_dtype in {"int8", "nf4"}  # not wider, whatever the time
        assert fitted.plan.component("Net").activation_bytes > 100_000
        if fitted.plan.component("Net").wire_dtype == "int8":
            assert torch.equal(model(x), first)


def test_the_budget_that_a_narrow_plan_needs_is_named(net: Net) -> None:
    with pytest.raises(PlanInfeasible) as refused:
        plan(net, 100_000, device="cpu", example=example(), allow="any")
    nearest = refused.value.nearest_bytes
    assert plan(net, nearest, device="cpu", example=example(), allow="any").peak_bytes <= nearest


def test_what_is_not_installed_is_said(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramkit.planning.narrowing._is_installed", lambda way: way.backend == "casting")
    planned = plan(net, 900_000, device="cpu", example=example(), allow="bounded")
    assert planned.component("Net").wire_dtype == "fp8"
    assert any("for want of packages: int8, nf4" in note for note in planned.notes)


@pytest.mark.parametrize(("name", "chunk"), [("Wan2.1", 10), ("HunyuanVideo", 10)])
def test_wide_weights_of_loops_over_chunks_are_planned_for(name: str, chunk: int) -> None:
    """A loop keeps what it widens in fp8, so that each chunk need not; other kinds are wide for one product."""
    model, _ = build_pair(name)
    model.set_chunk_size(chunk)
    given = DENOISERS[name].inputs(**DENOISERS[name].two)
    twins = Twins({"model": model})
    twins.activation_bytes("model", module_calls({"model": ((), given)}), Settings(), torch.device("cpu"))
    fp8, nf4 = (twins.widest_bytes("model", STORED[way]) for way in ("fp8", "nf4"))
    feed_forwards = [each for each in model.modules() if isinstance(each, FeedForward)]
    loops = [each.net[0].proj.weight.nbytes + each.net[2].weight.nbytes for each in feed_forwards]
    taken = []
    for change in (lambda: None, model.enable_layerwise_casting):
        change()
        model(**given)
        taken.append(peak_bytes(partial(model, **given), model.parameters()))
    assert nf4 == max(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 2)
    assert fp8 >= max(nf4, *loops)
    assert fp8 > nf4 or name == "Wan2.1"  # one of whose weights alone is larger
    assert taken[1] - taken[0] <= fp8
