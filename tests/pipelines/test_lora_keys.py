"""Every spelling of a LoRA file gives the weights that diffusers' converters make of it; other files are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_oracle, write_lora
from diffusers.loaders.lora_conversion_utils import (
    _convert_hunyuan_video_lora_to_diffusers,
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vramkit import AutoModel, HunyuanVideoTransformer3DModel, WanPipeline
from vramkit.errors import CheckpointError
from vramkit.pipelines.lora.config import LoraConfig
from vramkit.pipelines.lora.files import read_lora
from vramkit.pipelines.lora.keys import AdapterWeights, LoraWeights, check_fit, lora_weights

ORIGINAL = {  # suffix of a layer of ours -> the original spelling
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


@pytest.fixture(scope="module")
def wan(wan_folder: Path) -> Any:
    return AutoModel.from_pretrained(wan_folder, subfolder="transformer")


@pytest.fixture(scope="module")
def layers(wan: Any) -> dict[str, dict[str, Tensor]]:
    """Random matrices for every linear layer, of ranks and alphas that differ."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for number, (name, layer) in enumerate((n, m) for n, m in wan.named_modules() if isinstance(m, nn.Linear)):
        rank = 2 + number % 3
        found[name] = {
            "A": torch.randn(rank, layer.in_features, generator=generator),
            "B": torch.randn(layer.out_features, rank, generator=generator) * 0.2,
            "alpha": torch.tensor(1.0 + number % 2),
            "bias": torch.randn(layer.out_features, generator=generator) * 0.1,
        }
    return found


def original(name: str) -> str:
    for ours, theirs in ORIGINAL.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    raise KeyError(name)


def change(weights: LoraWeights) -> Tensor:
    return weights.up @ weights.down * (weights.alpha / weights.rank)


def changes(read: AdapterWeights) -> dict[str, Tensor]:
    found = read.layers
    biases = {
        f"{name}.bias": each.bias * (each.alpha / each.rank) for name, each in found.items() if each.bias is not None
    }
    return {name: change(each) for name, each in found.items()} | biases | read.changes


def fit(model: Any, state: dict[str, Tensor], config: dict[str, Any] | None = None) -> AdapterWeights:
    read = lora_weights(model, state, LoraConfig(config), source="my file")
    check_fit({"transformer": read}, state, source="my file", model=type(model).__name__)
    return read


def peft_changes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a file that its converters brought into PEFT's form, with alpha = rank."""
    state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    found = {}
    for key, tensor in state.items():
        if key.endswith(".lora_B.weight"):
            found[key.removesuffix(".lora_B.weight")] = tensor @ state[key.replace("lora_B", "lora_A")]
        elif key.endswith(".lora_B.bias"):
            found[key.replace(".lora_B", "")] = tensor
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-6, msg=name)


PEFT_FORMS = {
    "diffusers": "transformer.{}.lora_{}.weight",
    "without a prefix": "{}.lora_{}.weight",
    "named": "transformer.{}.lora_{}.default.weight",
    "of a PEFT model": "base_model.model.{}.lora_{}.weight",
    "comfy": "diffusion_model.{}.lora_{}.weight",
    "checkpoint": "model.diffusion_model.{}.lora_{}.weight",
    "simple tuner": "transformer.base_model.model.{}.lora_{}.weight",
    "diffsynth": "pipe.dit.{}.lora_{}.default.weight",
    "another adapter": "transformer.{}.lora_{}.style.weight",
    "parameters": "diffusion_model.{}.lora_{}.default",
    "bare parameters": "{}.lora_{}",
    "distilled": "net.{}.lora_{}.weight",
    "self forcing": "generator.model.{}.lora_{}.weight",
    "its average": "generator_ema._fsdp_wrapped_module.model.{}.lora_{}.weight",
    "first of two experts": "high_noise_model.{}.lora_{}.weight",
    "kohya with dots": "lora_unet.{}.lora_{}.weight",
    "compiled": "lora_unet__orig_mod.{}.lora_{}.weight",
}


@pytest.mark.parametrize("form", PEFT_FORMS)
def test_names_of_diffusers_and_peft(form: str, wan: Any, layers: dict[str, dict[str, Tensor]]) -> None:
    state = {PEFT_FORMS[form].format(name, part): parts[part] for name, parts in layers.items() for part in "AB"}
    found = lora_weights(wan, state, source="file")
    assert_same(changes(found), {name: parts["B"] @ parts["A"] for name, parts in layers.items()})
    assert len({each.rank for each in found.layers.values()}) == 3


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_around_blocks(wrapper: str, wan: Any, layers: dict[str, dict[str, Tensor]]) -> None:
    expected = {name: parts["B"] @ parts["A"] for name, parts in layers.items()}
    for wrapped in (f"{wrapper}.blocks.0.{wrapper}.", f"lora_unet_blocks_0_{wrapper}_"):
        names = {name: name.replace("blocks.0.", wrapped) for name in layers}
        if "_blocks_" in wrapped:
            names = {name: each.replace(".", "_") if wrapped in each else each for name, each in names.items()}
        state = {f"{names[name]}.lora_{part}.weight": parts[part] for name, parts in layers.items() for part in "AB"}
        assert_same(changes(lora_weights(wan, state, source="file")), expected)


def test_names_of_attention_processors(wan: Any, layers: dict[str, dict[str, Tensor]]) -> None:
    state, expected = {}, {}
    for name, parts in layers.items():
        attention, _, part = name.partition(".to_")
        if part:
            layer = f"transformer.{attention}.processor.to_{part.removesuffix('.0')}_lora"
            state |= {f"{layer}.down.weight": parts["A"], f"{layer}.up.weight": parts["B"]}
            state[f"{layer}.alpha"] = parts["alpha"]
            expected[name] = parts["B"] @ parts["A"] * (parts["alpha"] / len(parts["A"]))
    assert len(expected) == 8 * 3
    assert_same(changes(lora_weights(wan, state, source="file")), expected)


@pytest.mark.parametrize("suffixes", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("has_alphas", [False, True])
def test_original_names_of_wan(
    suffixes: tuple[str, str], has_alphas: bool, wan: Any, layers: dict[str, dict[str, Tensor]]
) -> None:
    down, up = suffixes
    state = {}
    for name, parts in layers.items():
        prefix = f"diffusion_model.{original(name)}"
        state |= {f"{prefix}.{down}.weight": parts["A"], f"{prefix}.{up}.weight": parts["B"]}
        state[f"{prefix}.diff_b"] = parts["bias"]
        if has_alphas and "blocks." in name:  # what diffusers reads alphas of
            state[f"{prefix}.alpha"] = parts["alpha"]
    state["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(48)
    state["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.zeros(48)
    theirs = _convert_non_diffusers_wan_lora_to_diffusers({key: tensor.clone() for key, tensor in state.items()})
    assert_same(changes(lora_weights(wan, state, source="file")), peft_changes(theirs))


def test_names_of_musubi(wan: Any, layers: dict[str, dict[str, Tensor]]) -> None:
    state = {}
    for name, parts in layers.items():
        if "blocks." in name:
            prefix = f"lora_unet_{original(name).replace('.', '_')}"
            state |= {f"{prefix}.lora_down.weight": parts["A"], f"{prefix}.lora_up.weight": parts["B"]}
            state[f"{prefix}.alpha"] = parts["alpha"]
    theirs = _convert_musubi_wan_lora_to_diffusers({key: tensor.clone() for key, tensor in state.items()})
    assert_same(changes(lora_weights(wan, state, source="file")), peft_changes(theirs))


def test_joined_layers_of_hunyuan_video(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, dim = 24, 128  # of the published model, which diffusers' converter has in its code
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel.from_config(
            {"num_attention_heads": heads, "attention_head_dim": dim, "num_layers": 1, "num_single_layers": 1}
        )
    wide, inner = heads * dim, 4 * heads * dim
    shapes = {
        "double_blocks.0.img_attn_qkv": (wide, 3 * wide),
        "double_blocks.0.txt_attn_qkv": (wide, 3 * wide),
        "double_blocks.0.img_attn_proj": (wide, wide),
        "double_blocks.0.txt_attn_proj": (wide, wide),
        "double_blocks.0.img_mod.linear": (wide, 6 * wide),
        "double_blocks.0.txt_mod.linear": (wide, 6 * wide),
        "double_blocks.0.img_mlp.fc1": (wide, inner),
        "double_blocks.0.img_mlp.fc2": (inner, wide),
        "double_blocks.0.txt_mlp.fc1": (wide, inner),
        "double_blocks.0.txt_mlp.fc2": (inner, wide),
        "single_blocks.0.linear1": (wide, 3 * wide + inner),
        "single_blocks.0.linear2": (wide + inner, wide),
        "single_blocks.0.modulation.linear": (wide, 3 * wide),
    }
    state = {}
    for name, (inputs, outputs) in shapes.items():
        state[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(1, inputs)
        state[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(outputs, 1)
    theirs = _convert_hunyuan_video_lora_to_diffusers(dict(state))
    ours = lora_weights(model, state, source="file").layers
    found = {f"transformer.{name}.lora_A.weight": each.down for name, each in ours.items()}
    found |= {f"transformer.{name}.lora_B.weight": each.up for name, each in ours.items()}
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in theirs.items())


def test_whole_differences_and_biases_alone(wan: Any) -> None:
    diff, bias = torch.randn(64, 48), torch.randn(48)
    state = {"diffusion_model.head.head.diff": diff, "diffusion_model.blocks.1.ffn.2.diff_b": bias}
    state["diffusion_model.time_projection.1.diff_b"] = torch.ones(288)  # diffusers leaves this one out
    read = lora_weights(wan, state, source="file")
    assert_same(
        changes(read),
        {"proj_out": diff, "blocks.1.ffn.net.2": torch.zeros(48, 96), "blocks.1.ffn.net.2.bias": bias}
        | {"condition_embedder.time_proj": torch.zeros(288, 48), "condition_embedder.time_proj.bias": torch.ones(288)},
    )
    assert read.layers["proj_out"].rank == 48


class TestAlphas:
    def test_of_metadata(self, wan_folder: Path, tmp_path: Path) -> None:
        pipeline = WanPipeline.from_pretrained(wan_folder)
        pipeline.set_progress_bar_config(disable=True)
        state = load_file(write_lora(pipeline.transformer, tmp_path))
        config = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"blocks.1.attn1.to_q": 6}, "rank_pattern": {}}
        config |= {"target_modules": ["to_q", "to_v"], "use_rslora": False, "use_dora": False, "lora_bias": False}
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": each for key, each in config.items()})}
        save_file(state, tmp_path / "with_metadata.safetensors", metadata=metadata)
        oracle = load_oracle(wan_folder)
        clips = []
        for each in (pipeline, oracle):
            each.load_lora_weights(str(tmp_path / "with_metadata.safetensors"))
            generator = torch.Generator().manual_seed(0)
            arguments = {"height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 2, "output_type": "pt"}
            clips.append(torch.as_tensor(each("a cat", **arguments, generator=generator).frames))
        assert (clips[0] - clips[1]).abs().max() <= 1e-4
        scaling = {
            name: m.scaling["default_0"] for name, m in pipeline.transformer.named_modules() if hasattr(m, "scaling")
        }
        assert scaling["blocks.1.attn1.to_q"] == 1.5
        assert scaling["blocks.0.attn1.to_q"] == 0.5

    def test_of_the_file_count_more(self, wan: Any) -> None:
        state = {"proj_out.lora_A.weight": torch.ones(4, 48), "proj_out.lora_B.weight": torch.ones(64, 4)}
        config = LoraConfig({"lora_alpha": 8, "use_rslora": True})
        assert lora_weights(wan, state, source="file").layers["proj_out"].alpha == 4
        assert lora_weights(wan, state, config, source="file").layers["proj_out"].alpha == 16  # 8 / sqrt(4) = 16 / 4
        state["proj_out.alpha"] = torch.tensor(3.0)
        assert lora_weights(wan, state, config, source="file").layers["proj_out"].alpha == 3

    def test_damaged_metadata(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "[1"})
        with pytest.raises(CheckpointError, match="is not a JSON object"):
            read_lora(tmp_path / "a.safetensors")


GOOD = {"proj_out.lora_A.weight": torch.ones(4, 48), "proj_out.lora_B.weight": torch.ones(64, 4)}
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "empty": ({}, "holds no LoRA weights"),
    "another model": (
        {"transformer.single.0.lora_A.weight": torch.ones(4, 48)},
        "single.0.* not a name that the model",
    ),
    "no LoRA": ({"transformer.proj_out.weight": torch.ones(64, 48)}, "proj_out.weight is not a name"),
    "another part": (GOOD | {"proj_out.scale_weight": torch.ones(1)}, "proj_out.scale_weight is not a name"),
    "half": ({"proj_out.lora_A.weight": torch.ones(4, 48)}, "proj_out has no lora_B weight"),
    "other half": ({"proj_out.lora_B.weight": torch.ones(64, 4)}, "proj_out has no lora_A weight"),
    "flat": (GOOD | {"proj_out.lora_A.weight": torch.ones(48)}, r"lora_A of \[48\] and lora_B of \[64, 4\]"),
    "ranks": (GOOD | {"proj_out.lora_B.weight": torch.ones(64, 3)}, r"lora_A of \[4, 48\] and lora_B of \[64, 3\]"),
    "inputs": (GOOD | {"proj_out.lora_A.weight": torch.ones(4, 40)}, "40 -> 64 features, .* has 48 -> 64"),
    "bias": (GOOD | {"proj_out.diff_b": torch.ones(3)}, r"a bias of \[3\], expected \[64\]"),
    "bias of LoRA alone": ({"proj_out.lora_B.bias": torch.ones(64)}, "has a bias of LoRA without its weights"),
    "alpha": (GOOD | {"proj_out.alpha": torch.ones(3)}, r"an alpha of \[3\]"),
    "no alpha": (GOOD | {"proj_out.alpha": torch.tensor(float("nan"))}, "an alpha of nan"),
    "alpha of all": (GOOD | {"transformer.alpha": torch.tensor(2.0)}, "transformer.alpha is an alpha of no layer"),
    "alpha of a half": (GOOD | {"proj_out.lora_A.alpha": torch.tensor(2.0)}, "is an alpha of no layer in the file"),
    "endless alpha": (GOOD | {"proj_out.alpha": torch.tensor(float("inf")).half()}, "an alpha of inf"),
    "difference": ({"proj_out.diff": torch.ones(3, 3)}, r"diff of \[3, 3\], .* is \[64, 48\]"),
    "table": ({"blocks.0.diff_m": torch.ones(1, 6, 40)}, r"is \[1, 6, 40\], the model has \[1, 6, 48\]"),
    "matrices of a table": ({"blocks.0.modulation.lora_A.weight": torch.ones(1, 6)}, "is a table"),
    "twice": (GOOD | {"head.head.lora_down.weight": torch.ones(4, 48)}, "is there twice"),
    "DoRA": (GOOD | {"proj_out.dora_scale": torch.ones(64)}, "holds a DoRA adapter.*only plain LoRA"),
    "LoKr": ({"blocks.0.ffn.0.lokr_w1": torch.ones(2, 2)}, "holds a LoKr adapter.*only plain LoRA"),
    "LoHa": ({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.ones(2, 2)}, "holds a LoHa adapter.*only plain LoRA"),
    "integers": (
        GOOD | {"proj_out.lora_B.weight": torch.ones(64, 4).to(torch.int8)},
        "torch.int8 on cpu, expected floating",
    ),
    "no values": (
        GOOD | {"proj_out.lora_B.weight": torch.ones(64, 4, device="meta")},
        "float32 on meta, expected floating",
    ),
    "AdaLoRA": (GOOD | {"proj_out.lora_E.default": torch.ones(4, 1)}, "holds a AdaLoRA adapter"),
    "scale of a half": (GOOD | {"proj_out.lora_A.scale": torch.ones(1)}, "lora_A.scale is not a name"),
    "scales of fp8": (GOOD | {"proj_out.lora_A.weight_scale": torch.ones(1)}, "weight_scale is not a name"),
    "bare twice": (GOOD | {"proj_out.lora_A": torch.ones(4, 48)}, "is there twice"),
    "Tucker": (GOOD | {"proj_out.lora_mid.weight": torch.ones(4, 4)}, "holds a Tucker LoCon adapter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit(case: str, wan: Any) -> None:
    state, message = WRONG[case]
    with pytest.raises(CheckpointError, match=f"my file.*{message}"):
        fit(wan, state)


def test_many_wrong_names_are_counted(wan: Any) -> None:
    state = {f"blocks.{n}.lora_A.weight": torch.ones(4, 48) for n in range(9)}
    with pytest.raises(CheckpointError) as caught:
        fit(wan, state)
    assert len(re.findall("not a name", str(caught.value))) == 5
    assert "; and 4 more. Is it for another model?" in str(caught.value)


def test_layers_of_rank_zero_add_nothing(wan: Any) -> None:
    empty = {"blocks.0.ffn.0.lora_A.weight": torch.ones(0, 48), "blocks.0.ffn.0.lora_B.weight": torch.ones(96, 0)}
    weights = fit(wan, GOOD | empty | {"blocks.0.ffn.0.alpha": torch.tensor(0.0)})
    assert (list(weights.layers), weights.changes, weights.left_out) == (["proj_out"], {}, {})
    with pytest.raises(CheckpointError, match="is for 48 -> 9 features"):  # of another model all the same
        fit(wan, {"proj_out.lora_A.weight": torch.ones(0, 48), "proj_out.lora_B.weight": torch.ones(9, 0)})
