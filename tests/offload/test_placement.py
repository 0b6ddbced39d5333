"""What somebody still has of a weight when its group leaves the device is the weight, as on a model that stays there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from sweeps import sweep
from torch import nn

from vramkit.errors import ConflictError, TrainingError
from vramkit.offload import apply_group_offloading

WIDTH = 32
WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "block_1": {"slots": 1},
    "leaf_small": {"offload_type": "leaf_level", "unit_bytes": 5000, "slots": 1},
    "model": {"offload_type": "model_level"},
}
every_way = pytest.mark.parametrize("way", WAYS)


def tokens() -> torch.Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _strict() -> None:
    """In place of the one of all tests: under a mode torch does not count foreach writes, and some read what rests."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x))) @ self.gain


class Trunk(nn.Module):
    def __init__(self, run: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block() for _ in range(5))
        self.run = run
        self.kept: list[torch.Tensor] = []

    def blocks_in_turn(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def pair(run: Callable[[Any, torch.Tensor], torch.Tensor]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = Trunk(run).eval().requires_grad_(False)
    return module, copy.deepcopy(module)


def assert_same(module: nn.Module, reference: nn.Module, calls: int = 3) -> None:
    with torch.no_grad():
        for _ in range(calls):
            assert torch.equal(module(tokens()), reference(tokens()))


def writing_late(view: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Write through a view of a weight after its group has left the device."""

    def run(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        part = view(trunk.blocks[1].gain)
        x = trunk.blocks_in_turn(x @ trunk.blocks[3].gain @ trunk.blocks[4].gain)
        part.mul_(0.9)
        return x

    return run


def keeping(view: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Keep a view beyond the pass, and write to it in each."""

    def run(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        x = trunk.blocks_in_turn(x)
        if not trunk.kept:
            trunk.kept.append(view(trunk.blocks[1].gain))
        trunk.kept[0].mul_(0.9)
        return x @ trunk.kept[0].view(-1)[: WIDTH * WIDTH].view(WIDTH, WIDTH)

    return run


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "view": lambda weight: weight.view(-1),
    "data": lambda weight: weight.data,
    "view of data": lambda weight: weight.data.view(-1),
    "detached": lambda weight: weight.detach(),
}


@sweep("way view writing", product(WAYS, VIEWS, [writing_late, keeping]))
def test_what_is_written_through_a_view_is_kept_whenever_it_is_written(way: str, view: str, writing: Any) -> None:
    module, reference = pair(writing(VIEWS[view]))
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    assert_same(module, reference)
    held, expected = module.state_dict(), reference.state_dict()
    offload.remove()
    for state in (held, module.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@every_way
def test_a_view_that_is_kept_sees_what_is_written_at_rest(way: str) -> None:
    def run(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        x = trunk.blocks_in_turn(x)
        if not trunk.kept:
            trunk.kept.append(trunk.blocks[1].gain.t())
        return x @ trunk.kept[0]

    module, reference = pair(run)
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    assert_same(module, reference)
    for each in (module, reference):
        with torch.no_grad():
            each.blocks[1].gain.mul_(2)
    assert_same(module, reference)
    offload.remove()


@every_way
def test_a_view_outlives_a_second_use_of_its_group_in_the_pass(way: str) -> None:
    def run(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        view = trunk.blocks[1].gain.view(-1)
        x = trunk.blocks_in_turn(trunk.blocks_in_turn(x))
        return x @ view.view(WIDTH, WIDTH)

    module, reference = pair(run)
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    assert_same(module, reference)
    assert offload.stats().kept_bytes == 0
    offload.remove()


@every_way
def test_data_that_was_looked_at_keeps_nothing(way: str) -> None:
    def run(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        for block in trunk.blocks:
            x = block(x) * block.gain.data.mean() + block.up.weight.data[0, 0]
        return x

    module, reference = pair(run)
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    assert_same(module, reference)
    assert offload.stats().kept_bytes == 0
    offload.remove()


@every_way
def test_a_state_dict_in_a_forward_has_what_was_written_and_disturbs_nothing(way: str) -> None:
    def run(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        x = trunk.blocks_in_turn(x)
        trunk.blocks[1].gain.mul_(0.9)
        saved = trunk.state_dict()["blocks.1.gain"].clone()
        return trunk.blocks[1](x) @ saved.to(x.device) @ trunk.blocks[1].gain

    module, reference = pair(run)
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    assert_same(module, reference)
    offload.remove()


@pytest.mark.parametrize("way", ["block", "block_1", "leaf_small"])
def test_a_weight_that_is_replaced_where_it_rests_is_refused_and_not_hidden(way: str) -> None:
    def exchange(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        x = trunk.blocks_in_turn(x)
        trunk.blocks[1].gain, trunk.blocks[3].gain = trunk.blocks[3].gain, trunk.blocks[1].gain
        return trunk.blocks_in_turn(x)

    def other_weights(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        weights = dict(trunk.blocks[0].named_parameters())
        return torch.func.functional_call(trunk.blocks[3], weights, (trunk.blocks_in_turn(x),))

    for run in (exchange, other_weights):
        module, _ = pair(run)
        offload = apply_group_offloading(module, "cpu", **WAYS[way])
        with pytest.raises(ConflictError, match=r"(gain|weight|bias) was (given another|replaced)"):
            assert_same(module, module, calls=1)  # two calls: where it stays on the device the second one is refused
        offload.remove()


def test_an_operation_on_a_weight_at_rest_that_asks_for_gradients_is_refused() -> None:
    def gradients(trunk: Any, x: torch.Tensor) -> torch.Tensor:
        def chain(start: torch.Tensor) -> torch.Tensor:
            for block in trunk.blocks:
                start = start @ block.gain
            return start.sum()

        return torch.func.grad(chain)(x)

    module, _ = pair(gradients)
    offload = apply_group_offloading(module, "cpu", slots=1)
    with torch.no_grad(), pytest.raises(TrainingError, match="asks for gradients"):
        module(tokens())
    offload.remove()


# --- outside a pass, and through what torch asks no class about


UNTRACED: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy of detached": lambda weight: weight.detach().numpy().__imul__(0.5),
    "numpy of data": lambda weight: weight.data.numpy().__imul__(0.5),
    "data of detached": lambda weight: weight.detach().data.mul_(0.5),
    "dlpack": lambda weight: torch.from_dlpack(weight.detach()).mul_(0.5),
    "foreach": lambda weight: torch._foreach_mul_([weight], 0.5),
}
REPLACING: dict[str, Callable[[torch.Tensor], Any]] = {
    "set_": lambda weight: weight.set_(weight.detach() * 2),
    "swap_tensors": lambda weight: torch.utils.swap_tensors(weight, nn.Parameter(weight * 2, requires_grad=False)),
}


@every_way
@pytest.mark.parametrize("write", UNTRACED)
def test_what_is_written_between_calls_is_seen_in_whatever_way(write: str, way: str) -> None:
    module, reference = pair(lambda trunk, x: trunk.blocks_in_turn(x))
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    for at in (0, 1, 4):
        assert_same(module, reference, calls=1)
        for each in (module, reference):
            with torch.no_grad():
                UNTRACED[write](each.blocks[at].gain)
                UNTRACED[write](each.blocks[at].up.bias)
        assert_same(module, reference, calls=2)
    offload.remove()


@every_way
@pytest.mark.parametrize("replace", REPLACING)
def test_other_memory_is_refused_in_whatever_way(replace: str, way: str) -> None:
    module, _ = pair(lambda trunk, x: trunk.blocks_in_turn(x))
    offload = apply_group_offloading(module, "cpu", **WAYS[way])

    def replace_and_call() -> None:
        REPLACING[replace](module.blocks[1].up.weight)
        module(tokens())

    with torch.no_grad(), pytest.raises(ConflictError, match=r"other memory|was replaced"):
        replace_and_call()
    offload.remove()


@every_way
def test_a_parameter_of_two_models_is_right_in_both(way: str) -> None:
    both = [pair(lambda trunk, x: trunk.blocks[3](trunk.blocks_in_turn(x) @ trunk.blocks[3].gain)) for _ in range(2)]
    (one, _), (other, _) = both
    for first, second in zip(*both, strict=True):
        second.blocks[3].gain = first.blocks[3].gain
        second.blocks[1].up.weight = first.blocks[1].up.weight
    offloads = [apply_group_offloading(module, "cpu", **WAYS[way]) for module in (one, other)]
    for offload in (None, *offloads):
        if offload is not None:
            offload.remove()
        for module, reference in (*both, *both):
            with torch.no_grad():
                module.blocks[3].gain.mul_(0.9)
                reference.blocks[3].gain.mul_(0.9)
            assert_same(module, reference, calls=2)
    assert {type(parameter) for module in (one, other) for parameter in module.parameters()} == {nn.Parameter}


READS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "as_subclass": lambda block, x: x @ block.gain.as_subclass(torch.Tensor),
    "a copy": lambda block, x: x @ copy.deepcopy(block.gain),
    "a copied part": lambda block, x: copy.deepcopy(block.up)(x)[..., :WIDTH],
}


@every_way
@pytest.mark.parametrize("read", READS)
def test_what_torch_asks_no_class_about_is_read_on_the_device(read: str, way: str, strict: None) -> None:
    module, reference = pair(lambda trunk, x: torch.stack([READS[read](block, x) for block in trunk.blocks]))
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    assert_same(module, reference)
    offload.remove()
