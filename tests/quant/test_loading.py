"""Weights quantized as they are read, saved, and loaded without the original; components of pipelines."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_lora
from live_bytes import LiveBytes
from modules import BlockNet, save, tokens
from quant.configs import CONFIGS

from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.pipelines.wan.pipeline import WanPipeline
from vramkit.pipelines.wan.transformer import WanTransformer3DModel
from vramkit.quant import (
    BitsAndBytes4bitConfig,
    BitsAndBytes8bitConfig,
    PipelineQuantizationConfig,
    QuantoConfig,
    load_quantized,
    quantization_of,
    quantize,
    save_quantized,
)
from vramkit.quant.files import load_quantizing


class HostBytes(LiveBytes):
    """Counts memory that is there: a wrapper reports the size that its weight had."""

    def watch(self, storage: torch.UntypedStorage) -> None:
        with contextlib.suppress(RuntimeError):  # a wrapper has no memory of its own
            if storage.device.type != "meta" and storage.data_ptr():
                super().watch(storage)


def transformer_inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_loading_quantized_is_loading_and_quantizing(kind: str, wan_folder: Path, tmp_path: Path) -> None:
    late = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    quantize(late, CONFIGS[kind])
    model = WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", quantization_config=CONFIGS[kind]
    )
    inputs = transformer_inputs()
    expected = late(*inputs).sample
    assert torch.equal(model(*inputs).sample, expected)
    assert model.dtype == torch.float32
    done = quantization_of(model)
    assert done == quantization_of(late)
    assert done is not None
    assert "blocks.0.attn1.to_q" in done.quantized
    assert {"proj_out", "condition_embedder.time_proj"} <= set(done.skipped)

    save_quantized(model, tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)  # the folder says by itself that it is quantized
    assert torch.equal(again(*inputs).sample, expected)
    assert quantization_of(again) == done
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    apply_group_offloading(again, "cpu")  # from the file of the quantized weights
    assert torch.equal(again(*inputs).sample, expected)
    with pytest.raises(ConfigError, match="quantized already"):
        WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=CONFIGS[kind])


@pytest.mark.parametrize("kind", ["nf4", "int8", "quanto_int4"])
def test_a_saved_model_is_loaded_in_another_compute_dtype(kind: str, wan_folder: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(
        wan_folder, subfolder="transformer", torch_dtype=torch.bfloat16, quantization_config=CONFIGS[kind]
    )
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert again.dtype == torch.float32
    assert again(*transformer_inputs()).sample.dtype == torch.float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_memory_holds_what_is_quantized_and_one_weight(kind: str, tmp_path: Path) -> None:
    net = BlockNet(blocks=12, width=128)
    path = save(net, tmp_path / "net.safetensors")
    weight_bytes = 128 * 256 * 4
    wide_bytes = 24 * weight_bytes
    with torch.device("meta"):
        empty = BlockNet(blocks=12, width=128)
    with HostBytes() as count, torch.no_grad():
        load_quantizing(empty, path, CONFIGS[kind])
    done = quantization_of(empty)
    assert done is not None
    # What an original weight becomes on the way: fp32 and integer copies, freed before the next one.
    assert count.peak_bytes < done.quantized_bytes + 12 * weight_bytes + wide_bytes // 20
    assert count.live_bytes < done.quantized_bytes + wide_bytes // 20


def test_any_module_is_saved_and_loaded(tmp_path: Path) -> None:
    net, x = BlockNet(blocks=2, width=64).eval(), tokens(8)
    with pytest.raises(ConfigError, match="is not quantized"):
        save_quantized(net, tmp_path)
    quantize(net, CONFIGS["nf4_double"])
    save_quantized(net, tmp_path, max_shard_size="20KB")
    with torch.device("meta"):
        again = BlockNet(blocks=2, width=64).eval()
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    load_quantized(again, tmp_path / "model.safetensors.index.json", saved)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    net = BlockNet(blocks=2, width=64).eval()
    quantize(net, CONFIGS["nf4"])
    save_quantized(net, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    file = tmp_path / "model.safetensors"

    def load(saved: Any, blocks: int = 2, width: int = 64) -> None:
        with torch.device("meta"):
            again = BlockNet(blocks=blocks, width=width)
        load_quantized(again, file, saved)

    with pytest.raises(CheckpointError, match=r"quantized by 'gptq'.*original"):
        load(saved | {"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"has no blocks\.1\."):
        load(saved, blocks=1)
    with pytest.raises(CheckpointError, match="shape"):
        load(saved, width=32)
    with pytest.raises(CheckpointError, match=r"lack the parts of embed\.weight"):
        load(saved | {"tensors": {"embed.weight": {"shape": [64, 8], "dtype": "float32"}}})


def test_a_pipeline_quantizes_the_components_that_are_named(wan_folder: Path, tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        components_to_quantize=["transformer", "text_encoder"],
    )
    pipeline = WanPipeline.from_pretrained(wan_folder, quantization_config=config)
    done = quantization_of(pipeline.transformer), quantization_of(pipeline.text_encoder)
    assert all(each is not None and each.config.quant_type == "nf4" for each in done)
    assert done[1] is not None
    assert not any(name.endswith(".wo") for name in done[1].quantized)  # transformers keeps it wide
    assert quantization_of(pipeline.vae) is None
    pipeline.set_progress_bar_config(disable=True)

    def clip(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
        frames: torch.Tensor = pipeline("a cat", generator=generator, **options).frames
        return frames

    expected = clip(pipeline)
    save_quantized(pipeline, tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(clip(again), expected)
    again.enable_model_cpu_offload("cpu")
    assert torch.equal(clip(again), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8", "quanto_int4", "fp8"])
def test_adapters_over_quantized_weights_resident_and_streamed(kind: str, wan_folder: Path, tmp_path: Path) -> None:
    mapping = {"transformer": CONFIGS[kind]}
    plain = WanPipeline.from_pretrained(
        wan_folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    path = write_lora(plain.transformer, tmp_path)
    inputs = transformer_inputs()
    without = plain.transformer(*inputs).sample
    results = []
    for streams in (False, True):
        config = PipelineQuantizationConfig(quant_mapping=mapping)
        pipeline = WanPipeline.from_pretrained(wan_folder, quantization_config=config)
        if streams:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level")
        pipeline.load_lora_weights(path, adapter_name="style")
        results.append(pipeline.transformer(*inputs).sample)
        if kind != "fp8":  # fp8 is rounded again
            with pytest.raises(ConfigError, match="fuse before quantizing"):
                pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        assert torch.equal(pipeline.transformer(*inputs).sample, without)
    assert torch.equal(*results)
    assert not torch.equal(results[0], without)


def test_a_config_for_each_component_also_of_the_peers(wan_folder: Path) -> None:
    import transformers

    theirs = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
    config = PipelineQuantizationConfig(
        quant_mapping={"text_encoder": theirs, "transformer": QuantoConfig(weights="int4")}
    )
    pipeline = WanPipeline.from_pretrained(wan_folder, vae=None, tokenizer=None, quantization_config=config)
    done = quantization_of(pipeline.text_encoder), quantization_of(pipeline.transformer)
    assert done[0] is not None
    assert isinstance(done[0].config, BitsAndBytes8bitConfig)
    assert done[0].config.threshold == 4.0
    assert done[1] is not None
    assert isinstance(done[1].config, QuantoConfig)


def test_the_pipeline_config_of_diffusers_is_understood(wan_folder: Path) -> None:
    from diffusers.quantizers import PipelineQuantizationConfig as Theirs

    theirs = Theirs(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        components_to_quantize="transformer",
    )
    pipeline = WanPipeline.from_pretrained(wan_folder, quantization_config=theirs)
    done = quantization_of(pipeline.transformer)
    assert done is not None
    assert isinstance(done.config, BitsAndBytes4bitConfig)
    assert (done.config.quant_type, done.config.double_quant) == ("fp4", True)
    assert quantization_of(pipeline.text_encoder) is None


def test_one_config_is_for_every_model_but_the_vae(wan_folder: Path) -> None:
    pipeline = WanPipeline.from_pretrained(wan_folder, quantization_config=BitsAndBytes4bitConfig(quant_type="nf4"))
    assert quantization_of(pipeline.transformer) is not None
    assert quantization_of(pipeline.text_encoder) is not None
    assert quantization_of(pipeline.vae) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of them"),
        ({"quant_backend": "quanto", "quant_mapping": {}}, "give one of them"),
        ({"quant_backend": "gguf"}, "quant_backend='gguf'; expected one of 'bitsandbytes_4bit'"),
        ({"quant_backend": "quanto", "quant_kwargs": {"bits": 3}}, "no option 'bits'"),
        ({"quant_mapping": {}, "components_to_quantize": "vae"}, "belong to quant_backend"),
        ({"quant_mapping": {"transformer": 3}}, "was given as int"),
    ],
)
def test_wrong_pipeline_configs_are_named(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineQuantizationConfig(**options)


def test_components_that_are_not_loaded_are_named(wan_folder: Path) -> None:
    config = PipelineQuantizationConfig("quanto", {"weights": "int8"}, "upscaler")
    with pytest.raises(ConfigError, match="'upscaler'; the components are"):
        WanPipeline.from_pretrained(wan_folder, quantization_config=config)
    config = PipelineQuantizationConfig("quanto", {"weights": "int8"}, ["transformer"])
    with pytest.raises(ConfigError, match="passed ready"):
        WanPipeline.from_pretrained(wan_folder, transformer=None, quantization_config=config)
