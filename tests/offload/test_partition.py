from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from modules import AttentionNet, Block, BlockNet, NestedNet, TableNet, TwiceNet
from torch import nn

from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading
from vramkit.offload.partition import Unit, partition, slot_bytes_for


def names(root: nn.Module, units: tuple[Unit, ...]) -> list[list[str]]:
    known = {module: name for name, module in root.named_modules()}
    return [[known[entry] for entry in unit.entries] for unit in units]


def unit_bytes(unit: Unit) -> int:
    return sum(p.numel() * p.element_size() for holder in unit.holders for p in holder.parameters(recurse=False))


def test_every_block_of_every_list_is_a_unit_at_any_depth() -> None:
    net = NestedNet()
    units = partition(net, granularity="block_level").units
    expected = [[f"body.stages.{i}.{j}"] for i in range(3) for j in range(2)]
    assert names(net, units)[:6] == expected
    assert names(net, units)[6:] == [["tail.0"], ["tail.1.0"], ["tail.2"]]  # a container is not entered


def test_blocks_travel_in_groups_and_the_last_group_may_be_smaller() -> None:
    net = BlockNet(blocks=7)
    units = partition(net, granularity="block_level", blocks_per_group=3).units
    blocks = [group for group in names(net, units) if group[0].startswith("blocks")]
    assert blocks == [[f"blocks.{i}" for i in part] for part in (range(3), range(3, 6), range(6, 7))]


def _linears(count: int, width: int, *, device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(count)))


def test_small_blocks_travel_together_unless_their_number_is_given() -> None:
    stack = _linears(320, 8)
    units = partition(stack, granularity="block_level").units
    assert [len(unit.entries) for unit in units] == [10] * 32  # a 32nd of the model each
    assert [entry for unit in units for entry in unit.entries] == list(stack)
    assert len(partition(stack, granularity="block_level", blocks_per_group=1).units) == 320
    assert max(map(unit_bytes, partition(stack, granularity="block_level", unit_bytes=600).units)) == 512
    offload = apply_group_offloading(stack, "cpu")
    assert offload.stats().groups == 32
    offload.remove()
    offload = apply_group_offloading(stack, "cpu", num_blocks_per_group=1)
    assert offload.stats().groups == 320
    offload.remove()


@pytest.mark.parametrize(
    ("width", "count", "together"),
    [(2048, 400, 1), (1024, 400, 4), (1024, 40, 1), (1024, 3, 1)],  # 16 MiB each, and 4: of 400 or of few
)
def test_blocks_that_reach_the_speed_of_the_link_travel_alone(width: int, count: int, together: int) -> None:
    units = partition(_linears(count, width, device="meta"), granularity="block_level").units
    assert {len(unit.entries) for unit in units} == {together}


def test_named_blocks_are_the_only_ones() -> None:
    net = NestedNet()
    units = partition(net, granularity="block_level", block_names=["body.stages.1"]).units
    assert [u for u in names(net, units) if u[0].startswith("body.stages.1")] == [
        ["body.stages.1.0"],
        ["body.stages.1.1"],
    ]


def test_named_single_module_is_a_block() -> None:
    net = BlockNet()
    assert ["head"] in names(net, partition(net, granularity="block_level", block_names=["head"]).units)


def test_blocks_are_cut_to_a_number_of_bytes() -> None:
    net = BlockNet()
    limit = 20_000
    units = partition(net, granularity="block_level", unit_bytes=limit).units
    assert max(map(unit_bytes, units)) <= limit
    assert len(units) == 14
    held = [id(holder) for unit in units for holder in unit.holders]
    assert len(held) == len(set(held))


def test_leaf_units_join_small_neighbours_up_to_the_limit() -> None:
    net = BlockNet()
    whole = partition(net, granularity="leaf_level", unit_bytes=2**30).units
    single = partition(net, granularity="leaf_level", unit_bytes=1).units
    assert len(whole) == 1
    assert all(len(unit.entries) == 1 for unit in single)
    for limit in (20_000, 40_000, 100_000):
        units = partition(net, granularity="leaf_level", unit_bytes=limit).units
        assert max(map(unit_bytes, units)) <= limit
        neighbours = itertools.pairwise(units)
        assert all(unit_bytes(a) + unit_bytes(b) > limit for a, b in neighbours)


@pytest.mark.parametrize("granularity", ["block_level", "leaf_level", "model_level"])
@pytest.mark.parametrize("kind", [BlockNet, NestedNet, TableNet, TwiceNet, AttentionNet])
def test_no_module_is_entered_through_two_units(kind: type[nn.Module], granularity: str) -> None:
    units = partition(kind(), granularity=granularity).units  # type: ignore[arg-type]
    entries = [id(entry) for unit in units for entry in unit.entries]
    assert len(entries) == len(set(entries))


def test_a_class_that_says_so_travels_only_whole() -> None:
    class Chunked(Block):
        offload_unit = True

    net = nn.ModuleList([Chunked(), Chunked()])
    units = partition(net, granularity="leaf_level", unit_bytes=1).units
    assert names(net, units) == [["0"], ["1"]]
    units = partition(net, granularity="block_level", unit_bytes=1).units
    assert names(net, units) == [["0"], ["1"]]


def test_modules_that_read_their_childrens_weights_travel_whole() -> None:
    net = AttentionNet()
    found = {name for unit in names(net, partition(net, granularity="leaf_level", unit_bytes=1).units) for name in unit}
    assert {"layers.0", "layers.3", "rnn", "conv"} <= found
    assert not any("out_proj" in name for name in found)


def test_containers_are_never_entered() -> None:
    net = NestedNet()
    for granularity in ("block_level", "leaf_level", "model_level"):
        for unit in partition(net, granularity=granularity).units:  # type: ignore[arg-type]
            assert not any(isinstance(entry, nn.ModuleList | nn.Sequential) for entry in unit.entries)


def test_large_tables_outside_blocks_are_looked_up_and_small_layers_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(2**17, 48)  # 24 MiB
            self.some = nn.Embedding(1000, 48)
            self.few = nn.Embedding(2, 48)
            self.normed = nn.Embedding(2**17, 48, max_norm=1.0)  # its lookup writes to it
            self.blocks = nn.ModuleList(Block() for _ in range(6))
            self.norm = nn.LayerNorm(48)

    with torch.device("meta"):
        net = Net()
    for granularity in ("block_level", "leaf_level"):
        parts = partition(net, granularity=granularity)  # type: ignore[arg-type]
        assert parts.tables == (net.tokens,)
        held = {holder for unit in parts.units for holder in unit.holders}
        assert net.norm not in held
        assert net.few not in held
        assert net.normed in held


def test_the_meta_device_is_enough() -> None:
    with torch.device("meta"):
        net = BlockNet()
    assert len(partition(net, granularity="block_level").units) >= 7
    assert module_bytes(net) > 0


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_slots_serve_equal_units_and_hold_the_widest(slots: int) -> None:
    assert slot_bytes_for([10_000] * 20, slots) == 12_288
    assert slot_bytes_for([], slots) == 0
    sizes = [4096] * 100 + [4096 * 3]
    slot_bytes = slot_bytes_for(sizes, slots)
    assert slot_bytes * slots >= max(sizes)
    assert slot_bytes == {1: 12_288, 2: 8192, 3: 4096, 4: 4096}[slots]


def test_slots_fit_the_wide_when_they_are_many() -> None:
    assert slot_bytes_for([4096] * 10 + [8192] * 10, 3) == 8192


@pytest.mark.parametrize("granularity", ["block_level", "leaf_level"])
def test_a_deeper_tree_is_walked_no_more_often(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)
            self.below = Deep(depth - 1) if depth else nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.below(self.own(x))

    walked = [0]
    children = nn.Module.children

    def counted(module: nn.Module) -> Iterator[nn.Module]:
        walked[0] += 1
        return children(module)

    def walks_for_each_level(depth: int) -> float:
        net = Deep(depth)
        walked[0] = 0
        partition(net, granularity=granularity)
        return walked[0] / depth

    monkeypatch.setattr(nn.Module, "children", counted)
    assert walks_for_each_level(80) < 1.2 * walks_for_each_level(20)
