"""What a rehearsal counts: memory of the device alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vramkit.planning import plan


class Net(nn.Module):
    """A layer whose result may be worked on in host memory."""

    def __init__(self, *, to_host: bool) -> None:
        super().__init__()
        self.layer, self.to_host = nn.Linear(1024, 1024), to_host

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return (y.cpu().double() * 2).movedim(0, 1).numpy() if self.to_host else y


def activations_of(net: nn.Module) -> int:
    found = plan(net, "1GiB", device="cuda", example=(torch.empty(4096, 1024, device="meta"),))
    return found.phases[0].activation_bytes


def test_what_is_computed_in_host_memory_takes_none_of_the_device() -> None:
    assert activations_of(Net(to_host=True)) <= activations_of(Net(to_host=False))
