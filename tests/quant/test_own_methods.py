"""Methods that stored weights have beyond torch's: `dequantize()`, and those by which quanto writes a state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quant.configs import CONFIGS
from strict import strict  # noqa: F401 (a fixture)
from torch import nn

from vramkit.offload import apply_group_offloading
from vramkit.quant import quantize

WIDTH = 64
WAYS: dict[str, dict[str, Any]] = {
    "block": {"slots": 1},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 2000, "slots": 1},
    "model": {"offload_type": "model_level"},
}


class Block(nn.Module):
    """Reads a weight of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ self.read.weight.dequantize().to(x.dtype))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.between: Callable[[], Any] = list

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        self.between()
        return x @ self.head.weight.dequantize().to(x.dtype)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def quantized_by_quanto(model: nn.Module) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*CONFIGS, "of_quanto"])
@pytest.mark.usefixtures("quanto_in_python", "strict")
def test_values_are_asked_of_what_is_on_the_device(kind: str, way: str) -> None:
    model = net()
    if kind == "of_quanto":
        quantized_by_quanto(model)
    else:
        quantize(model, CONFIGS[kind], skip_modules=[])
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        expected, values = model(x), model.head.weight.dequantize()
        offload = apply_group_offloading(model, "cpu", **WAYS[way])
        for _ in range(2):
            assert torch.equal(model(x), expected)
            assert torch.equal(model.head.weight.dequantize(), values)
        assert offload.stats().loaded_bytes > 0
        offload.remove()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_quanto_write_their_state_dict(way: str) -> None:
    model, x = net(), torch.randn(2, WIDTH)
    quantized_by_quanto(model)
    expected = model.state_dict()
    assert "head.weight._data" in expected
    apply_group_offloading(model, "cpu", **WAYS[way])
    found: list[dict[str, torch.Tensor]] = [model.state_dict()]
    model.between = lambda: found.append(model.state_dict())
    with torch.no_grad():
        model(x)
    for state in (*found, model.state_dict()):
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert len(found) == 2
