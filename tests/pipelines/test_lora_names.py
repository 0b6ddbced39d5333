"""Every way to write a layer finds it: original and repackaged names, outside the blocks too, and those of other models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_hunyuan_video_lora_to_diffusers,
    _convert_non_diffusers_ltx2_lora_to_diffusers,
)
from torch import Tensor, nn

from vramkit import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, LTXVideoTransformer3DModel
from vramkit.pipelines.lora.keys import lora_weights
from vramkit.pipelines.lora.names import Names, component_of, parse

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}


@pytest.fixture(scope="module")
def hunyuan() -> Any:
    with torch.device("meta"):
        return HunyuanVideoTransformer3DModel.from_config(SIZES | {"num_single_layers": 1, "rope_axes_dim": (4, 6, 6)})


@pytest.fixture(scope="module")
def ltx() -> Any:
    with torch.device("meta"):
        return LTXVideoTransformer3DModel.from_config(SIZES | {"cross_attention_dim": 32})


OUTSIDE = [
    "img_in.proj",
    "time_in.mlp.0",
    "time_in.mlp.2",
    "guidance_in.mlp.0",
    "guidance_in.mlp.2",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "txt_in.input_embedder",
    "txt_in.t_embedder.mlp.0",
    "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.linear_1",
    "txt_in.c_embedder.linear_2",
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj",
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1",
    "txt_in.individual_token_refiner.blocks.0.mlp.fc2",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1",
    "double_blocks.0.img_attn_proj",
    "double_blocks.0.txt_mod.linear",
    "double_blocks.0.img_attn_q_norm",
    "double_blocks.0.txt_attn_k_norm",
    "single_blocks.0.linear2",
    "single_blocks.0.q_norm",
    "single_blocks.0.modulation.linear",
    "final_layer.linear",
]
COMFY = {
    "time_in.mlp.0": "time_in.in_layer",
    "guidance_in.mlp.2": "guidance_in.out_layer",
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": "txt_in.individual_token_refiner.blocks.0.self_attn.proj",
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": "txt_in.individual_token_refiner.blocks.0.mlp.0",
    "double_blocks.0.img_attn_proj": "double_blocks.0.img_attn.proj",
    "double_blocks.0.txt_mod.linear": "double_blocks.0.txt_mod.lin",
    "double_blocks.0.img_attn_q_norm": "double_blocks.0.img_attn.norm.query_norm",
    "double_blocks.0.txt_attn_k_norm": "double_blocks.0.txt_attn.norm.key_norm",
    "single_blocks.0.q_norm": "single_blocks.0.norm.query_norm",
    "single_blocks.0.modulation.linear": "single_blocks.0.modulation.lin",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_original_names_of_hunyuan_video(name: str, hunyuan: Any) -> None:
    (converted,) = _convert_hunyuan_video_lora_to_diffusers({f"{name}.lora_A.weight": torch.ones(1)})
    expected = converted.removeprefix("transformer.").removesuffix(".lora_A.weight")
    names = Names(hunyuan)
    assert expected in names.modules
    for spelling in {name, COMFY.get(name, name)}:
        for written in (spelling, f"diffusion_model.{spelling}", f"lora_unet_{spelling.replace('.', '_')}"):
            assert names.find(written, "down")[1] == (expected,), written


def test_every_layer_of_hunyuan_video_has_an_original_name(hunyuan: Any) -> None:
    names = Names(hunyuan)
    ours = {
        name for name in names.modules if not name.startswith("context_embedder.token_refiner") or "norm" not in name
    }
    original = {
        found for spelling, found in names._spelled.items() if spelling not in names.modules and "." in spelling
    }
    assert ours <= {name for found in original for name in found}


def test_shift_and_scale_of_the_head_change_places(hunyuan: Any) -> None:
    up = torch.arange(64.0).reshape(64, 1)
    layer = "diffusion_model.final_layer.adaLN_modulation.1"
    state = {f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": up, f"{layer}.diff_b": up.flatten()}
    (found,) = lora_weights(hunyuan, state, source="file").layers.items()
    swapped = torch.cat([up[32:], up[:32]])  # shift and scale in the original, scale and shift in diffusers
    assert found[0] == "norm_out.linear"
    assert torch.equal(found[1].up, swapped)
    assert torch.equal(found[1].bias, swapped.flatten())
    for written in ("transformer.norm_out.linear", "norm_out.linear"):
        state = {f"{written}.lora_A.weight": torch.ones(1, 32), f"{written}.lora_B.weight": up}
        assert torch.equal(lora_weights(hunyuan, state, source="file").layers["norm_out.linear"].up, up)


def test_joined_rows_of_the_refiner_and_of_comfy(hunyuan: Any) -> None:
    up = torch.arange(96.0).reshape(96, 1)
    refiner = "context_embedder.token_refiner.refiner_blocks.0.attn.to_{}"
    for layer, targets in {
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": refiner,
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv": refiner,
        "double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.to_{}",
        "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.add_{}_proj",
    }.items():
        state = {f"{layer}.lora_down.weight": torch.ones(1, 32), f"{layer}.lora_up.weight": up}
        found = lora_weights(hunyuan, state, source="file").layers
        assert {name: each.up[0].item() for name, each in found.items()} == {
            targets.format(part): float(32 * at) for at, part in enumerate("qkv")
        }


@pytest.mark.parametrize(
    "name",
    [
        "patchify_proj",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.linear",
        "caption_projection.linear_2",
        "transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.0.attn2.q_norm",
        "transformer_blocks.0.ff.net.0.proj",
        "proj_out",
    ],
)
def test_original_names_of_ltx(name: str, ltx: Any) -> None:
    converted = _convert_non_diffusers_ltx2_lora_to_diffusers({f"diffusion_model.{name}.lora_A.weight": torch.ones(1)})
    expected = next(iter(converted)).removeprefix("transformer.").removesuffix(".lora_A.weight")
    names = Names(ltx)
    for written in (f"diffusion_model.{name}", f"model.diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}"):
        assert names.find(written, "down")[1] == (expected,), written


def test_tables(ltx: Any) -> None:
    state: dict[str, Tensor] = {
        "diffusion_model.scale_shift_table.diff": torch.ones(2, 32),
        "diffusion_model.transformer_blocks.0.scale_shift_table.diff": torch.ones(6, 32),
    }
    found = lora_weights(ltx, state, source="file").changes
    assert found.keys() == {"scale_shift_table", "transformer_blocks.0.scale_shift_table"}
    state = {"transformer_blocks.0.diff_m": torch.ones(1, 6, 32)}
    assert lora_weights(ltx, state, source="file").changes["transformer_blocks.0.scale_shift_table"].shape == (6, 32)


def test_convolutions_of_cogvideox() -> None:
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(SIZES | {"in_channels": 4})
    layer = "transformer.patch_embed.proj"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 4, 2, 2), f"{layer}.lora_B.weight": torch.ones(32, 2, 1, 1)}
    found = lora_weights(model, state, source="file")
    assert found.changes["patch_embed.proj.weight"].shape == (32, 4, 2, 2)
    assert float(found.changes["patch_embed.proj.weight"].mean()) == 2


def test_layers_of_other_models_stay_unknown(hunyuan: Any) -> None:
    names = Names(hunyuan)
    for written in (
        "single_blocks.9.linear2",
        "single.0.proj_out",
        "vace_blocks.0.proj_out",
        "my.proj_out",
        "transformer_2.proj_out",
    ):
        assert names.find(written, "down")[1] == (), written


def test_models_with_adapters_keep_their_names() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(2, 2)
            self.lora_A = nn.ModuleDict({"a": nn.Linear(2, 1)})

    model = nn.ModuleDict({"layer": Layer(), "other": nn.Linear(2, 2)})
    assert list(Names(model).modules) == ["layer", "other"]


@pytest.mark.parametrize(
    ("key", "component", "layer", "part"),
    [
        ("transformer.a.lora_A.weight", "transformer", "transformer.a", "down"),
        ("transformer_2.a.lora_B.weight", "transformer_2", "a", "up"),
        ("text_encoder.a.lora.up.weight", "text_encoder", "a", "up"),
        ("text_encoder.a.lora_linear_layer.down.weight", "text_encoder", "a", "down"),
        ("lora_te_a.lora_down.weight", "text_encoder", "a", "down"),
        ("lora_te1_a.alpha", "text_encoder", "a", "alpha"),
        ("lora_te2_a.diff_b", "text_encoder_2", "a", "diff_b"),
        ("text_encoder_2.a.b_norm", "text_encoder_2", "a", "diff_b"),
        ("a.lora_B.style.bias", "transformer", "a", "bias"),
        ("a.base_layer.bias", "transformer", "a", "value_b"),
        ("a.modules_to_save.default.weight", "transformer", "a", "value"),
        ("a.lora_A", "transformer", "a", "down"),
        ("a.lora_B.default_1", "transformer", "a", "up"),
        ("a.lora_B.scale", "transformer", "a.lora_B.scale", None),
        ("high_noise_model.a.lora_A.weight", "transformer", "high_noise_model.a", "down"),
        ("low_noise_model.a.lora_A.weight", "transformer_2", "a", "down"),
        ("diffusion_model.low_noise_model.a.lora_A.weight", "transformer_2", "a", "down"),
        ("diffusion_model.transformer_2.a.lora_A.weight", "transformer_2", "a", "down"),
        ("pipe.dit2.a.lora_A.default.weight", "transformer_2", "a", "down"),
        ("_orig_mod.text_encoder.a.lora_A.weight", "text_encoder", "a", "down"),
        ("text_encoders.clip_l.transformer.a.lora_A.weight", "text_encoder_2", "transformer.a", "down"),
    ],
)
def test_parts(key: str, component: str, layer: str, part: str | None) -> None:
    found, inner = component_of(key)
    assert (found, *parse(inner)) == (component, layer, part)
