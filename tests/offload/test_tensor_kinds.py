"""Weights that are not what their bytes are, or cannot be changed: lazy bits, inference mode, sparse buffers; defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vramkit.offload import apply_group_offloading
from vramkit.offload.backend import CpuBackend
from vramkit.offload.pinning import own_pages
from vramkit.offload.stores import _page_locked

WIDTH = 32
LEVELS = ["block_level", "leaf_level", "model_level"]


class Conjugated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64).conj())
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("turn", torch.randn(WIDTH, dtype=torch.complex64).conj())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (self.lin(x).to(torch.complex64) @ self.w) * self.turn
        return torch.tanh(z.real + z.imag)


class Negated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch._neg_view(torch.randn(WIDTH, WIDTH)))
        self.holes = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64).conj().imag)
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.lin(x) @ self.dense @ self.holes)


class Holes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, ::2])
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.lin(x) @ self.w)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
            self.register_buffer(str(layout)[-3:], torch.eye(WIDTH).to_sparse(layout=layout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.sparse.mm(self.coo, x.reshape(-1, WIDTH).t()).t().view_as(x)
        return torch.tanh(self.lin(mixed) + self.csr.to_dense()[0] + self.csc.to_dense()[1])


def stack(kind: Callable[[], nn.Module], blocks: int = 4) -> nn.Module:
    return nn.Sequential(*(kind() for _ in range(blocks))).eval()


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.filterwarnings("ignore:Sparse C")  # "in beta state"
@pytest.mark.parametrize("kind", [Conjugated, Negated, Sparse])
def test_values_are_taken_and_come_back(kind: type[nn.Module], level: str, on_disk: bool, tmp_path: Path) -> None:
    module, x = stack(kind), torch.randn(2, WIDTH)
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    options: dict[str, Any] = {"offload_to_disk_path": tmp_path} if on_disk else {}
    with torch.no_grad():
        expected = module(x)
        offload = apply_group_offloading(module, "cpu", offload_type=level, slots=1, **options)
        assert all(torch.equal(module(x), expected) for _ in range(2))
        assert offload.stats().resident_bytes >= sum(b.numel() for b in module.buffers() if b.layout == torch.strided)
        offload.remove()
        assert torch.equal(module(x), expected)
    after = module.state_dict()
    for name, tensor in before.items():
        assert after[name].layout == tensor.layout
        assert torch.equal(after[name].to_dense(), tensor.to_dense())


@pytest.mark.parametrize("apply_in", [False, True])
@pytest.mark.parametrize("run_in", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", [two_layers, Holes])
def test_weights_that_were_made_in_inference_mode(
    kind: Callable[[], nn.Module], on_disk: bool, run_in: bool, apply_in: bool, tmp_path: Path
) -> None:
    """They take no other ``.data``: the module gets new parameters, under every name that it has them."""
    x = torch.randn(2, 6, WIDTH)
    with torch.inference_mode():
        module = stack(kind)
        tied = nn.Linear(WIDTH, WIDTH)
        module.append(nn.Sequential(tied, nn.Tanh()))
        module.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        module[-1][0].weight = tied.weight
        expected = module(x)
    options: dict[str, Any] = {"offload_to_disk_path": tmp_path} if on_disk else {}
    with torch.inference_mode(apply_in):
        offload = apply_group_offloading(module, "cpu", slots=1, **options)
    with torch.inference_mode(run_in), torch.no_grad():
        assert torch.equal(module(x), expected)
    offload.remove()
    assert module[-1][0].weight is tied.weight
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("remove_in", [False, True])
def test_remove_in_inference_mode_leaves_ordinary_weights(remove_in: bool, tmp_path: Path) -> None:
    module = stack(two_layers)
    offload = apply_group_offloading(module, "cpu", slots=1, offload_to_disk_path=tmp_path)
    with torch.inference_mode(remove_in):
        offload.remove()
    module(torch.randn(1, WIDTH)).sum().backward()  # asks for gradients, which inference tensors cannot have
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.fixture(params=["default", "context"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything that does not say where is made on the meta device, and in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        if request.param == "context":
            with torch.device("meta"):
                yield
        else:
            torch.set_default_device("meta")
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_host_memory_is_made_on_the_cpu(elsewhere: None) -> None:
    assert own_pages(4096).device.type == "cpu"
    assert _page_locked(64).device.type == "cpu"
    assert CpuBackend().memory(64).device.type == "cpu"
    assert own_pages(5).dtype == CpuBackend().memory(5).dtype == torch.uint8


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", [two_layers, Holes])
def test_defaults_of_torch_do_not_move_weights(
    kind: Callable[[], nn.Module], on_disk: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module, x = stack(kind), torch.randn(2, 6, WIDTH)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    options: dict[str, Any] = {"offload_to_disk_path": tmp_path} if on_disk else {}
    with torch.no_grad():
        expected = module(x)
        for apply_only in (True, False):
            torch.set_default_device("meta")
            try:
                offload = apply_group_offloading(module, "cpu", slots=1, **options)
                torch.set_default_device(None if apply_only else "meta")
                got = module(x)
                offload.remove()
            finally:
                torch.set_default_device(None)
            assert torch.equal(got, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
