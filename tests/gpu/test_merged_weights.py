"""Weights that are made in the slot of what came there, on a CUDA device: as resident ones, with bases as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from vramkit.offload import apply_group_offloading
from vramkit.pipelines.lora.merged import MergedTensor

pytestmark = pytest.mark.gpu
SIZE = 1024


def merged_net(rank: int, dtype: torch.dtype) -> nn.Sequential:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(*(nn.Linear(SIZE, SIZE, dtype=dtype) for _ in range(8))).requires_grad_(requires_grad=False)
    for layer in net:
        up, down = (torch.randn(shape, generator=g).to(dtype) * 0.1 for shape in ((SIZE, rank), (rank, SIZE)))
        layer.weight = nn.Parameter(MergedTensor(layer.weight.detach(), [(up, down, 0.5)]), requires_grad=False)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 32])  # of 1, the two matrices stay on the device
@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "leaf_level"},
        {"offload_type": "leaf_level", "store": "pageable"},
        {"offload_type": "leaf_level", "resident": "8MiB"},
        {"offload_type": "model_level"},
    ],
)
def test_streamed_is_resident(options: dict[str, Any], rank: int, dtype: torch.dtype) -> None:
    net = merged_net(rank, dtype)
    bases = [layer.weight.base.clone() for layer in net]
    resident = copy.deepcopy(net).to("cuda")
    handle = apply_group_offloading(net, "cuda", **options)
    x = torch.randn(64, SIZE, device="cuda", dtype=dtype)
    expected = resident(x)
    for _ in range(4):
        assert torch.equal(net(x), expected)
    for each in (net, resident):  # what stays on the device is written to: the copy queue comes after
        up, down, _ = each[3].weight.products[0]
        up.mul_(2)
        down.add_(0.125)  # a number of bfloat16: the host and the device round 0.1 differently
    assert torch.equal(net(x), resident(x))
    handle.remove()
    assert all(torch.equal(layer.weight.base, base) for layer, base in zip(net, bases, strict=True))
