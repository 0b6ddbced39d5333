"""What is planned for recurrent layers on the CPU is what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocated_bytes import AllocatedBytes, is_planned_well
from torch import nn

from vramkit import fit

WIDTH = 64


class Recurrent(nn.Module):
    def __init__(self, kind: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.layers = kind(WIDTH, WIDTH, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.GRU, {}),
        (nn.GRU, {"num_layers": 2, "bias": False}),
        (nn.GRU, {"bidirectional": True}),
        (nn.LSTM, {}),
        (nn.LSTM, {"bias": False}),
        (nn.LSTM, {"num_layers": 2}),
        (nn.LSTM, {"num_layers": 2, "bias": False, "bidirectional": True}),
        (nn.LSTM, {"bidirectional": True}),
        (nn.LSTM, {"proj_size": 16}),
        (nn.RNN, {}),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_plans_count_the_products_of_all_steps(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    net, x = Recurrent(kind, options).eval().to(dtype), torch.randn(4, 100, WIDTH).to(dtype)
    with torch.no_grad(), AllocatedBytes() as taken:
        expected = net(x)
    with fit(net, "64MiB", device="cpu", example=x) as fitted, torch.no_grad():
        plan: Any = fitted.plan
        assert not plan.notes  # it was rehearsed
        planned_bytes = plan.peak_bytes - sum(each.device_bytes for each in plan.components)
        assert torch.equal(net(x), expected)
    # torch's own layers let go of products early, where plans keep those of each direction.
    most = 1.1 if kind is nn.LSTM and "proj_size" not in options and _has_library(dtype) else 1.8
    assert is_planned_well(planned_bytes, taken.peak_bytes, least=0.99, most=most)


def _has_library(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
