"""Ready models of diffusers in our pipelines: the same clip, around the same weights, or a named error at construction."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import denoisers
import diffusers
import pytest
import torch
from families import FAMILIES, Stock, load, seeded
from gguf_files import random_blocks, write_gguf
from single_files import original_file
from torch import nn

import vramkit
from vramkit import apply_group_offloading
from vramkit.errors import ConfigError, ConflictError
from vramkit.quant.gguf import GgufTensor


def clip(pipeline: Any, family: str) -> torch.Tensor:
    call = {**FAMILIES[family].clip, "num_inference_steps": 2, "output_type": "pt"}
    return torch.as_tensor(pipeline(prompt="a cat", generator=seeded(), **call).frames)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_diffusers_give_the_same_clip(family: str, stock: Stock) -> None:
    theirs, ours = stock.oracle(family), stock.pipeline(family)
    ready = {name: getattr(theirs, name) for name in ("transformer", "vae", "scheduler")}
    if isinstance(theirs.scheduler, diffusers.CogVideoXDPMScheduler):  # refused: its step asks for more
        del ready["scheduler"]
    pipeline = load(family, stock.folder(family), **ready)
    assert type(pipeline.transformer) is type(ours.transformer)
    mine, given = (dict(model.named_parameters()) for model in (pipeline.transformer, theirs.transformer))
    assert all(mine[name].data_ptr() == parameter.data_ptr() for name, parameter in given.items())
    assert torch.equal(clip(pipeline, family), clip(ours, family))
    apply_group_offloading(pipeline.transformer, "cpu", offload_type="leaf_level")
    assert torch.equal(clip(pipeline, family), clip(ours, family))


def test_a_model_that_is_put_in_later_becomes_ours_too(stock: Stock) -> None:
    pipeline = stock.pipeline("Wan2.1")
    pipeline.transformer = stock.oracle("Wan2.1").transformer
    assert type(pipeline.transformer) is vramkit.WanTransformer3DModel
    assert torch.equal(clip(pipeline, "Wan2.1"), clip(stock.pipeline("Wan2.1"), "Wan2.1"))


def test_tiling_that_was_enabled_stays_enabled(stock: Stock) -> None:
    vae = copy.deepcopy(stock.oracle("Wan2.1").vae)
    vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=16, tile_sample_stride_width=16
    )
    pipeline, expected = stock.pipeline("Wan2.1"), stock.pipeline("Wan2.1")
    pipeline.vae = vae
    expected.vae = copy.deepcopy(expected.vae)
    expected.vae.enable_tiling(32, 32, 16, 16)
    assert torch.equal(clip(pipeline, "Wan2.1"), clip(expected, "Wan2.1"))
    assert not torch.equal(clip(pipeline, "Wan2.1"), clip(stock.pipeline("Wan2.1"), "Wan2.1"))


def test_blocks_of_gguf_stay_blocks(stock: Stock, tmp_path: Path) -> None:
    config = denoisers.DENOISERS["Wan2.1"].tiny | {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 512}
    original = original_file("WanTransformer3DModel", diffusers.WanTransformer3DModel(**config).state_dict())
    written: dict[str, Any] = dict(original)
    for at, (name, weight) in enumerate(original.items()):
        if "blocks" in name and weight.ndim == 2:
            form = ("Q8_0", "Q4_K")[at % 2]
            written[name] = (form, random_blocks(form, *weight.shape, seed=at)[0])
    path = write_gguf(tmp_path / "wan.gguf", written)
    diffusers.WanTransformer3DModel(**config).save_pretrained(tmp_path / "config")
    theirs = diffusers.WanTransformer3DModel.from_single_file(
        str(path),
        config=str(tmp_path / "config"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    parts = stock.pipeline("Wan2.1").components | {"transformer": theirs}
    pipeline = vramkit.WanPipeline(**parts)
    reference = vramkit.WanTransformer3DModel.from_single_file(path, config=config)
    weight = pipeline.transformer.blocks[1].ffn.net[2].weight
    assert isinstance(weight, GgufTensor)
    assert weight.blocks.data_ptr() == theirs.blocks[1].ffn.net[2].weight.data_ptr()
    with torch.no_grad():
        out = pipeline.transformer(**denoisers.wan_inputs()).sample
        assert torch.equal(out, reference(**denoisers.wan_inputs()).sample)


class TestErrors:
    @pytest.fixture
    def transformer(self, stock: Stock) -> Any:
        """One of one's own."""
        return copy.deepcopy(stock.oracle("Wan2.1").transformer)

    def refused(self, stock: Stock, error: type[Exception], message: str, **components: Any) -> None:
        pipeline = stock.pipeline("Wan2.1")
        with pytest.raises(error, match=message):
            type(pipeline)(**pipeline.components | components)

    def test_other_families_and_classes(self, stock: Stock) -> None:
        for source in (stock.oracle("LTX-Video"), stock.pipeline("LTX-Video")):
            other = {"transformer": source.transformer}
            self.refused(
                stock, ConfigError, "LTXVideoTransformer3DModel, which WanPipeline cannot use: it is of", **other
            )
        tiny = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        self.refused(stock, ConfigError, "vae is a AutoencoderKL of diffusers, which WanPipeline cannot use", vae=tiny)

    def test_adapters(self, stock: Stock, transformer: Any) -> None:
        from peft import LoraConfig

        transformer.add_adapter(LoraConfig(target_modules=["to_q"]))
        self.refused(stock, ConfigError, "transformer carries adapters", transformer=transformer)

    def test_hooks_and_offloading(self, stock: Stock, transformer: Any) -> None:
        self.refused(
            stock, ConflictError, "transformer is offloaded", transformer=_offloaded(copy.deepcopy(transformer))
        )
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        self.refused(stock, ConflictError, "carries diffusers' hook", transformer=transformer)

    def test_compiled(self, stock: Stock, transformer: Any) -> None:
        self.refused(stock, ConfigError, "is a compiled WanTransformer3DModel", transformer=torch.compile(transformer))

    def test_another_layout(self, stock: Stock, transformer: Any) -> None:
        transformer.extra = nn.Linear(2, 2)
        self.refused(stock, ConfigError, "differ in extra.bias, extra.weight", transformer=transformer)


def _offloaded(module: nn.Module) -> nn.Module:
    apply_group_offloading(module, "cpu")
    return module
