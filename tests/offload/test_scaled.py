"""Files in fp8: as they are, and never without their scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vramkit import apply_group_offloading, apply_layerwise_casting, load_mapped
from vramkit.casting.narrow import NarrowTensor
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload.disk import span_of
from vramkit.quant import Fp8Config, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MARKER = {"scaled_fp8": torch.empty(2, dtype=E4M3)}
Write = Callable[..., Path]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x).tanh()
        out: Tensor = self.norm(x)
        return out


IDS = torch.arange(8)[None]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: weight.bfloat16() for name, weight in Net().state_dict().items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(state: dict[str, Tensor]) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "net.safetensors")
        return tmp_path / "net.safetensors"

    return write


def narrow(
    weights: dict[str, Tensor], suffix: str = "", *, dtype: torch.dtype = E4M3, rows: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the blocks in fp8, with scales under a name or without, and what they stand for in float32."""
    stored, wide = {}, {}
    for name, weight in weights.items():
        if not (name.startswith("blocks.") and weight.ndim == 2):
            stored[name], wide[name] = weight, weight.float()
            continue
        peak = weight.float().abs().amax(dim=1, keepdim=True) if rows else weight.float().abs().max()
        scale = peak / 448 if suffix else torch.tensor(1.0)
        stored[name] = (weight.float() / scale).to(dtype)
        wide[name] = stored[name].float() * scale
        if suffix:
            stored[name.removesuffix("weight") + suffix] = scale
    return stored, wide


def mapped(file: Path, **options: Any) -> Net:
    with torch.device("meta"):
        net = Net()
    return load_mapped(net, file, **options).eval()


def expected(wide: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    net = Net().to(dtype)
    net.load_state_dict({name: weight.to(dtype) for name, weight in wide.items()})
    with torch.no_grad():
        out: Tensor = net.eval()(IDS)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
@pytest.mark.parametrize(
    ("suffix", "rows"),
    [("", False), ("scale_weight", False), ("weight_scale", True), ("weight_scale_inv", False)],
)
def test_weights_stay_fp8_with_their_scales(
    suffix: str, rows: bool, dtype: torch.dtype | None, weights: dict[str, Tensor], write: Write
) -> None:
    stored, wide = narrow(weights, suffix, rows=rows)
    net = mapped(write(stored | (MARKER if suffix == "scale_weight" else {})), dtype=dtype)
    computes = dtype or torch.bfloat16  # as the biases
    weight = net.blocks[1].weight
    assert isinstance(weight, NarrowTensor)
    assert weight.dtype == computes
    assert span_of(weight.stored) is not None  # a view of the file
    assert torch.equal(weight.dequantize(), wide["blocks.1.weight"].to(computes))
    with torch.no_grad():
        out = net(IDS)
        assert torch.equal(out, expected(wide, computes))
        offload = apply_group_offloading(net, "cpu", offload_type="block_level")
        assert torch.equal(net(IDS), out)
    assert offload.stats().streamed_bytes < 3 * 16 * 16 * 2


@pytest.mark.parametrize("strict", [True, False])
def test_scales_of_inputs_and_the_words_of_comfy_are_left_out(
    strict: bool, weights: dict[str, Tensor], write: Write
) -> None:
    stored, wide = narrow(weights, "weight_scale")
    told = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    beside = {"blocks.0.input_scale": torch.tensor(2.0), "blocks.1.scale_input": torch.tensor(2.0)}
    net = mapped(write(stored | MARKER | beside | {"blocks.0.comfy_quant": told}), strict=strict)
    assert torch.equal(net.blocks[0].weight.dequantize(), wide["blocks.0.weight"].bfloat16())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.scale_weight": torch.ones(3)}, r"'blocks\.0\.scale_weight' is the scale of .* shape \[3\]"),
        ({"blocks.0.scale_weight": torch.ones(1, 16)}, "expected one number, or one for each row"),
        ({"blocks.0.scale_weight": torch.tensor(float("nan"))}, "holds infinities or NaN"),
        ({"blocks.0.scale_weight": torch.tensor(1)}, "is I64, expected one of F32"),
        ({"blocks.0.weight_scale": torch.tensor(2.0)}, "both scale 'blocks.0.weight'"),
        ({"norm.weight_scale": torch.tensor(2.0)}, "scales 'norm.weight', which is BF16 and not fp8"),
        ({"blocks.0.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, "does not say how its layer is stored"),
        (
            {"blocks.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
            "stored as 'nvfp4'; expected one of float8_e4m3fn",
        ),
        ({"blocks.0.scale_weight": None}, r"'blocks\.0\.weight' is fp8 without a scale, in a file that has scales"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    change: dict[str, Tensor | None], message: str, strict: bool, weights: dict[str, Tensor], write: Write
) -> None:
    stored = {**narrow(weights, "scale_weight")[0], **MARKER, **change}
    file = write({name: tensor for name, tensor in stored.items() if tensor is not None})
    with torch.device("meta"):
        net = Net()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_mapped(net, file, strict=strict)
    assert str(file) in str(caught.value)
    assert all(parameter.device.type == "meta" for parameter in net.parameters())


def test_a_table_needs_no_scale_and_a_scale_of_one_says_nothing(weights: dict[str, Tensor], write: Write) -> None:
    stored, _ = narrow(weights, "scale_weight")
    more = {"table.weight": weights["table.weight"].to(E4M3), "norm.scale_weight": torch.tensor(1.0)}
    net = mapped(write(stored | MARKER | more))
    assert torch.equal(net.table.weight.dequantize(), more["table.weight"].bfloat16())
    with torch.no_grad():
        assert net(IDS).isfinite().all()


def test_a_module_that_is_fp8_itself_gets_what_it_has_names_for(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4).to(E4M3), requires_grad=False)
            self.weight_scale = nn.Parameter(torch.ones(4, 1), requires_grad=False)

    layer = Layer()
    save_file(layer.state_dict(), tmp_path / "x.safetensors")
    loaded = load_mapped(Layer(), tmp_path / "x.safetensors", dtype=torch.bfloat16, keep_fp32=["weight_scale"])
    assert torch.equal(loaded.weight_scale, layer.weight_scale)
    assert loaded.weight.dtype == torch.bfloat16  # as it was asked for
    assert load_mapped(Layer(), tmp_path / "x.safetensors").weight.dtype == E4M3


@pytest.mark.parametrize("suffix", ["", "scale_weight"])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_casting_takes_them_as_they_are(
    suffix: str, compute: torch.dtype, weights: dict[str, Tensor], write: Write
) -> None:
    stored, wide = narrow(weights, suffix)
    net = mapped(write({name: w.to(compute) if w.dtype == torch.bfloat16 else w for name, w in stored.items()}))
    net = net if suffix else _plain_fp8(net)
    casting = apply_layerwise_casting(net, E4M3, compute, skip_modules_pattern=["table"])
    weight = net.blocks[0].weight
    assert isinstance(weight, NarrowTensor)
    assert (weight.dtype, weight.stored.dtype) == (compute, E4M3)
    assert torch.equal(weight.dequantize(), wide["blocks.0.weight"].to(compute))
    casting.remove()
    assert isinstance(net.blocks[0].weight, NarrowTensor)


def test_casting_to_another_storage_is_refused(weights: dict[str, Tensor], write: Write) -> None:
    net = _plain_fp8(mapped(write(narrow(weights, dtype=E5M2)[0])))
    with pytest.raises(ConfigError, match=r"blocks\.0\.weight is torch\.float8_e5m2 already"):
        apply_layerwise_casting(net, E4M3, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"is torch\.float8_e5m2 already; use apply_layerwise_casting"):
        quantize(net, Fp8Config())


def _plain_fp8(net: Net) -> Net:
    """As others load such files: parameters of an fp8 dtype."""
    for block in net.blocks:
        stored = block.weight.stored
        block.weight = nn.Parameter(stored, requires_grad=False)
    return net
