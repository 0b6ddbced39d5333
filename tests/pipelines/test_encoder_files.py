"""Text and image encoders from one file, as others repackage them: the class, the config and the values that it had."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from autoencoders import AUTOENCODERS
from families import Stock
from gguf_files import random_blocks, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vramkit import AutoencoderKLCogVideoX, AutoencoderKLWan, AutoModel, WanPipeline
from vramkit.casting.narrow import NarrowTensor
from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.offload.disk import span_of
from vramkit.pipelines.loading.encoder_files import encoder_in
from vramkit.pipelines.loading.told_configs import told_config

T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
CLIP = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "head_dim": 128}
TINY: dict[str, tuple[str, dict[str, Any]]] = {  # class -> its config class, and a config
    "UMT5EncoderModel": ("UMT5Config", T5),
    "T5EncoderModel": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "LlamaModel": ("LlamaConfig", LLAMA | {"vocab_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "CLIPTextModel": ("CLIPTextConfig", CLIP | {"vocab_size": 96, "eos_token_id": 2}),
    "CLIPVisionModel": ("CLIPVisionConfig", CLIP | {"image_size": 28, "patch_size": 7}),
}
IDS = torch.tensor([[5, 9, 2, 1]])


def build(kind: str) -> Any:
    torch.manual_seed(0)
    config, options = TINY[kind]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    for parameter in model.parameters():  # norms and biases too
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(requires_grad=False)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"
    }


@torch.no_grad()
def output(model: Any) -> Tensor:
    given = {"pixel_values": torch.ones(1, 3, 28, 28)} if "Vision" in type(model).__name__ else {"input_ids": IDS}
    found: Tensor = model(**given)[0]
    return found


def assert_reads(file: Path, model: Any, **options: Any) -> Any:
    made = AutoModel.from_single_file(file, **options)
    assert type(made) is type(model)
    assert torch.equal(output(made), output(model))
    return made


@pytest.mark.parametrize("prefix", ["", "text_encoders.some.transformer."])
@pytest.mark.parametrize("kind", TINY)
def test_names_of_transformers_and_configs_by_shapes(kind: str, prefix: str, tmp_path: Path) -> None:
    model = build(kind)
    file = tmp_path / "encoder.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in state_of(model).items()}, file)
    made = assert_reads(file, model)
    assert all(span_of(parameter) is not None for parameter in made.parameters())


WAN = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention", "attn"),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
)
LLAMA_CPP = (
    (r"^shared\.", "token_embd."),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.", "enc.blk."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "attn_rel_b"),
    (r"layer\.0\.SelfAttention\.", "attn_"),
    (r"layer\.0\.layer_norm", "attn_norm"),
    (r"layer\.1\.layer_norm", "ffn_norm"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn_gate"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn_up"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn_down"),
)


def spelled(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def test_names_of_the_code_of_wan(tmp_path: Path) -> None:
    model = build("UMT5EncoderModel")
    save_file({spelled(name, WAN): each for name, each in state_of(model).items()}, tmp_path / "umt5.safetensors")
    assert_reads(tmp_path / "umt5.safetensors", model)


@pytest.mark.parametrize("kind", ["UMT5EncoderModel", "T5EncoderModel"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    model, written = build(kind), {}
    for at, (name, tensor) in enumerate(state_of(model).items()):
        written[spelled(name, LLAMA_CPP)] = tensor
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            blocks, values = random_blocks("Q8_0", *tensor.shape, seed=at)
            written[spelled(name, LLAMA_CPP)] = ("Q8_0", blocks)
            model.get_parameter(name).copy_(values)
    write_gguf(tmp_path / "t5.gguf", written)
    made = assert_reads(tmp_path / "t5.gguf", model, torch_dtype="float32")
    handle = apply_group_offloading(made, "cpu", offload_type="leaf_level")
    assert torch.equal(output(made), output(model))
    handle.remove()


def test_scaled_fp8_beside_what_is_no_weight(tmp_path: Path) -> None:
    model = build("UMT5EncoderModel").bfloat16()
    stored: dict[str, Tensor] = {}
    for name, weight in state_of(model).items():
        stored[name] = weight
        if name.startswith("encoder.block") and weight.ndim == 2 and "bias" not in name:
            scale = weight.float().abs().max() / 448
            stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            model.get_parameter(name).copy_(stored[name].to(torch.bfloat16) * scale)
    stored |= {
        "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
        "spiece_model": torch.ones(9, dtype=torch.uint8),
    }
    save_file(stored, tmp_path / "umt5_fp8.safetensors")
    made = AutoModel.from_single_file(tmp_path / "umt5_fp8.safetensors")
    assert sum(isinstance(weight, NarrowTensor) for weight in made.parameters()) == 14
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(output(made), output(model))


def test_both_halves_of_clip_in_one_file(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config=TINY["CLIPTextModel"][1], vision_config=TINY["CLIPVisionModel"][1], projection_dim=64
    )
    torch.manual_seed(0)
    whole = transformers.CLIPModel(config).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert encoder_in(shapes, source="x", wanted="CLIPTextModel").config["projection_dim"] == 64
    assert encoder_in(shapes, source="x", wanted="CLIPVisionModelWithProjection").config["image_size"] == 28
    with pytest.raises(CheckpointError, match="no weights of T5EncoderModel; it holds CLIPTextModel, CLIPVisionModel"):
        encoder_in(shapes, source="x", wanted="T5EncoderModel")


def test_other_files_are_refused(tmp_path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of(build("LlamaModel")).items()}
    with pytest.raises(CheckpointError, match="biases, as Qwen's"):
        encoder_in(shapes | {"layers.0.self_attn.q_proj.bias": (256,)}, source="x")
    umt5 = {name: tuple(tensor.shape) for name, tensor in state_of(build("UMT5EncoderModel")).items()}
    with pytest.raises(CheckpointError, match="no weights of T5EncoderModel; it holds UMT5EncoderModel"):
        encoder_in(umt5, source="x", wanted="T5EncoderModel")


class TestPipelines:
    def test_models_by_the_paths_of_their_files(self, stock: Stock, tmp_path: Path) -> None:
        folder, pipeline = stock.folder("Wan2.1"), stock.pipeline("Wan2.1")
        encoder = tmp_path / "umt5.safetensors"
        save_file(
            {spelled(k, WAN): v.clone() for k, v in load_file(folder / "text_encoder" / "model.safetensors").items()},
            encoder,
        )
        vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
        made = WanPipeline.from_pretrained(
            folder,
            text_encoder=encoder,
            vae=str(vae),
            transformer=folder / "transformer",
            torch_dtype={"vae": "float32"},
        )
        for name in ("text_encoder", "vae", "transformer"):
            got, expected = (getattr(each, name).state_dict() for each in (made, pipeline))
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[key].float(), expected[key].float()) for key in expected)

    def test_paths_that_cannot_be(self, stock: Stock, tmp_path: Path) -> None:
        folder = stock.folder("Wan2.1")
        with pytest.raises(ConfigError, match=r"missing\.safetensors does not exist"):
            WanPipeline.from_pretrained(folder, text_encoder="missing.safetensors")
        with pytest.raises(ConfigError, match=r"scheduler='x\.json' is no folder, and single files are read of models"):
            WanPipeline.from_pretrained(folder, scheduler="x.json")
        save_file(state_of(build("T5EncoderModel")), tmp_path / "t5.safetensors")
        with pytest.raises(CheckpointError, match="no weights of UMT5EncoderModel; it holds T5EncoderModel"):
            WanPipeline.from_pretrained(folder, text_encoder=tmp_path / "t5.safetensors")

    def test_the_autoencoder_of_cogvideox_takes_its_number_from_the_folder(self, stock: Stock, tmp_path: Path) -> None:
        folder = stock.folder("CogVideoX")
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        pipeline = type(stock.pipeline("CogVideoX"))
        expected = stock.pipeline("CogVideoX").vae.config
        assert pipeline.from_pretrained(folder, vae=file).vae.config == expected
        assert pipeline.from_single_file(file, config=folder).vae.config == expected
        with pytest.raises(CheckpointError, match="give config="):
            AutoencoderKLCogVideoX.from_single_file(file)


def test_the_config_of_wan22_autoencoder_is_told() -> None:
    published = AUTOENCODERS["Wan2.2 5B"].published
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(published)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    told = told_config("AutoencoderKLWan", shapes)
    assert told is not None
    assert len(told["latents_mean"]) == len(told["latents_std"]) == 48
    assert min(told["latents_std"]) > 0.3
    assert {name: value for name, value in told.items() if name in published}.items() <= published.items()
    defaults = json.loads(json.dumps(dataclasses.asdict(AutoencoderKLWan.config_class())))
    assert all(published[name] == defaults[name] for name in published.keys() - told.keys() if name[0] != "_")
    assert told_config("AutoencoderKLWan", shapes | {"post_quant_conv.weight": (8, 8, 1, 1, 1)}) is None
