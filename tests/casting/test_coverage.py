"""What is said of what was covered and what was left, and which parameters count as what."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from modules import BlockNet
from torch import nn

from vramkit.casting import CoverageWarning, NarrowTensor, apply_layerwise_casting
from vramkit.casting.weights import Reason, Role, Skips, label_of, owner_of, weights_of
from vramkit.quant import Fp8Config, coverage, quantization_of, quantize

E4M3 = torch.float8_e4m3fn


class Unknown(nn.Module):
    """A layer of a class that nobody knows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(rows, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel.t()


def roles(module: nn.Module) -> dict[str, Role]:
    return {weight.name: weight.role for weight in weights_of(module, Skips())}


def test_roles() -> None:
    class QKVParallelLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.bias = nn.Parameter(torch.randn(8))

    class Own(QKVParallelLinear):
        pass

    from transformers.pytorch_utils import Conv1D

    net = nn.ModuleDict(
        {
            "lin": nn.Linear(8, 8),
            "parallel": Own(),
            "turned": Conv1D(8, 4),
            "conv": nn.Conv2d(4, 4, 3),
            "table": nn.Embedding(4, 8),
            "other": Unknown(4),
        }
    )
    found = roles(net)
    assert found["lin.weight"] is found["parallel.weight"] is Role.MATRIX
    assert found["turned.weight"] is Role.TURNED
    assert found["conv.weight"] is Role.KERNEL
    assert found["table.weight"] is Role.TABLE
    assert found["other.kernel"] is Role.OTHER
    assert found["lin.bias"] is found["parallel.bias"] is Role.VECTOR


def test_labels_lead_back_to_parameters() -> None:
    net = nn.ModuleDict({"lin": nn.Linear(8, 8), "other": Unknown(4)})
    for name, parameter in net.named_parameters():
        owner, key = owner_of(net, label_of(name))
        assert getattr(owner, key) is parameter or key == "weight"
    assert owner_of(net["lin"], "") == (net["lin"], "weight")


def test_every_byte_is_counted_once_with_its_reason() -> None:
    net = nn.ModuleDict(
        {"lin": nn.Linear(64, 64), "norm": nn.LayerNorm(64), "again": nn.Linear(64, 64), "odd": Unknown(8)}
    )
    net["again"].weight = net["lin"].weight
    total = sum(parameter.nbytes for parameter in net.parameters())  # tied ones once
    done = apply_layerwise_casting(net, E4M3, torch.float32).coverage
    assert done.covered == ("lin.weight",)
    assert done.total_bytes == total
    assert done.covered_bytes == 64 * 64 * 4
    assert done.stored_bytes == 64 * 64 + 64 * 4
    assert done.share == done.covered_bytes / total
    assert {(left.name, left.reason) for left in done.left} == {
        ("odd.kernel", Reason.KIND),
        ("norm.weight", Reason.SKIPPED),
        ("norm.bias", Reason.SKIPPED),
        ("lin.bias", Reason.VECTOR),
        ("again.bias", Reason.VECTOR),
    }
    assert [left.size_bytes for left in done.left] == sorted((left.size_bytes for left in done.left), reverse=True)
    assert done == coverage(net)


def test_it_says_so_in_words() -> None:
    net = BlockNet(blocks=12)
    done = quantize(net, Fp8Config())
    text = str(done)
    assert str(done.coverage) in text
    assert f"({done.coverage.share:.0%})" in text
    assert "left, vectors: " in text
    assert "12 x blocks.*.up.bias" in text
    assert coverage(net) == done.coverage == quantization_of(net).coverage  # type: ignore[union-attr]


def test_before_anything_is_done_and_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = BlockNet(blocks=2)
    found = coverage(net)
    assert (found.covered, found.share) == ((), 0.0)
    reasons = {left.name: left.reason for left in found.left}
    assert reasons["blocks.0.up.weight"] is Reason.UNTOUCHED
    assert reasons["embed.weight"] is Reason.SKIPPED


def mostly_unknown() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ModuleList(Unknown(64) for _ in range(2)))


@pytest.mark.parametrize(
    "apply",
    [
        lambda net: quantize(net, Fp8Config()),
        lambda net: apply_layerwise_casting(net, E4M3, torch.float32),
    ],
)
def test_one_warning_where_most_was_left_for_what_it_is(apply: Any) -> None:
    with pytest.warns(
        CoverageWarning, match=r"16 KiB of 48.2 KiB are covered; 32 KiB .*2 x \*\.\*\.kernel, 32 KiB"
    ) as found:
        apply(mostly_unknown())
    assert len(found) == 1
    assert found[0].filename == __file__


def test_no_warning_where_it_was_asked_for_or_is_little() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(mostly_unknown(), Fp8Config(), skip_modules=["^1"])
        quantize(nn.Sequential(nn.Linear(64, 64), nn.Embedding(1000, 64)), Fp8Config())
        quantize(nn.Sequential(nn.Linear(64, 64), Unknown(32)), Fp8Config())


def test_convolutions_are_of_a_kind_that_quantizing_does_not_take() -> None:
    net = nn.Sequential(nn.Conv1d(64, 64, 3), nn.Linear(64, 64))
    with pytest.warns(CoverageWarning, match=r": 0\.weight, 48 KiB"):
        done = quantize(net, Fp8Config())
    assert done.coverage.left[0].reason is Reason.BACKEND


def test_a_weight_that_a_skipped_layer_shares_is_left() -> None:
    net = nn.ModuleDict(
        {"wte": nn.Embedding(20, 32), "lin": nn.Linear(32, 32), "lm_head": nn.Linear(32, 20, bias=False)}
    )
    net["lm_head"].weight = net["wte"].weight
    done = apply_layerwise_casting(net, E4M3, torch.float32).coverage
    assert done.covered == ("lin.weight",)
    assert net["lm_head"].weight is net["wte"].weight
    done = quantize(nn.ModuleDict({"a": net["wte"], "b": net["lm_head"], "c": nn.Linear(32, 32)}), Fp8Config()).coverage
    assert done.covered == ("c.weight",)


def test_an_embedding_that_writes_to_its_table_is_passed_over() -> None:
    net = nn.Sequential(nn.Embedding(50, 32, max_norm=1.0), nn.Linear(32, 32)).eval()
    table = net[0].weight
    done = apply_layerwise_casting(net, E4M3, torch.float32, skip_modules_pattern=None)
    assert net[0].weight is table
    assert isinstance(net[1].weight, NarrowTensor)
    assert Reason.WRITTEN in {left.reason for left in done.coverage.left}
    with torch.no_grad():
        assert net(torch.arange(4)).shape == (4, 32)


def test_adapters_are_counted_as_such() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    net = BlockNet(blocks=2)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["up"]), net)
    done = apply_layerwise_casting(net, E4M3, torch.float32).coverage
    adapters = {left.name for left in done.left if left.reason is Reason.ADAPTER}
    assert "blocks.0.up.lora_A.default.weight" in adapters
    assert "blocks.0.up.base_layer.weight" in done.covered


def test_memory_footprints_of_others_show_what_is_stored() -> None:
    net = nn.Sequential(nn.Linear(256, 256, bias=False)).to(torch.bfloat16)
    apply_layerwise_casting(net, E4M3, torch.bfloat16)
    weight = net[0].weight
    assert weight.element_size() == 1
    assert weight.nbytes == 256 * 256 + 256 * 4
    assert weight.nelement() * weight.element_size() == 256 * 256  # how diffusers and transformers count
