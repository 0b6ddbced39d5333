"""What is added, changed or taken away while the offloading of a module is open for changes."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from vramkit.casting import apply_layerwise_casting
from vramkit.offload import apply_group_offloading, load_mapped, offload_of
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.offload.offloaded import editable
from vramkit.offload.partition import partition


class Adapted(nn.Module):
    """A linear layer with another one beside it, in a container as PEFT has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"a": nn.Linear(base.in_features, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_A["a"](x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def mapped_net(folder: Path) -> Net:
    torch.manual_seed(1)
    state = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    write_checkpoint(folder / "net.safetensors", state)
    with torch.device("meta"):
        net = Net()
    load_mapped(net, folder / "net.safetensors")
    return net.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def adapt(net: Net) -> None:
    torch.manual_seed(2)
    net.blocks[1] = Adapted(net.blocks[1]).requires_grad_(requires_grad=False)
    net.blocks[2].weight.mul_(1.5)


def test_what_is_added_to_a_module_on_disk_rests_in_memory(tmp_path: Path) -> None:
    resident, streamed = mapped_net(tmp_path), mapped_net(tmp_path)
    handle = apply_group_offloading(streamed, "cpu", store="disk")
    x = torch.randn(3, 64)
    streamed(x)
    adapt(resident)
    with editable(streamed):
        adapt(streamed)
    assert torch.equal(streamed(x), resident(x))
    assert handle.stats().stores["pageable"] > 0
    assert handle.stats().stores["disk"] > 0


def test_casting_a_module_on_disk(tmp_path: Path) -> None:
    resident, streamed = mapped_net(tmp_path), mapped_net(tmp_path)
    apply_group_offloading(streamed, "cpu", store="disk")
    for net in (resident, streamed):
        apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(streamed(x), resident(x))


def test_files_of_what_was_taken_away_go(tmp_path: Path) -> None:
    net = mapped_net(tmp_path)
    handle = apply_group_offloading(net.to(torch.float64), "cpu", offload_to_disk_path=tmp_path / "spill")
    x = torch.randn(3, 64, dtype=torch.float64)
    plain, files = net(x), spilled_bytes(tmp_path)
    base = net.blocks[1]
    for _ in range(3):
        with handle.edit():
            net.blocks[1] = Adapted(base).double().requires_grad_(requires_grad=False)
            net.blocks[1].lora_A = copy.deepcopy(net.blocks[1].lora_A)  # fresh tensors, as those that are loaded
        assert not torch.equal(net(x), plain)
        assert spilled_bytes(tmp_path) > files
        with handle.edit():
            net.blocks[1] = base
        assert torch.equal(net(x), plain)
        assert spilled_bytes(tmp_path) == files
    handle.remove()
    assert torch.equal(net(x), plain)


def spilled_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "spill").rglob("*.bin"))


def test_containers_of_adapters_are_no_blocks() -> None:
    net = Net()
    net.first = Adapted(nn.Linear(64, 16))
    units = partition(net, granularity="block_level").units
    assert [unit.name for unit in units] == ["first", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]


def test_casting_leaves_adapters_wide(tmp_path: Path) -> None:
    net = mapped_net(tmp_path)
    adapt(net)
    apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=None)
    assert type(net.blocks[1].base_layer.weight).__name__ == "NarrowTensor"
    assert type(net.blocks[1].lora_A["a"].weight) is nn.Parameter
    assert offload_of(net) is None


def test_an_engine_may_be_collected_while_others_build_modules() -> None:
    held = [nn.Linear(2, 2)]
    apply_group_offloading(held[0], "cpu")

    def drop(*_arguments: object) -> None:
        held.clear()
        gc.collect()

    handles = [register_module_module_registration_hook(hook) for hook in (drop, lambda *_arguments: None)]
    try:
        nn.Sequential(nn.Linear(2, 2))
    finally:
        for handle in handles:
            handle.remove()
    assert not held


def test_removed_inside_it_is_removed() -> None:
    net, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).eval(), torch.randn(2, 8)
    offload = apply_group_offloading(net, "cpu")
    with offload.edit():
        assert offload.is_edited
        offload.remove()
        assert not offload.is_edited
    assert offload_of(net) is None
    with torch.no_grad():
        net(x)
    assert not offload.is_active
