"""What a call really took corrects the plan: with figures of a device that is not there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from vramkit import fit
from vramkit.device_memory import DeviceMemory
from vramkit.planning.measured import PeakMeter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Meter:
    """Measures what it is told to."""

    def __init__(self, *peaks: int | None, ran_out: bool = False) -> None:
        self.peaks, self.ran_out = list(peaks), ran_out

    def begin(self, held_bytes: int) -> tuple[int, int, int]:
        return held_bytes, 0, 0

    def end(self, begun: tuple[int, int, int]) -> tuple[int | None, bool]:
        return self.peaks.pop(0), self.ran_out


def test_a_call_above_the_budget_is_told_and_planned_anew() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    expected = net(x)
    with fit(net, 100_000, device="cpu", example=x) as fitted, torch.no_grad():
        before: Any = fitted.plan
        fitted._calls._meter = Meter(130_000, None, 100_000, None)  # type: ignore[assignment]
        with pytest.warns(UserWarning, match="took 126.96 KiB where .* were predicted and 97.65 KiB were given"):
            assert torch.equal(net(x), expected)
        after = fitted.plan
        assert after.margin_bytes == 130_000 - before.peak_bytes
        assert after.peak_bytes <= 100_000 - after.margin_bytes
        assert after.component("Net").device_bytes < before.component("Net").device_bytes
        assert any("are kept free since" in note for note in after.notes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is known, and then what is within the budget
            assert torch.equal(net(x), expected)
            assert torch.equal(net(x), expected)
            net(torch.cat([x, x]))
        assert fitted.plan.margin_bytes == after.margin_bytes  # holds for larger calls as well


def test_a_call_that_went_on_although_memory_ran_out_is_told_and_planned_anew() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    expected = net(x)
    with fit(net, 100_000, device="cpu", example=x) as fitted, torch.no_grad():
        before: Any = fitted.plan
        fitted._calls._meter = Meter(before.peak_bytes, ran_out=True)  # type: ignore[assignment]
        with pytest.warns(UserWarning, match="memory ran out within a call, which went on .* slower kernels, where"):
            assert torch.equal(net(x), expected)
        assert fitted.plan.margin_bytes == 103_125 - before.peak_bytes
        assert fitted.plan.peak_bytes < before.peak_bytes
        fitted._calls._meter = Meter(fitted.plan.peak_bytes)  # type: ignore[assignment]
        assert torch.equal(net(x), expected)


def test_where_no_other_plan_fits_it_is_told_and_nothing_changes() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    with fit(net, 60_000, device="cpu", example=x) as fitted, torch.no_grad():
        before = fitted.plan
        fitted._calls._meter = Meter(10_000_000)  # type: ignore[assignment]
        with pytest.warns(UserWarning, match="nothing is changed: no plan of Net fits"):
            net(x)
        assert fitted.plan is before


class Statistics:
    """Of torch, for a device."""

    allocated, peak, failures = 500, 900, 3

    def memory_stats_as_nested_dict(self, device: torch.device) -> dict[str, Any]:
        of_tensors = {"all": {"current": self.allocated, "peak": self.peak}}
        return {"allocated_bytes": of_tensors, "num_ooms": self.failures}


def test_what_others_have_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Statistics()
    monkeypatch.setattr(torch, "cuda", statistics)
    meter = PeakMeter(DeviceMemory(torch.device("cuda")))
    begun = meter.begin(200)
    assert meter.end(begun) == (None, False)  # no higher than before: nobody knows
    statistics.peak, statistics.failures = 1000, 4
    assert meter.end(begun) == (1000 - 300, True)


def test_memory_beside_the_allocator_is_counted_while_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Statistics()
    monkeypatch.setattr(torch, "cuda", statistics)
    memory = DeviceMemory(torch.device("cuda"))
    assert memory.peak_bytes == 900
    memory.add(300)
    assert (memory.allocated_bytes, memory.peak_bytes) == (800, 900)
    statistics.peak = 1000
    assert memory.peak_bytes == 1300
    memory.add(-300)
    statistics.peak = 1100  # without what was beside it
    assert (memory.allocated_bytes, memory.peak_bytes) == (500, 1300)
    statistics.peak = 500  # it was reset
    assert memory.peak_bytes == 500
