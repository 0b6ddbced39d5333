"""The engine on a CUDA device: acceptance 1-5, 12, 14, 16-18, 20 where only a device can show them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import CASES, BlockNet, Codec, OrderNet, mapped_copy, tokens
from torch import nn

from vramkit.offload import apply_group_offloading, apply_model_offload, offload_of
from vramkit.offload import partition as partition_module
from vramkit.offload.engine import Engine
from vramkit.offload.pinning import Pins
from vramkit.offload.stores import DiskStore, PageableStore, PinnedStore

pytestmark = [
    pytest.mark.gpu,
    # cuDNN says so for every RNN whose weights are not one piece of memory, as streamed ones need not be.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

MIB = 2**20
STORES: dict[str, dict[str, Any]] = {
    "registered": {"store": "registered"},
    "mapped": {"store": "mapped"},
    "pageable": {"store": "pageable"},
    "file_pageable": {"store": "pageable"},
    "disk": {"store": "disk"},
    "disk_direct": {"store": "disk", "direct_io": True},
    "chosen": {},
}
FROM_FILES = ("mapped", "file_pageable", "disk", "disk_direct", "chosen")
LEVELS: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "two_blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaf": {"offload_type": "leaf_level"},
    "tiny_leaf": {"offload_type": "leaf_level", "unit_bytes": 1},
    "half_resident": {"offload_type": "block_level", "resident": 100_000},
    "model": {"offload_type": "model_level"},
}
READ_ONLY_IS_SUPPORTED = torch.cuda.is_available() and Pins(torch.device("cuda", 0), 0)._read_only_is_supported()


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Bitwise equality asks for the same kernels on the same shapes, wherever the weights lie."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.synchronize()


def on_device(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments)


def offloaded(model: nn.Module, store: str, folder: Path, **options: Any) -> nn.Module:
    """Return a copy of a `model` in host memory that streams to the device."""
    if store == "mapped" and not READ_ONLY_IS_SUPPORTED:
        pytest.skip("the driver does not register read-only memory")
    module = mapped_copy(model, folder) if store in FROM_FILES else copy.deepcopy(model)
    apply_group_offloading(module, "cuda", **STORES[store], **options)
    return module


def handle(module: nn.Module) -> Any:
    found = offload_of(module)
    assert found is not None
    return found


GRID = [
    (case, level, store, slots)
    for at, case in enumerate(CASES)
    for by, level in enumerate(LEVELS)
    for slots in (1, 2, 3)
    for turn, store in enumerate(STORES)
    if case in ("blocks", "tied") or turn in ((at + by + slots) % len(STORES), (at + by + slots + 3) % len(STORES))
]


@pytest.mark.parametrize(("case", "level", "store", "slots"), GRID)
def test_three_forwards_are_the_same_bytes_as_resident(
    case: str, level: str, store: str, slots: int, tmp_path: Path
) -> None:
    build, arguments = CASES[case]
    model = build().eval()
    module = offloaded(model, store, tmp_path, slots=slots, **LEVELS[level])
    # A file holds contiguous weights, and cuBLAS takes other kernels for other strides.
    resident = (mapped_copy(model, tmp_path) if store in FROM_FILES else model).cuda()
    with torch.no_grad():
        for _ in range(3):
            args = arguments()  # in host memory: the engine moves inputs
            assert torch.equal(module(*args), resident(*on_device(args)))
    stats = handle(module).stats()
    assert stats.returned_bytes == 0
    if store in ("registered", "mapped"):
        assert stats.stores.keys() <= {store}
        assert stats.stall_s == 0
    handle(module).remove()
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    torch.cuda.synchronize()


@pytest.fixture(params=["slow_copies", "slow_compute", "both"])
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep on the device: on the copy stream after each fill has begun, on the compute stream in linear layers."""

    def sleepy(method: Callable[..., Any], cycles: int, every: int) -> Callable[..., Any]:
        calls = iter(range(10**9))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) % every == 0:
                torch.cuda._sleep(cycles)
            return method(*args, **kwargs)

        return wrapper

    if request.param != "slow_compute":
        for store in (PinnedStore, PageableStore, DiskStore):
            monkeypatch.setattr(
                store, "fill", sleepy(store.fill, 4_000_000, 1 if request.param == "slow_copies" else 3)
            )
    if request.param != "slow_copies":
        monkeypatch.setattr(nn.Linear, "forward", sleepy(nn.Linear.forward, 3_000_000, 2))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("level", ["block", "leaf", "model"])
@pytest.mark.parametrize("store", ["registered", "mapped", "pageable", "disk"])
def test_delays_on_the_device_change_no_byte(store: str, level: str, slots: int, delay: None, tmp_path: Path) -> None:
    model = BlockNet(blocks=5).eval()
    module = offloaded(model, store, tmp_path, slots=slots, **LEVELS[level])
    model.cuda()
    inputs = [tokens(8).cuda() for _ in range(4)]
    with torch.inference_mode():
        outputs = [module(x) for x in inputs]  # without a wait in between: the next pass begins while this one computes
        assert all(torch.equal(y, model(x)) for x, y in zip(inputs, outputs, strict=True))
    handle(module).remove()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_random_orders_change_no_byte(level: str, slots: int, tmp_path: Path) -> None:
    model = OrderNet().eval()
    module = offloaded(model, "registered", tmp_path, slots=slots, **LEVELS[level])
    model.cuda()
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for _ in range(25):
            order = torch.randint(-1, 6, (int(torch.randint(0, 9, (), generator=generator)),), generator=generator)
            x = tokens(48).cuda()
            assert torch.equal(module(x, order.tolist()), model(x, order.tolist()))
    handle(module).remove()


@pytest.mark.parametrize("level", ["block", "leaf", "model"])
@pytest.mark.parametrize("first", ["encode", "decode"])
def test_any_entry_point_may_be_the_first_call(first: str, level: str, tmp_path: Path) -> None:
    model = Codec().eval()
    module = offloaded(model, "registered", tmp_path, **LEVELS[level])
    model.cuda()
    x, z = tokens(8).cuda(), tokens(48).cuda()
    with torch.inference_mode():
        for name in (first, "decode", "encode"):
            argument = z if name == "decode" else x
            assert torch.equal(getattr(module, name)(argument), getattr(model, name)(argument))
    handle(module).remove()


# --- embedding tables


class TableNet(nn.Module):
    """A table that is most of the model, beside blocks; two names for it, as text encoders have."""

    def __init__(self, rows: int = 4000, width: int = 64) -> None:
        super().__init__()
        self.shared = nn.Embedding(rows, width, padding_idx=3)
        self.tokens = nn.Embedding(rows, width, padding_idx=3)
        self.tokens.weight = self.shared.weight
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.shared(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look up tables of any size where they rest: those below 16 MiB are moved or kept."""
    monkeypatch.setattr(partition_module, "_TABLE_BYTES", 0)


@pytest.mark.usefixtures("small_tables")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", ["registered", "mapped", "pageable", "disk"])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_tables_are_looked_up_where_they_rest(level: str, store: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = TableNet().eval().to(dtype)
    module = offloaded(model, store, tmp_path, **LEVELS[level])
    table_bytes = model.shared.weight.numel() * dtype.itemsize
    stats = handle(module).stats()
    assert stats.table_bytes >= table_bytes
    assert stats.slots * stats.slot_bytes + stats.resident_bytes < table_bytes
    model.cuda()
    with torch.inference_mode():
        for ids in (torch.randint(0, 4000, (2, 9)), torch.tensor([[3, 3, 0, 3999, 0]])):
            assert torch.equal(module(ids.cuda()), model(ids.cuda()))
            assert torch.equal(module(ids), model(ids.cuda()))
    handle(module).remove()
    assert module.shared.weight is module.tokens.weight
    assert module.shared.padding_idx == 3


# --- the host does not wait, and memory is what was asked for


@pytest.mark.usefixtures("small_tables")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("store", ["registered", "mapped"])
@pytest.mark.parametrize("level", ["block", "leaf", "half_resident"])
def test_the_host_waits_for_nothing_inside_a_forward(level: str, store: str, tmp_path: Path) -> None:
    model = TableNet().eval()
    module = offloaded(model, store, tmp_path, **LEVELS[level])
    ids = torch.randint(0, 4000, (2, 9)).cuda()
    with torch.inference_mode():
        module(ids)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(50_000_000)
            for _ in range(3):
                module(ids)
            was_ahead = not torch.cuda.current_stream().query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert was_ahead, "three forwards were issued while the device still slept"
    handle(module).remove()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("store", ["registered", "mapped", "pageable"])
def test_peak_memory_is_activations_and_slots_and_residents(store: str, slots: int, tmp_path: Path) -> None:
    model = BlockNet(blocks=12, width=512).eval()  # 4 MiB in each block
    x = tokens(8, 2, 512).cuda()
    with torch.inference_mode():
        module = offloaded(model, store, tmp_path, slots=slots)
        stats = handle(module).stats()
        module(x)  # the workspace of cuBLAS
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            module(x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        assert torch.cuda.memory_allocated() == before
        handle(module).remove()
        model.cuda()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x)
        activations = torch.cuda.max_memory_allocated() - before
    assert stats.slots == slots
    assert stats.slot_bytes < 4.3 * MIB
    assert stats.resident_bytes < 1 * MIB
    assert peak <= activations + MIB  # slots and residents are there before; nothing else is taken


@pytest.mark.alone
@pytest.mark.parametrize("ending", ["remove", "delete"])
@pytest.mark.parametrize("store", ["registered", "mapped", "pageable", "disk"])
def test_memory_is_back_after_ten_lives(store: str, ending: str, tmp_path: Path) -> None:
    model = BlockNet(blocks=6, width=512).eval()

    def life() -> tuple[int, int]:
        module = offloaded(model, store, tmp_path)  # warns, and warnings are errors, if memory is still page-locked
        with torch.inference_mode():
            module(tokens(8))
        torch.cuda.synchronize()
        if ending == "remove":
            handle(module).remove()
        del module
        gc.collect()
        torch.cuda.empty_cache()
        return -torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()

    used, allocated = zip(*(life() for _ in range(10)), strict=True)
    assert used[-1] - used[1] <= 16 * MIB
    assert allocated[-1] == allocated[0]


def test_allocator_cap_below_the_weights_is_enough(tmp_path: Path) -> None:
    model = BlockNet(blocks=24, width=1024).eval()  # 16 MiB in each block, 390 MiB in all
    module = offloaded(model, "mapped" if READ_ONLY_IS_SUPPORTED else "registered", tmp_path)
    x = tokens(8).cuda()
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    with torch.inference_mode():
        try:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60 * MIB) / total)
            outputs = [module(x) for _ in range(3)]
            torch.cuda.synchronize()
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        model.cuda()
        assert all(torch.equal(y, model(x)) for y in outputs)
    handle(module).remove()


def test_components_take_turns(tmp_path: Path) -> None:
    models = {name: BlockNet(blocks=4, width=512).eval() for name in ("encoder", "denoiser", "decoder")}
    modules = {name: copy.deepcopy(model) for name, model in models.items()}
    one = sum(p.numel() * 4 for p in models["encoder"].parameters())
    handles = apply_model_offload(modules, "cuda")
    x = tokens(8).cuda()
    with torch.inference_mode():
        _ = x @ x.mT  # the workspace of cuBLAS
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = {name: module(x) for name, module in modules.items()}
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 1.5 * one
        for name, model in models.items():
            assert torch.equal(outputs[name], model.cuda()(x))
    handles.remove()


# --- failures


def test_failed_pin_degrades_with_one_warning_and_leaves_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockNet(width=256).eval()
    module = copy.deepcopy(model)
    runtime = torch.cuda.cudart()

    class Runtime:
        cudaHostUnregister = staticmethod(runtime.cudaHostUnregister)

        @staticmethod
        def cudaHostRegister(start: int, size: int, flags: int) -> Any:
            return runtime.cudaHostRegister(start, size, 0xFFFF)  # flags that no driver knows: a real failure

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    with pytest.warns(RuntimeWarning, match="could not page-lock") as caught:
        offload = apply_group_offloading(module, "cuda")
    assert len(caught) == 1
    torch.cuda.synchronize()
    torch.ones(1, device="cuda").add_(1)  # would report an error that was left
    assert offload.stats().stores.keys() == {"pageable"}
    assert torch.equal(module(x := tokens(8).cuda()), model.cuda()(x))
    offload.remove()


def test_pin_budget_is_kept(tmp_path: Path) -> None:
    module = BlockNet(width=512).eval()
    with pytest.warns(RuntimeWarning, match="could not page-lock"):
        offload = apply_group_offloading(module, "cuda", pin_budget="4MiB")
    assert offload._place._pins.pinned_bytes <= 4 * MIB
    offload.remove()


def test_pinned_bytes_are_the_weights(tmp_path: Path) -> None:
    model = BlockNet(blocks=8, width=512).eval()
    total = sum(p.numel() * 4 for p in model.parameters())
    offload = apply_group_offloading(model, "cuda", store="registered")
    assert offload.stats().pinned_bytes <= 1.05 * total + MIB
    offload.remove()


@pytest.mark.parametrize("store", ["registered", "pageable", "disk"])
@pytest.mark.parametrize("level", ["block", "leaf", "model"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore:the device had no room for BlockNet")  # asked for 64 TiB, it makes what room it can
def test_call_after_a_torn_forward_is_right(
    error: type[BaseException], level: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockNet().eval()
    module = offloaded(model, store, tmp_path, **LEVELS[level])
    model.cuda()
    broken = module.blocks[3]

    def fails(x: torch.Tensor) -> torch.Tensor:
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return x + torch.empty(2**46, dtype=torch.uint8, device="cuda").sum()

    x = tokens(8).cuda()
    with torch.inference_mode():
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(broken, "forward", fails)
                with pytest.raises(error):
                    module(x)
            for _ in range(2):
                assert torch.equal(module(x), model(x))
    handle(module).remove()
    assert all(torch.equal(p, q.cpu()) for p, q in zip(module.parameters(), model.parameters(), strict=True))


# --- compiling


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("store", ["registered", "pageable"])
def test_compiled_blocks_equal_the_compiled_resident_run_without_recompiles(store: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = BlockNet().eval()
    module = offloaded(model, store, tmp_path)
    model.cuda()
    for net in (model, module):
        for block in net.blocks:
            block.compile(fullgraph=True)
    x = tokens(8).cuda()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), model(x))
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                y = tokens(8).cuda()
                assert torch.equal(module(y), model(y))
    handle(module).remove()
    torch._dynamo.reset()


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_a_module_on_the_device_is_there_again_when_applying_fails(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6))).to("cuda").eval()
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in module.named_parameters()}

    def failing(_engine: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Engine, "open", failing)
    with pytest.raises(torch.OutOfMemoryError):
        apply_group_offloading(module, "cuda", offload_type=level, slots=1)
    for name, tensor in module.named_parameters():
        same, values = before[name]
        assert tensor is same
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor, values)


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_moving_an_offloaded_module_to_its_device_is_answered_and_does_nothing(level: str) -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6))).eval()
    offload = apply_group_offloading(module, "cuda", offload_type=level, slots=1)
    rest = [parameter.device for parameter in module.parameters()]
    with pytest.warns(RuntimeWarning, match="stay where they rest"):
        assert module.to("cuda") is module
    module.cuda()
    module.to("cuda", torch.float32)
    assert [parameter.device for parameter in module.parameters()] == rest
    offload.remove()
