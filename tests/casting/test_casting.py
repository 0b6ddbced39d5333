import copy

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting as diffusers_casting
from torch import nn
from torch.nn import functional as F

from vramkit.casting import NarrowTensor, apply_layerwise_casting, narrowed
from vramkit.errors import ConfigError, ConflictError, UnsupportedTensorError
from vramkit.memory import module_bytes
from vramkit.offload import apply_group_offloading, apply_model_offload, load_mapped, offload_of
from vramkit.offload.checkpoint import write_checkpoint
from vramkit.quant import sqnr_db

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Gate(nn.Module):
    """A feed-forward that looks at weight.dtype to cast its input, as T5 does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wi = nn.Linear(width, 4 * width)
        self.wo = nn.Linear(4 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        inner = F.gelu(self.wi(self.norm(x)))
        return x + self.wo(inner.to(self.wo.weight.dtype))


class PlainGate(Gate):
    def forward(self, x):
        return x + self.wo(F.gelu(self.wi(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList([Gate(width) for _ in range(depth)])
        self.head = nn.Linear(width, 100, bias=False)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).mT).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 8))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 0.02, 1.0, 300.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_does_not_depend_on_the_size_of_weights(scale, dtype):
    weight = (torch.randn(128, 256) * scale).to(dtype)
    assert sqnr_db(weight, narrowed(weight, E4M3, dtype).dequantize()) >= 31
    assert sqnr_db(weight, narrowed(weight, E5M2, dtype).dequantize()) >= 25


def test_rows_of_very_different_size_keep_their_own_precision():
    weight = torch.randn(16, 512) * torch.logspace(-9, 6, 16)[:, None]
    stored = narrowed(weight, E4M3, torch.float32).dequantize()
    assert (
        min(sqnr_db(exact, row) for exact, row in zip(weight, stored, strict=True)) >= 30.5
    )  # one row is a small sample


def test_fp16_with_tiny_scales():
    weight = torch.randn(64, 64) * 1e-6
    stored = narrowed(weight, E4M3, torch.float16).dequantize()
    assert torch.equal(stored, narrowed(weight, E4M3, torch.float32).dequantize().half())
    assert stored.abs().max() > 0


def test_zero_rows_and_peaks_are_exact():
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([448.0, -448.0, 1.0, 0.5])
    assert torch.equal(narrowed(weight, E4M3, torch.float32).dequantize(), weight)


def test_infinities_are_refused_before_anything_is_changed(net):
    net.blocks[3].wo.weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match="infinities"):
        apply_layerwise_casting(net, E4M3, torch.float32)
    assert not any(isinstance(p, NarrowTensor) for p in net.parameters())


@pytest.mark.parametrize("storage", [E4M3, E5M2])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_unscaled_equals_diffusers(net, ids, storage, compute):
    net.to(compute)
    for block in net.blocks:  # under diffusers' casting a module that reads weight.dtype fails
        block.__class__ = PlainGate
    theirs = copy.deepcopy(net)
    diffusers_casting(theirs, storage, compute, skip_modules_pattern=("norm",))
    apply_layerwise_casting(net, storage, compute, skip_modules_pattern=("norm",), scaled=False)
    assert torch.equal(net(ids), theirs(ids))


def test_what_is_skipped_by_default(net):
    apply_layerwise_casting(net, E4M3, torch.float32)
    cast = {name for name, p in net.named_parameters() if isinstance(p, NarrowTensor)}
    expected = {f"blocks.{i}.{name}.weight" for i in range(6) for name in ("wi", "wo")} | {"conv.weight"}
    assert cast == expected


def test_skips_can_be_chosen(net):
    apply_layerwise_casting(
        net, E4M3, torch.float32, skip_modules_pattern=r"blocks\.[1-5]", skip_modules_classes=(nn.Conv1d,)
    )
    cast = {name for name, p in net.named_parameters() if isinstance(p, NarrowTensor)}
    assert cast == {"embedding.weight", "head.weight", "blocks.0.wi.weight", "blocks.0.wo.weight"}


def test_storage_halves_and_dtype_is_the_compute_dtype(net):
    before = module_bytes(net.blocks.to(torch.bfloat16))
    apply_layerwise_casting(net.blocks, E4M3, torch.bfloat16)
    assert module_bytes(net.blocks) < 0.55 * before
    weight = net.blocks[0].wi.weight
    assert weight.dtype == torch.bfloat16
    assert isinstance(weight, nn.Parameter)


MODES = [
    {"offload_type": "block_level"},
    {"offload_type": "block_level", "slots": 1},
    {"offload_type": "block_level", "num_blocks_per_group": 2, "slots": 3, "unit_bytes": None},
    {"offload_type": "leaf_level", "unit_bytes": 9000, "slots": 2},
    {"offload_type": "model_level"},
    {"offload_type": "block_level", "resident": "64KiB"},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_same_bytes_under_every_way_of_offloading(net, ids, mode, to_disk, scaled, tmp_path):
    apply_layerwise_casting(net, E4M3, torch.float32, scaled=scaled)
    resident = net(ids)
    offload = apply_group_offloading(net, "cpu", offload_to_disk_path=tmp_path if to_disk else None, **mode)
    for _ in range(3):
        assert torch.equal(net(ids), resident)
    if "resident" not in mode:
        assert 0 < offload.stats().streamed_bytes < 0.4 * 4 * sum(p.numel() for p in net.parameters())  # fp8, not fp32
    offload.remove()
    assert torch.equal(net(ids), resident)


def test_casting_after_offloading_reaches_the_store(net, ids):
    offload = apply_group_offloading(net, "cpu")
    wide_bytes = offload.stats().streamed_bytes
    casting = apply_layerwise_casting(net, E4M3, torch.float32)
    assert offload.stats().streamed_bytes < 0.5 * wide_bytes
    narrow = net(ids)
    casting.remove()
    assert offload.stats().streamed_bytes == wide_bytes
    assert torch.equal(net(ids), narrow)  # wide again, but rounded as it was stored
    offload.remove()
    assert torch.equal(net(ids), narrow)


def test_casting_a_part_of_an_offloaded_module_is_refused(net, ids):
    apply_group_offloading(net, "cpu")
    with pytest.raises(ConflictError, match="edit"):
        apply_layerwise_casting(net.blocks, E4M3, torch.float32)
    with offload_of(net).edit():
        apply_layerwise_casting(net.blocks, E4M3, torch.float32)
    assert net(ids).isfinite().all()


def test_model_offload_of_cast_components(net, ids):
    apply_layerwise_casting(net, E4M3, torch.float32)
    resident = net(ids)
    components = apply_model_offload({"net": net}, "cpu")
    assert torch.equal(net(ids), resident)
    components.remove()


def test_mapped_weights_are_cast_once(net, ids, tmp_path):
    write_checkpoint(tmp_path / "net.safetensors", net.state_dict())
    with torch.device("meta"):
        mapped = Net()
    load_mapped(mapped.eval(), tmp_path / "net.safetensors")
    for each in (net, mapped):
        apply_layerwise_casting(each, E4M3, torch.float32)
    apply_group_offloading(mapped, "cpu")
    assert torch.equal(mapped(ids), net(ids))


def test_twice_is_once_and_a_conflict_is_named(net, ids):
    apply_layerwise_casting(net, E4M3, torch.float32)
    first = net(ids)
    again = apply_layerwise_casting(net, E4M3, torch.float32)
    assert torch.equal(net(ids), first)
    again.remove()  # cast nothing, so gives nothing back
    assert isinstance(net.conv.weight, NarrowTensor)
    with pytest.raises(ConflictError, match=r"stored in torch\.float8_e4m3fn .* remove"):
        apply_layerwise_casting(net, E5M2, torch.float32)


def test_remove_gives_the_dtype_back(net):
    net.to(torch.bfloat16)
    casting = apply_layerwise_casting(net, E4M3, torch.float32)
    assert net.conv.weight.dtype == torch.float32
    casting.remove()
    casting.remove()
    assert net.conv.weight.dtype == torch.bfloat16
    assert type(net.conv.weight) is nn.Parameter


def test_tied_weights_stay_tied(ids):
    net = Net().eval().requires_grad_(False)
    net.head.weight = net.embedding.weight
    casting = apply_layerwise_casting(net, E4M3, torch.float32, skip_modules_pattern=None)
    assert net.head.weight is net.embedding.weight
    resident = net(ids)
    offload = apply_group_offloading(net, "cpu")
    assert torch.equal(net(ids), resident)
    offload.remove()
    casting.remove()
    assert net.head.weight is net.embedding.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage_dtype": torch.int8}, "storage_dtype=torch.int8; expected one of"),
        ({"compute_dtype": torch.float64}, "compute_dtype=torch.float64; expected one of"),
        ({"skip_modules_pattern": "("}, "not a regular expression"),
        ({"skip_modules_pattern": ".*"}, "has no layer to cast"),
    ],
)
def test_wrong_options_are_named(net, options, message):
    options = {"storage_dtype": E4M3, "compute_dtype": torch.float32} | options
    with pytest.raises(ConfigError, match=message):
        apply_layerwise_casting(net, **options)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_wider_storage_needs_no_scales(net, ids, storage):
    plain = copy.deepcopy(net)
    for part in (plain.conv, *(layer for block in plain.blocks for layer in (block.wi, block.wo))):
        for parameter in part.parameters():
            parameter.copy_(parameter.to(storage))
    expected, before = plain(ids), module_bytes(net)
    casting = apply_layerwise_casting(net, storage, torch.float32)
    assert (module_bytes(net) < before) == (storage.itemsize < 4)
    assert net.blocks[0].wi.bias.nbytes == net.blocks[0].wi.bias.numel() * storage.itemsize
    assert torch.equal(net(ids), expected)
    offload = apply_group_offloading(net, "cpu", slots=1)
    assert torch.equal(net(ids), expected)
    offload.remove()
    casting.remove()
    assert type(net.conv.bias) is nn.Parameter
    assert torch.equal(net(ids), expected)


def test_what_fp16_cannot_hold_is_refused_by_name(net):
    net.blocks[1].wi.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"blocks\.1\.wi\.weight holds numbers that torch.float16 cannot"):
        apply_layerwise_casting(net, torch.float16, torch.float32)
    assert not any(isinstance(parameter, NarrowTensor) for parameter in net.parameters())


def test_unsupported_device_is_refused_before_anything_is_changed():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ConfigError, match=r"1\.(weight|bias) is on 'meta'"):
        apply_layerwise_casting(net, E4M3, torch.float32)
    assert type(net[0].weight) is nn.Parameter


def test_other_casting_is_named(net):
    diffusers_casting(net, E4M3, torch.float32)
    with pytest.raises(ConflictError, match="diffusers"):
        apply_layerwise_casting(net, E4M3, torch.float32)


def test_writes_that_would_be_lost_are_refused(net):
    apply_layerwise_casting(net, E4M3, torch.float32)
    weight = net.conv.weight
    with pytest.raises(UnsupportedTensorError, match="would be lost"):
        weight.add_(1)
    new = torch.randn_like(weight)
    weight.copy_(new)  # a whole new value can be stored
    assert sqnr_db(new, weight.dequantize()) >= 31


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_moves_keep_fp8_and_other_operations_widen(mode):
    tensor = narrowed(torch.randn(8, 8), E4M3, torch.bfloat16)
    with mode():
        check_moves(tensor)


def check_moves(tensor):
    for moved in (tensor.detach(), tensor.clone(), tensor.to("cpu", copy=True), tensor.to(torch.float16)):
        assert isinstance(moved, NarrowTensor)
    assert tensor.to(torch.float16).dtype == torch.float16
    assert type(tensor + 1) is torch.Tensor
    assert torch.equal(tensor + 0, tensor.dequantize())
    assert torch.equal(tensor.t() + 0, tensor.dequantize().t())
    assert torch.equal(torch.cat([tensor, tensor.view(-1, 8)]), torch.cat([tensor.dequantize()] * 2))
    assert torch.equal(tensor.int(), tensor.dequantize().int())
    assert "a scale per row" in repr(tensor)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cast_module_can_be_moved_and_change_its_compute_dtype(mode, net, ids):
    apply_layerwise_casting(net, E4M3, torch.float32)
    with mode():
        assert net(ids).dtype == torch.float32
        net.to(torch.bfloat16)
        assert isinstance(net.conv.weight, NarrowTensor)
        assert net.conv.weight.stored.dtype == E4M3
        assert net(ids).dtype == torch.bfloat16
        assert net.to("meta").conv.weight.device.type == "meta"


def test_state_dict_and_deepcopy(net, ids):
    apply_layerwise_casting(net, E4M3, torch.float32)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(ids), net(ids))
    twin.load_state_dict({name: torch.zeros_like(p) for name, p in Net().state_dict().items()})
    assert not twin(ids).any()
    assert net(ids).any()


def test_blocks_compile_fullgraph_once(net, ids):
    apply_layerwise_casting(net, E4M3, torch.float32)
    resident = net(ids)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    apply_group_offloading(net, "cpu")
    for block in net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    net(ids)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        assert torch.equal(net(ids), resident)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
