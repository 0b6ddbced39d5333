"""Another device as a place where weights rest; here both are the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading, load_mapped
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.offload.stores import PeerStore


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))).eval().requires_grad_(False)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("from_file", [False, True])
def test_weights_come_from_the_other_device(tmp_path: Path, level: str, from_file: bool) -> None:
    model, x = _model(), torch.randn(3, 64)
    expected = model(x)
    if from_file:
        write_checkpoint(tmp_path / "model.safetensors", dict(model.state_dict()))
        model = load_mapped(_model(), tmp_path / "model.safetensors")
    offload = apply_group_offloading(model, "cpu", offload_type=level, store="peer", peer_device="cpu")
    assert all(torch.equal(model(x), expected) for _ in range(3))
    assert offload.stats().stores.keys() == {"peer"}
    offload.remove()
    assert torch.equal(model(x), expected)


def test_what_is_written_at_rest_goes_to_the_other_device_too() -> None:
    model, x = _model(), torch.randn(3, 64)
    apply_group_offloading(model, "cpu", store="peer", peer_device="cpu", slots=1)
    before = model(x)
    model[2][0].weight.mul_(2)
    after = model(x)
    resident = _model()
    resident[2][0].weight.mul_(2)
    assert torch.equal(after, resident(x))
    assert not torch.equal(after, before)


def test_the_host_is_read_once() -> None:
    rest, versions = torch.arange(10, dtype=torch.uint8), [0]
    store = PeerStore(torch.empty(10, dtype=torch.uint8), rest, lambda: versions[0])
    slot = torch.empty(10, dtype=torch.uint8)
    store.fill(slot)
    rest.add_(1)
    store.fill(slot)
    assert slot[0] == 0  # nobody has said that it changed
    versions[0] = 1
    store.fill(slot)
    assert torch.equal(slot, rest)


@pytest.mark.parametrize(
    "options", [{"store": "peer"}, {"peer_device": "cpu"}, {"store": "disk", "peer_device": "cpu"}]
)
def test_store_and_device_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="go together"):
        apply_group_offloading(_model(), "cpu", **options)
