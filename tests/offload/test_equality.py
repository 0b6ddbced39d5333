"""Acceptance 1-4: offloaded modules compute the same bytes, whatever the mode, the store, the slots and the delays."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from modules import CASES, WIDTH, BlockNet, Codec, OrderNet, mapped_copy, tokens
from sweeps import sweep
from torch import nn

from vramkit.offload import apply_group_offloading, offload_of
from vramkit.offload.stores import DiskStore, PageableStore

LEVELS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "two_blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "cut_blocks": {"offload_type": "block_level", "unit_bytes": 20_000},
    "leaf": {"offload_type": "leaf_level"},
    "tiny_leaf": {"offload_type": "leaf_level", "unit_bytes": 1},
    "half_resident": {"offload_type": "block_level", "resident": 100_000},
    "model": {"offload_type": "model_level"},
}
STORES = ("ram", "file", "file_direct", "file_pageable", "spilled")


def offloaded(model: nn.Module, store: str, folder: Path, **options: Any) -> nn.Module:
    """Return a copy of `model` that is offloaded on the CPU, with its weights in the given kind of place."""
    places: dict[str, dict[str, Any]] = {
        "ram": {"store": "pageable"},
        "file": {"store": "disk"},
        "file_direct": {"store": "disk", "direct_io": True},
        "file_pageable": {"store": "pageable"},
        "spilled": {"offload_to_disk_path": folder / "spill"},
    }
    module = mapped_copy(model, folder) if store.startswith("file") else copy.deepcopy(model)
    apply_group_offloading(module, "cpu", **places[store], **options)
    return module


def handle(module: nn.Module) -> Any:
    from vramkit.offload import offload_of

    found = offload_of(module)
    assert found is not None
    return found


# Every model at every level with every number of slots; the stores take turns, and one model meets every one of them.
GRID = [
    (case, level, store, slots)
    for at, case in enumerate(CASES)
    for by, level in enumerate(LEVELS)
    for slots in (1, 2, 3)
    for turn, store in enumerate(STORES)
    if case == "blocks" or turn == (at + by + slots) % len(STORES)
]


@sweep("case level store slots", GRID)
def test_three_forwards_are_the_same_bytes_as_resident(
    case: str, level: str, store: str, slots: int, tmp_path: Path
) -> None:
    build, arguments = CASES[case]
    model = build().eval()
    module = offloaded(model, store, tmp_path, slots=slots, **LEVELS[level])
    with torch.no_grad():
        for _ in range(3):
            args = arguments()
            assert torch.equal(module(*args), model(*args))
    stats = handle(module).stats()
    assert stats.returned_bytes == 0
    assert stats.loaded_bytes > 0 or stats.streamed_bytes == 0
    handle(module).remove()


@pytest.mark.parametrize("level", ["block", "leaf", "model"])
def test_streaming_really_streams(level: str, tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = offloaded(model, "file", tmp_path, **LEVELS[level])
    with torch.inference_mode():
        for _ in range(3):
            module(tokens(8))
    stats = handle(module).stats()
    assert stats.passes == 3
    assert stats.stores.keys() == {"disk"}
    assert 0.98 * stats.streamed_bytes <= stats.stores["disk"] <= stats.streamed_bytes  # the rest is alignment
    assert stats.loaded_bytes >= 3 * stats.streamed_bytes
    assert stats.dropped_loads == 0
    assert stats.demand_loads <= (3 if level == "model" else 1)
    total = sum(p.numel() * 4 for p in model.parameters())
    assert stats.streamed_bytes + stats.resident_bytes >= total
    handle(module).remove()


@pytest.fixture(params=["slow_copies", "slow_compute", "both"])
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sleep in every fill of a slot, in every linear layer, or in both at uneven times."""

    def sleepy(method: Any, seconds: float, every: int) -> Any:
        calls = iter(range(10**9))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) % every == 0:
                time.sleep(seconds)
            return method(*args, **kwargs)

        return wrapper

    if request.param != "slow_compute":
        for store in (DiskStore, PageableStore):
            monkeypatch.setattr(store, "fill", sleepy(store.fill, 0.002, 1 if request.param == "slow_copies" else 3))
    if request.param != "slow_copies":
        monkeypatch.setattr(nn.Linear, "forward", sleepy(nn.Linear.forward, 0.001, 2))
    return str(request.param)


@sweep("store level slots", product(["file", "ram"], ["block", "leaf", "model"], [1, 2, 3]))
def test_delays_change_no_byte(store: str, level: str, slots: int, delay: str, tmp_path: Path) -> None:
    model = BlockNet(blocks=5).eval()
    module = offloaded(model, store, tmp_path, slots=slots, **LEVELS[level])
    with torch.inference_mode():
        for _ in range(3):
            x = tokens(8)
            assert torch.equal(module(x), model(x))
    handle(module).remove()


ORDERS = {
    "skip": [[0, 1, 2, 3, 4, 5], [0, 2, 4], [0, 2, 4], [0, 1, 2, 3, 4, 5]],
    "skip_first_and_last": [[0, 1, 2, 3, 4, 5], [2, 3], [0, 1, 2, 3, 4, 5], [5], [0]],
    "repeat": [[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 2, 3], [2, 2, 2], [0, 0, 1, 1, 2, 2]],
    "reorder": [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2], [5, 4, 3, 2, 1, 0]],
    "new_branch": [[0, 1, 2], [0, 1, -1, 2], [3, -1, 4, -1], [0, 1, 2]],
    "nothing": [[0, 1, 2, 3, 4, 5], [], [], [0, 1, 2, 3, 4, 5]],
    "prefix": [[0, 1, 2, 3, 4, 5], [0, 1], [0, 1], [0, 1], [0, 1, 2, 3, 4, 5]],
}


@sweep("orders level slots", product(ORDERS, ["block", "two_blocks", "cut_blocks", "leaf", "half_resident"], [1, 2, 3]))
def test_calls_that_differ_from_the_one_before_are_right(orders: str, level: str, slots: int, tmp_path: Path) -> None:
    model = OrderNet().eval()
    module = offloaded(model, "file", tmp_path, slots=slots, **LEVELS[level])
    with torch.inference_mode():
        for order in ORDERS[orders]:
            x = tokens(48)
            assert torch.equal(module(x, order), model(x, order))
    handle(module).remove()


def test_random_orders_are_right_and_never_leave_the_ring(tmp_path: Path) -> None:
    model = OrderNet().eval()
    module = offloaded(model, "file", tmp_path, slots=2, offload_type="block_level")
    ring = handle(module)._engine.ring
    made: list[int] = []
    ring.make = lambda size_bytes: made.append(size_bytes) or pytest.fail("memory outside the ring was taken")
    generator = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        for _ in range(40):
            order = torch.randint(-1, 6, (int(torch.randint(0, 9, (), generator=generator)),), generator=generator)
            x = tokens(48)
            assert torch.equal(module(x, order.tolist()), model(x, order.tolist()))
    handle(module).remove()


@pytest.mark.parametrize("level", ["block", "leaf", "model"])
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("first", ["encode", "decode", "forward"])
def test_any_entry_point_may_be_the_first_call(first: str, tiled: bool, level: str, tmp_path: Path) -> None:
    model = Codec().eval()
    model.use_tiling = tiled
    module = offloaded(model, "file", tmp_path, **LEVELS[level])
    x, z = tokens(8), tokens(48)
    with torch.inference_mode():
        for name in (first, "decode", "encode", "forward"):
            argument = z if name == "decode" else x
            assert torch.equal(getattr(module, name)(argument), getattr(model, name)(argument))
    assert handle(module).stats().passes >= 3
    handle(module).remove()


def test_an_entry_point_named_by_the_user_is_one_pass(tmp_path: Path) -> None:
    class Model(OrderNet):
        def sample(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.blocks, *self.branch):
                x = block(x)
            return x

    model = Model().eval()
    module = offloaded(model, "file", tmp_path, entry_points=["sample"])
    with torch.inference_mode():
        for _ in range(3):
            x = tokens(48)
            assert torch.equal(module.sample(x), model.sample(x))
    stats = handle(module).stats()
    assert (stats.passes, stats.demand_loads, stats.dropped_loads) == (3, 0, 0)
    handle(module).remove()
    assert "sample" not in vars(module)


def test_a_block_called_by_itself_works(tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = offloaded(model, "file", tmp_path)
    x = tokens(48)
    with torch.inference_mode():
        for index in (3, 3, 0, 6):
            assert torch.equal(module.blocks[index](x), model.blocks[index](x))
        y = tokens(8)
        assert torch.equal(module(y), model(y))
    handle(module).remove()


def test_an_entry_point_that_calls_itself_works(tmp_path: Path) -> None:
    class Sliced(Codec):
        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.decode(part) for part in z.split(1)]) if len(z) > 1 else super().decode(z)

    model = Sliced().eval()
    module = offloaded(model, "file", tmp_path)
    z = tokens(48, batch=3)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(module.decode(z), model.decode(z))
    handle(module).remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_converted_weights_are_the_same_bytes_as_a_converted_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = BlockNet().eval()
    module = mapped_copy(model, tmp_path, dtype=dtype)
    apply_group_offloading(module, "cpu", slots=2)
    model = model.to(dtype)
    with torch.inference_mode():
        x = tokens(8).to(dtype)
        assert torch.equal(module(x), model(x))
    handle(module).remove()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("options", [{}, {"slots": 1}, {"offload_type": "leaf_level"}, {"offload_type": "model_level"}])
@pytest.mark.parametrize("nested", [False, True])
def test_encoders_of_torch_keep_their_fused_kernels(options: dict[str, Any], nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 5, enable_nested_tensor=nested)).eval()
    x, padding = torch.randn(2, 6, 64), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        expected = module(x), module[0](x, src_key_padding_mask=padding)
        offload = apply_group_offloading(module, "cpu", **options)
        for _ in range(2):
            assert torch.equal(module(x), expected[0])
            assert torch.equal(module[0](x, src_key_padding_mask=padding), expected[1])
    offload.remove()
    assert all("forward" not in vars(part) for part in module.modules())


@pytest.mark.parametrize("options", [{}, {"offload_type": "model_level"}])
def test_an_encoder_layer_that_is_offloaded_by_itself_is_known_and_left(options: dict[str, Any]) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval()
    offload = apply_group_offloading(layer, "cpu", **options)
    assert offload_of(layer) is offload
    offload.remove()
    assert offload_of(layer) is None
    assert "forward" not in vars(layer)


class Noting(nn.Linear):
    """Notes whether its weight asks for gradients."""

    asks = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asks = self.weight.requires_grad
        return torch.tanh(super().forward(x.transpose(0, 1)).transpose(0, 1))


class Folding(nn.Module):
    """Products of a batch with weights, which torch folds into one product or not by whether they ask for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Noting(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("level", ["block", "leaf", "half_resident", "model"])
def test_weights_ask_for_gradients_as_they_do_at_rest_where_nothing_is_recorded(level: str) -> None:
    model = Folding().eval()
    model.blocks[2].requires_grad_(False)
    module = copy.deepcopy(model)
    offload = apply_group_offloading(module, "cpu", **LEVELS[level])
    x = torch.randn(3, 5, WIDTH)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        is_recording = mode is torch.enable_grad
        with mode():
            result, expected = module(x), model(x)
        assert is_recording or torch.equal(result, expected)
        torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=1e-6)
        assert [block.asks for block in module.blocks] == [not is_recording, not is_recording, False, not is_recording]
    offload.remove()
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"resident": "1GiB"}], ids=["travel", "stay"])
def test_autocast_keeps_no_copies_of_the_weights(options: dict[str, Any]) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512)) for _ in range(8))).eval()
    module, x = copy.deepcopy(model), torch.randn(2, 512)
    offload = apply_group_offloading(module, "cpu", **options)
    peaks_bytes = {}
    for keeps in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            expected = model(x)
            for _ in range(2):  # the second one goes through the ring as it is
                with LiveBytes(module.parameters()) as count:
                    assert torch.equal(module(x), expected)
        peaks_bytes[keeps] = count.peak_bytes
    assert peaks_bytes[True] < peaks_bytes[False] + 2 * 512 * 512 * 2  # of eight layers it had kept a copy each
    offload.remove()


class OpensAutocast(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.as_tensor(super().forward(x))


@pytest.mark.parametrize("level", ["block", "leaf", "half_resident"])
def test_autocast_that_a_forward_opens_keeps_no_copies_of_weights_that_travel(level: str) -> None:
    model = OpensAutocast(*(nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)) for _ in range(40))).eval()
    module, x = copy.deepcopy(model), torch.randn(2, 256)
    offload = apply_group_offloading(module, "cpu", **LEVELS[level])
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            with LiveBytes(module.parameters()) as count:
                assert torch.equal(module(x), expected)
    stats, layer_bytes = offload.stats(), 256 * 256 * 4
    assert count.peak_bytes < stats.resident_bytes // 2 + stats.slots * stats.slot_bytes + 2 * layer_bytes
    offload.remove()


@pytest.mark.parametrize("level", ["block", "leaf", "half_resident", "model"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_first_pass_may_be_in_a_transform(level: str, mode: Any) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(4))).eval()
    module = copy.deepcopy(model)
    offload = apply_group_offloading(module, "cpu", **LEVELS[level])
    x = torch.randn(3, 5, WIDTH)
    with mode():
        torch.testing.assert_close(torch.vmap(module)(x), torch.vmap(model)(x).detach())
    offload.remove()
