"""Examples of calls that a forward cannot take: an error that says what was given and what is right, and nothing moves."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vramkit import fit, plan
from vramkit.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) * scale
        return y if mask is None else y * mask


class OfBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        y: torch.Tensor = self.layer(batch["x"])
        return y


X = torch.ones(2, 8)
OF_NET, OF_BATCHES = "(x, mask=None, *, scale=1.0)", "(batch)"


@pytest.mark.parametrize(
    ("kind", "example", "given", "taken"),
    [
        (Net, {"y": X}, "(y=float32 [2, 8])", OF_NET),
        (Net, (X, X, X), "(float32 [2, 8], float32 [2, 8], float32 [2, 8])", OF_NET),
        (Net, (), "()", OF_NET),
        (Net, {}, "()", OF_NET),
        (Net, 3, "(3)", OF_NET),
        (Net, "x", "('x')", OF_NET),
        (Net, [[1, 2], [3, 4]], "([[1, 2], [3, 4]])", OF_NET),
        (Net, X.numpy(), "(ndarray)", OF_NET),
        (Net, {1: X}, "(1=float32 [2, 8])", OF_NET),
        (Net, (X, {"mask": X}), "(float32 [2, 8], {'mask': float32 [2, 8]})", OF_NET),
        (OfBatches, X, "(float32 [2, 8])", OF_BATCHES),
        (OfBatches, {"x": X}, "(x=float32 [2, 8])", OF_BATCHES),
        (OfBatches, ({"y": X},), "({'y': float32 [2, 8]})", OF_BATCHES),
    ],
)
def test_an_example_that_a_forward_cannot_take(kind: type[nn.Module], example: Any, given: str, taken: str) -> None:
    net = kind()
    told = re.escape(f"{given}, its forward takes {taken}, and the call fails: ") + ".*; give a tuple of arguments"
    weight = net.layer.weight.data_ptr()
    with pytest.raises(ConfigError, match=re.escape(f"example= gives {kind.__name__} ") + told):
        fit(net, "1GiB", device="cpu", example=example)
    with pytest.raises(ConfigError, match=re.escape("example= gives net ") + told):
        plan({"net": net}, "1GiB", device="cpu", example={"net": example})
    assert type(net) is kind
    assert net.layer.weight.data_ptr() == weight


@pytest.mark.parametrize("example", [X, (X,), {"x": X, "scale": 2}, X.to("meta"), (X, X.to("meta"))])
def test_what_a_forward_takes_is_right_on_any_device(example: Any) -> None:
    net = Net()
    with fit(net, "1GiB", device="cpu", example=example) as fitted, torch.no_grad():
        found = net(X)
        assert not fitted.plan.notes
    assert torch.equal(found, net(X))


@pytest.mark.parametrize("example", [X, (X,), 3, np.ones(2)])
def test_several_modules_want_a_mapping(example: Any) -> None:
    told = f"example= is a {type(example).__name__}, and the target a mapping of modules; expected a mapping .* net"
    with pytest.raises(ConfigError, match=told):
        fit({"net": Net()}, "1GiB", device="cpu", example=example)


def test_a_call_that_fails_has_the_error_of_the_module() -> None:
    net = Net()
    with fit(net, "1GiB", device="cpu", example=X), pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        net(y=X)
