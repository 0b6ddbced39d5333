"""What a rehearsal counts: memory of the device alone, and as much as there can be where sizes are values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vramkit import fit, plan
from vramkit.planning.ledger import Ledger


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


class Normed(nn.Module):
    """Layers of one kind, each of which keeps the weight that its norm computes before a call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 64))) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        return nn.Sequential(*self.blocks)(x)


class Chosen(nn.Module):
    """A layer, and then what `choose` makes of its result."""

    def __init__(self, choose: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.choose = nn.Linear(64, 64), choose

    def forward(self, x: torch.Tensor) -> Any:
        return self.choose(self.layer(x))


def rehearsed_bytes(choose: Callable[[torch.Tensor], Any]) -> int:
    """What it takes beside its weights and its argument; half of the budget is kept where a call cannot be rehearsed."""
    found = plan(Chosen(choose), "1GiB", device="cpu", example=(torch.ones(128, 64),)).phases[0].activation_bytes
    assert found < 2**20
    return found


def experts_of(y: torch.Tensor) -> torch.Tensor:
    """Each row by two of eight experts, as many rows at once as have chosen one."""
    chosen = y[:, :8].topk(2).indices.view(-1)
    rows, end = chosen.argsort() // 2, 0
    for count in chosen.bincount(minlength=8).tolist():
        y = y.index_add(0, rows[end : end + count], y[rows[end : end + count]])
        end += count
    return y


MASK = torch.arange(128) < 32
BY_VALUES: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
    # the most rows [64] in float32 that can be alive beside the result of the layer
    "a mask that is known": (lambda y: y[MASK], 32),
    "a mask of one axis that is not": (lambda y: y[y[:, 0] > 0], 128 + 2),
    "selected by a known mask": (lambda y: y.masked_select(MASK[:, None]), 32 + 1),
    "values once": (lambda y: y.unique_consecutive(dim=0), 128 + 8),
    "experts": (experts_of, 3 * 128 + 16),
}


@pytest.mark.parametrize("name", BY_VALUES)
def test_results_whose_size_is_a_value_are_as_large_as_they_can_be(name: str) -> None:
    choose, rows = BY_VALUES[name]
    alone = rehearsed_bytes(lambda y: y)
    assert rehearsed_bytes(choose) - alone <= rows * 64 * 4


@pytest.mark.parametrize(
    "choose",
    [
        lambda y: y[torch.tensor([True, False] * 64)[:, None].expand(128, 64)],
        lambda y: y.unique(return_inverse=True, return_counts=True),
        lambda y: y.unique(dim=0),
        lambda y: y.argmax(-1).bincount(),
        lambda y: y if torch.allclose(y, y) else -y,
        lambda y: y.quantile(0.5, dim=1),
        lambda y: y.quantile(torch.tensor([0.5, 0.9]), dim=1),
        lambda y: y[:, :1].squeeze_(1).expand(2, 128),
        lambda y: y[:64].unsqueeze_(0).expand(2, 64, 64),
        lambda y: torch._grouped_mm(y, y.view(2, 64, 64), offs=torch.tensor([64, 128], dtype=torch.int32)),
    ],
)
def test_what_needs_values_is_rehearsed(choose: Callable[[torch.Tensor], Any]) -> None:
    rehearsed_bytes(choose)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_rehearsed(kind: type[nn.Module]) -> None:
    found = plan(kind(8, 8), "1GiB", device="cpu", example=(torch.ones(4, 1, 8),))
    assert found.phases[0].activation_bytes < 2**20


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_norms_compute_count_for_each_block_and_need_not_be_there_yet() -> None:
    net, x = Normed(), torch.ones(2, 64)
    assert not net.blocks[0][0].weight.is_leaf
    with torch.no_grad(), fit(net, "1GiB", device="cpu", example=(x,)) as fitted:
        found = net(x)
    assert torch.equal(found, net(x))
    assert 0 <= fitted.plan.phases[0].activation_bytes - 4 * 64 * 64 * 4 <= 4096


def test_large_results_of_views_that_repeat_few_values_are_counted_and_not_made() -> None:
    without_memory: list[bool] = []

    def masked(hidden: torch.Tensor) -> torch.Tensor:
        places = torch.arange(60_000, dtype=torch.int32)
        mask = torch.le(*torch.meshgrid(places, places, indexing="xy"))
        without_memory.append(mask.is_meta)
        return hidden

    found = plan(Chosen(masked), "8GiB", device="cpu", example=(torch.ones(128, 64),))
    assert without_memory
    assert all(without_memory)
    assert found.phases[0].activation_bytes >= 60_000**2


def workspace_bytes(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> int:
    """What a convolution, without a border, adds to the peak on an accelerator beside its result."""
    ledger, convolve = Ledger({}, {}, on_accelerator=True), F.conv3d if x.ndim == 5 else F.conv2d
    with ledger:
        y = convolve(x, weight, **options)
    assert y.is_contiguous() == x.is_contiguous()  # as cuDNN lays it
    return ledger.peak_bytes - y.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("sizes", "layout"), [((5, 32, 32), torch.channels_last_3d), ((96, 96), torch.channels_last)])
def test_convolutions_take_once_more_what_has_its_channels_not_innermost(
    sizes: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.empty(1, 8, *sizes, dtype=dtype, device="meta")
    weight = torch.empty(4, 8, *(3 for _ in sizes), dtype=dtype, device="meta")
    result = math.prod(size - 2 for size in sizes) * 4 * dtype.itemsize
    assert workspace_bytes(x, weight) == x.nbytes + result + weight.nbytes
    x = x.contiguous(memory_format=layout)
    assert workspace_bytes(x, weight) == weight.nbytes
    assert workspace_bytes(x[..., 1:], weight) == x[..., 1:].nbytes + weight.nbytes


def test_products_of_each_position_or_channel_take_nothing_once_more() -> None:
    x = torch.empty(1, 8, 64, 64, device="meta")
    assert workspace_bytes(x, torch.empty(4, 8, 1, 1, device="meta")) == 0
    assert workspace_bytes(x, torch.empty(8, 1, 3, 3, device="meta"), groups=8) == 0


def test_convolutions_to_three_channels_take_their_input_once_more_in_32_bits() -> None:
    weight = torch.empty(3, 8, 3, 3, 3, device="meta")
    x = torch.empty(1, 8, 5, 32, 32, device="meta").contiguous(memory_format=torch.channels_last_3d)
    assert workspace_bytes(x, weight) == x.nbytes + 3 * 3 * 30 * 30 * 4 + weight.nbytes
    assert workspace_bytes(x.bfloat16(), weight.bfloat16()) == weight.nbytes // 2


def test_views_that_operators_do_not_tell_of_take_nothing_however_often_they_are_made() -> None:
    """``_unsafe_view`` returns what lies in its argument, and its schema does not say so."""

    def choose(y: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            y = torch.ops.aten._unsafe_view(y, [64 * 64, 64])
            y = torch.ops.aten._unsafe_view(y, [64, 64, 64])
        return y

    def taken(choose: Callable[[torch.Tensor], Any]) -> int:
        x = torch.empty(64, 64, 64, device="meta")
        return plan(Chosen(choose), "1GiB", device="cpu", example=(x,)).phases[0].activation_bytes

    assert taken(choose) == taken(lambda y: y)
