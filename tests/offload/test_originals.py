"""Acceptance 27: shapes of the published repositories' code, written for CUDA, run unchanged at every level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from originals import ORIGINALS

from vramkit.offload import apply_group_offloading

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "block_1": {"slots": 1},
    "leaf": {"offload_type": "leaf_level", "unit_bytes": 8000},
    "leaf_1": {"offload_type": "leaf_level", "unit_bytes": 8000, "slots": 1},
    "model": {"offload_type": "model_level"},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_original_gives_the_same_bytes(name: str, way: str, device: str) -> None:
    make, call = ORIGINALS[name]
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        both.append(make().eval().requires_grad_(False))
    module, reference = both[0], both[1].to(device)
    at_rest = [parameter.data_ptr() for parameter in module.parameters()]
    offload = apply_group_offloading(module, device, **WAYS[way])
    assert offload.stats().groups > 0
    with torch.no_grad():
        for at in range(3):
            got, expected = call(module, lambda x: x.to(device)), call(reference, lambda x: x.to(device))
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.device == theirs.device
                assert torch.equal(ours, theirs), f"call {at}"
                assert torch.isfinite(ours).all()
    assert offload.stats().loaded_bytes > 0
    offload.remove()
    assert vars(module).keys() == vars(reference).keys()
    assert {type(parameter) for parameter in module.parameters()} == {torch.nn.Parameter}
    assert at_rest == [parameter.data_ptr() for parameter in module.parameters()] or device != "cpu"
    held = zip(module.parameters(), reference.parameters(), strict=True)
    assert all(ours.device.type == "cpu" and torch.equal(ours, theirs.cpu()) for ours, theirs in held)
