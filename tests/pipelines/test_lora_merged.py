"""Adapters added to weights where they are used: the bytes of fusing them in RAM, and bases that stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vramkit import WanPipeline, WanTransformer3DModel, apply_group_offloading
from vramkit.errors import ConfigError, ConflictError, UnsupportedTensorError
from vramkit.offload import offload_of
from vramkit.pipelines.lora import layers
from vramkit.pipelines.lora.merged import MergedTensor, add_product
from vramkit.tensors import is_plain

STREAMED: dict[str, dict[str, Any]] = {
    "block": {"offload_type": "block_level"},
    "leaf": {"offload_type": "leaf_level"},
    "leaf, some resident": {"offload_type": "leaf_level", "resident": "100KiB"},
    "pageable": {"offload_type": "leaf_level", "store": "pageable"},
    "model": {"offload_type": "model_level"},
}


@pytest.fixture(scope="module")
def loras(wan_folder: Path) -> dict[str, dict[str, Tensor]]:
    """Two adapters of Wan: of all linear layers, with biases; and of some."""
    made: dict[str, dict[str, Tensor]] = {}
    for adapter, rank, suffix in (("wide", 4, ""), ("narrow", 2, "to_q")):
        g = torch.Generator().manual_seed(rank)
        made[adapter] = {}
        for name, layer in load(wan_folder).transformer.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(suffix):
                for part, shape in {
                    "lora_A.weight": (rank, layer.in_features),
                    "lora_B.weight": (layer.out_features, rank),
                }.items() | ({"lora_B.bias": (layer.out_features,)}.items() if adapter == "wide" else set()):
                    made[adapter][f"{name}.{part}"] = torch.randn(shape, generator=g) * 0.2
    return made


def load(folder: Path, **options: Any) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None, **options)


def load_both(pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]]) -> None:
    for name, state in loras.items():
        pipeline.load_lora_weights(dict(state), name)
    pipeline.set_adapters(list(loras), [0.7, -0.4])


@torch.no_grad()
def flow(transformer: WanTransformer3DModel) -> Tensor:
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 4, 6, generator=g), torch.randn(1, 7, 32, generator=g)
    dtype = transformer.dtype
    sample: Tensor = transformer(latents.to(dtype), torch.tensor([500.0]), text.to(dtype)).sample
    return sample


@pytest.mark.parametrize(
    ("kind", "dtype"), list(zip([*STREAMED, "spilled"], [torch.float32, torch.bfloat16] * 3, strict=True))
)
def test_the_bytes_of_fusing_in_ram(
    kind: str, dtype: torch.dtype, wan_folder: Path, loras: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    in_ram = load(wan_folder, torch_dtype=dtype)
    load_both(in_ram, loras)
    in_ram.fuse_lora(lora_scale=0.9)
    expected = flow(in_ram.transformer)
    pipeline = load(wan_folder, torch_dtype=dtype)
    transformer = pipeline.transformer
    options = STREAMED.get(kind, {"offload_type": "leaf_level", "offload_to_disk_path": tmp_path})
    apply_group_offloading(transformer, "cpu", **options)
    plain = flow(transformer)
    load_both(pipeline, loras)
    beside = flow(transformer)
    pipeline.fuse_lora(lora_scale=0.9, in_place=False)
    for _ in range(3):
        assert torch.equal(flow(transformer), expected)
    assert (expected - plain).abs().max() > 0.1
    with pytest.raises(ConflictError, match=r"wide, narrow is fused .* unfuse_lora"):
        pipeline.set_adapters("wide")
    pipeline.unfuse_lora()
    assert torch.equal(flow(transformer), beside)
    pipeline.unload_lora_weights()
    assert torch.equal(flow(transformer), plain)


def test_bases_stay_in_their_file(wan_folder: Path, loras: dict[str, dict[str, Tensor]]) -> None:
    pipeline = load(wan_folder)
    handle = apply_group_offloading(pipeline.transformer, "cpu", offload_type="leaf_level")
    weight = pipeline.transformer.blocks[1].ffn.net[2].weight
    before, address = handle.stats().stores["disk"], weight.data_ptr()
    load_both(pipeline, loras)
    pipeline.fuse_lora(in_place=False)
    merged = pipeline.transformer.blocks[1].ffn.net[2].weight
    assert isinstance(merged, MergedTensor)
    assert merged.base.data_ptr() == address
    biases = sum(bias.nbytes for name, bias in pipeline.transformer.named_parameters() if name.endswith(".bias"))
    assert handle.stats().stores["disk"] >= before - biases
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert pipeline.transformer.blocks[1].ffn.net[2].weight.data_ptr() == address
    assert handle.stats().stores["disk"] == before


def test_while_fused(wan_folder: Path, loras: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    pipeline = load(wan_folder)
    transformer = pipeline.transformer
    load_both(pipeline, loras)
    saved = pipeline.lora_layers("narrow")["transformer_lora_layers"]
    pipeline.fuse_lora(in_place=False)
    assert pipeline.fused_loras == ["wide", "narrow"]
    assert all(type(layer) is not nn.Module and not hasattr(layer, "base_layer") for layer in transformer.modules())
    again = pipeline.lora_layers("narrow")["transformer_lora_layers"]
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    expected = flow(transformer)  # not offloaded: at each use
    with pytest.raises(ConflictError, match="adapters"):
        transformer.save_pretrained(tmp_path)
    handle = apply_group_offloading(transformer, "cpu", offload_type="block_level")  # fused before it is offloaded
    assert torch.equal(flow(transformer), expected)
    assert torch.equal(flow(copy.deepcopy(transformer)), expected)
    handle.remove()
    assert torch.equal(flow(transformer), expected)
    pipeline.unload_lora_weights()  # what is fused stays
    assert all(map(is_plain, transformer.parameters()))
    assert torch.equal(flow(transformer), expected)
    transformer.save_pretrained(tmp_path)
    assert torch.equal(flow(WanTransformer3DModel.from_pretrained(tmp_path)), expected)


def test_stored_weights_are_refused_before_anything_changes(
    wan_folder: Path, loras: dict[str, dict[str, Tensor]]
) -> None:
    pipeline = load(wan_folder, torch_dtype=torch.bfloat16)
    pipeline.transformer.enable_layerwise_casting()
    load_both(pipeline, loras)
    beside = flow(pipeline.transformer)
    with pytest.raises(ConfigError, match=r"NarrowTensor.*leave out in_place=False"):
        pipeline.fuse_lora(in_place=False)
    assert torch.equal(flow(pipeline.transformer), beside)
    assert pipeline.fused_loras == []


def test_what_fails_midway_is_undone(
    wan_folder: Path, loras: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(wan_folder)
    apply_group_offloading(pipeline.transformer, "cpu", offload_type="leaf_level")
    load_both(pipeline, loras)
    beside, seen, bias = flow(pipeline.transformer), [], layers._change

    def change(*args: Any) -> None:
        seen.append(args)
        if len(seen) == 5:
            raise KeyboardInterrupt
        bias(*args)

    monkeypatch.setattr(layers, "_change", change)
    with pytest.raises(KeyboardInterrupt):
        pipeline.fuse_lora(in_place=False)
    monkeypatch.undo()
    assert pipeline.fused_loras == []
    assert torch.equal(flow(pipeline.transformer), beside)


class TestMergedTensor:
    def merged(self, rank: int = 2, size: int = 512) -> MergedTensor:
        g = torch.Generator().manual_seed(0)
        base, up, down = (torch.randn(shape, generator=g) for shape in ((size, size), (size, rank), (rank, size)))
        return MergedTensor(base, [(up, down, 0.5)])

    def test_is_the_sum(self) -> None:
        merged = self.merged()
        before = merged.base.clone()
        up, down, factor = merged.products[0]
        expected = before.double() + factor * up.double() @ down.double()
        assert torch.allclose(merged.dequantize().double(), expected, atol=1e-5)
        assert torch.equal(merged.base, before)
        x = torch.randn(3, 512)
        assert torch.equal(nn.functional.linear(x, merged), nn.functional.linear(x, merged.dequantize()))
        with torch.autocast("cpu", torch.bfloat16):
            under = merged.dequantize()
        assert torch.equal(under, merged.dequantize())
        assert merged.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
        with pytest.raises(UnsupportedTensorError, match="unfuse_lora"):
            merged.add_(1)

    def test_rows_are_summed_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        merged = self.merged(size=96)
        whole = merged.dequantize()
        monkeypatch.setattr("vramkit.pipelines.lora.merged._CHUNK", 96 * 7)
        assert torch.allclose(merged.dequantize(), whole, atol=1e-6)
        add_product(merged.base, *merged.products[0])
        assert torch.allclose(merged.base, whole, atol=1e-6)

    def test_small_ranks_stay_on_the_device_and_follow_writes(self) -> None:
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).requires_grad_(requires_grad=False)
        for layer, seed in zip(model, range(8), strict=True):
            layer.weight = nn.Parameter(self.merged(rank=1).clone(), requires_grad=False)
            layer.weight.base.add_(seed)
        resident = copy.deepcopy(model)
        handle = apply_group_offloading(model, "cpu", offload_type="leaf_level", store="pageable")
        x = torch.randn(3, 512)
        for _ in range(2):
            assert torch.equal(model(x), resident(x))
        loaded_bytes = handle.stats().loaded_bytes
        assert loaded_bytes >= 16 * 512 * 512 * 4
        assert loaded_bytes % (512 * 512 * 4) == 0  # bases, without biases and the two of rank 1
        for each in (model, resident):
            up, down, _ = each[2].weight.products[0]
            up.mul_(2)
            down.add_(1)
        assert torch.equal(model(x), resident(x))

    def test_a_forward_that_writes_is_told(self) -> None:
        class Writing(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                self.weight.add_(1)
                return super().forward(x)

        layers = [nn.Linear(512, 512) for _ in range(7)]
        model = nn.Sequential(Writing(512, 512), *layers).requires_grad_(requires_grad=False)
        model[0].weight = nn.Parameter(self.merged(), requires_grad=False)
        apply_group_offloading(model, "cpu", offload_type="leaf_level")
        with torch.no_grad(), pytest.raises(UnsupportedTensorError, match="MergedTensor"):
            model(torch.randn(3, 512))
        assert offload_of(model) is not None
