"""Folders of PEFT's save_pretrained have the effect that PEFT has, and files that are written are read by diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vramkit import WanPipeline
from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.lora import config as lora_config

INPUTS = {
    "hidden_states": torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)),
}
TRAINED: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 16},
    "rank-stabilized": {"lora_alpha": 8, "use_rslora": True},
    "patterns": {"lora_alpha": 8, "rank_pattern": {"attn2.to_q": 2}, "alpha_pattern": {"blocks.1.attn1.to_v": 3}},
    "bias of LoRA": {"lora_alpha": 8, "lora_bias": True},
    "all biases": {"lora_alpha": 8, "bias": "all"},
    "a whole layer": {"lora_alpha": 8, "modules_to_save": ["proj_out", "norm_q"]},
}


@pytest.fixture
def pipeline(wan_folder: Path) -> WanPipeline:
    return load(wan_folder)


def load(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)


@torch.no_grad()
def flow(model: Any) -> Tensor:
    sample: Tensor = model(**INPUTS, return_dict=False)[0]
    return sample


def train(wan_folder: Path, folder: Path, **options: Any) -> Tensor:
    """Save what PEFT trained, with weights that training changed, and return what the model gives with it."""
    model = WanTransformer3DModel.from_pretrained(wan_folder / "transformer").eval()
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False, **options)
    trained = get_peft_model(model, config).eval()
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape")  # PEFT takes a bias of LoRA for one
        trained.save_pretrained(folder)
    return flow(trained.base_model.model)


@pytest.mark.parametrize("kind", TRAINED)
def test_folders_of_peft(kind: str, pipeline: WanPipeline, wan_folder: Path, tmp_path: Path) -> None:
    plain = flow(pipeline.transformer)
    expected = train(wan_folder, tmp_path, **TRAINED[kind])
    pipeline.load_lora_weights(tmp_path)
    assert (flow(pipeline.transformer) - expected).abs().max() <= 1e-4 * (expected - plain).abs().max()
    pipeline.unload_lora_weights()
    assert torch.equal(flow(pipeline.transformer), plain)
    pipeline.load_lora_weights(tmp_path / "adapter_model.safetensors")  # the config is found beside it
    assert (flow(pipeline.transformer) - expected).abs().max() <= 1e-4 * (expected - plain).abs().max()


def test_values_are_taken_from_what_weights_are_without_adapters(
    pipeline: WanPipeline, wan_folder: Path, tmp_path: Path
) -> None:
    expected = train(wan_folder, tmp_path, modules_to_save=["norm_q"])
    pipeline.load_lora_weights({"blocks.0.attn1.norm_q.diff": torch.ones(48)})
    pipeline.load_lora_weights(tmp_path)
    assert (flow(pipeline.transformer) - expected).abs().max() <= 1e-5


def test_a_folder_of_peft_in_a_repository(
    pipeline: WanPipeline, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(wan_folder, tmp_path / "style", lora_alpha=16)
    asked = []

    def download(repo: str, *, allow_patterns: list[str], **rest: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipeline.load_lora_weights("somebody/style", subfolder="style")
    assert asked == ["style/*.safetensors", "style/adapter_config.json"]
    assert (flow(pipeline.transformer) - expected).abs().max() <= 1e-5


def test_without_its_config_a_file_of_peft_has_a_warning(
    pipeline: WanPipeline, wan_folder: Path, tmp_path: Path
) -> None:
    train(wan_folder, tmp_path, lora_alpha=16)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=r"no adapter_config.json beside it, .* alpha is taken to be the rank"):
        pipeline.load_lora_weights(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_dora": True}, "holds a DoRA adapter by its config; only plain LoRA"),
        ({"peft_type": "LOKR"}, "holds a LOKR adapter"),
        ({"init_lora_weights": "pissa"}, "was trained from init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "has layer_replication in its config"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices in its config"),
    ],
)
def test_configs_that_say_more(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"my file {message}"):
        lora_config.LoraConfig({"peft_type": "LORA", "init_lora_weights": True} | entries, source="my file")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"lora_alpha": "8"}, "an alpha of '8'"),
        ({"lora_alpha": float("nan")}, "an alpha of nan"),
        ({"lora_alpha": 8, "alpha_pattern": {"x": None}}, "an alpha of None"),
        ({"lora_alpha": 8, "alpha_pattern": [3]}, r"alpha_pattern=\[3\]"),
        ({"lora_alpha": 8, "alpha_pattern": {"(": 3}}, "is no pattern"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+b": 3}}, "expected names, or patterns with 2 repeats"),
        ({"lora_alpha": 8, "alpha_pattern": {".*a.*a.*a": 3}}, "expected names, or patterns with 2 repeats"),
        ({"modules_to_save": 3}, "modules_to_save=3"),
    ],
)
def test_configs_with_values_of_other_kinds(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"my file: its config has .*{message}"):
        lora_config.LoraConfig(entries, source="my file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_numbers_that_are_not_finite(value: float, dtype: torch.dtype, pipeline: WanPipeline, tmp_path: Path) -> None:
    up = torch.zeros(64, 2)
    up[3, 1] = value
    state = {"proj_out.lora_A.weight": torch.ones(2, 48).to(dtype), "proj_out.lora_B.weight": up.to(dtype)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: tensor 'proj_out\.lora_B\.weight' holds infinities or NaN"
    ):
        pipeline.load_lora_weights(tmp_path / "x.safetensors")
    assert pipeline.get_list_adapters() == {}


@pytest.mark.parametrize("name", ["missing.safetensors", "folder/missing.safetensors", "missing.bin"])
def test_a_file_that_does_not_exist(name: str, pipeline: WanPipeline, tmp_path: Path) -> None:
    for source in (name, tmp_path / name):
        with pytest.raises(ConfigError, match=rf"{name} does not exist; give the \.safetensors file of a LoRA"):
            pipeline.load_lora_weights(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "expected a JSON object, got list"),
        (b"", "is empty: download it again"),
        (b"\xff{}", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 700\n", "is a git-lfs pointer"),
    ],
)
def test_damaged_configs(content: bytes, message: str, pipeline: WanPipeline, wan_folder: Path, tmp_path: Path) -> None:
    train(wan_folder, tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json:? {message}"):
        pipeline.load_lora_weights(tmp_path)
    assert pipeline.get_list_adapters() == {}


def test_loaded_adapters_are_saved(pipeline: WanPipeline, wan_folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.randn(4, 48, generator=generator),
        "blocks.0.attn1.to_q.lora_B.weight": torch.randn(48, 4, generator=generator),
        "blocks.0.attn1.to_q.alpha": torch.tensor(2.0),
        "blocks.0.attn1.to_q.diff_b": torch.randn(48, generator=generator),
        "blocks.0.attn1.norm_q.diff": torch.randn(48, generator=generator),
        "blocks.0.norm2.diff_b": torch.randn(48, generator=generator),
        "scale_shift_table.diff": torch.randn(1, 2, 48, generator=generator),
    }
    pipeline.transformer.enable_group_offload("cpu", offload_to_disk_path=tmp_path / "spilled")
    pipeline.load_lora_weights(state, adapter_name="style")
    styled = flow(pipeline.transformer)
    path = pipeline.save_lora_weights(tmp_path / "saved", **pipeline.lora_layers("style"))
    assert path == tmp_path / "saved" / "pytorch_lora_weights.safetensors"
    fresh = load(wan_folder)
    fresh.load_lora_weights(tmp_path / "saved")
    assert torch.allclose(flow(fresh.transformer), styled, atol=1e-6)


def test_trained_layers_are_saved_as_by_diffusers(wan_folder: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline as Published

    layers = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 48),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(48, 4),
    }
    metadata = {"r": 4, "lora_alpha": 8, "target_modules": {"to_q"}}
    for each, folder in ((WanPipeline, "ours"), (Published, "theirs")):
        each.save_lora_weights(
            tmp_path / folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=dict(metadata)
        )
    ours, theirs = (tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("ours", "theirs"))
    assert load_file(ours).keys() == load_file(theirs).keys()
    with safe_open(ours, "pt") as first, safe_open(theirs, "pt") as second:
        assert json.loads(first.metadata()["lora_adapter_metadata"]) == json.loads(
            second.metadata()["lora_adapter_metadata"]
        )
    assert WanPipeline.save_lora_weights(tmp_path / "none", layers, is_main_process=False) is None
    assert not (tmp_path / "none").exists()


def test_saving_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layers to save"):
        WanPipeline.save_lora_weights(tmp_path)
    with pytest.raises(ConfigError, match="unknown argument unet_lora_layers"):
        WanPipeline.save_lora_weights(tmp_path, unet_lora_layers={"a": torch.ones(1)})


def test_what_has_no_place_is_told_once(pipeline: WanPipeline, tmp_path: Path) -> None:
    fitting = {
        "transformer.proj_out.lora_A.weight": torch.ones(4, 48),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 4),
    }
    image = {
        f"transformer.blocks.{n}.attn2.add_k_proj.lora_{part}.weight": torch.ones(4, 7)
        for n in range(3)
        for part in "AB"
    }
    patches = {"transformer.patch_embedding.diff": torch.ones(48, 36, 1, 2, 2)}
    text = {"text_encoder.a.lora_A.weight": torch.ones(4, 7), "text_encoder.a.lora_B.weight": torch.ones(7, 4)}
    zeros = {"transformer.blocks.0.norm1.diff": torch.zeros(48)}
    save_file(fitting | image | patches | text | zeros, tmp_path / "i2v.safetensors")
    with pytest.warns(UserWarning, match="no place") as caught:
        pipeline.load_lora_weights(tmp_path / "i2v.safetensors")
    (warning,) = caught
    assert "9 of 12 tensors, 93.5% of its bytes, have no place in WanTransformer3DModel" in str(warning.message)
    assert "and 4 more" in str(warning.message)
    assert warning.filename == __file__
    with pytest.raises(CheckpointError, match=r"does not fit WanTransformer3DModel: .* Is it for another model"):
        pipeline.load_lora_weights(image | patches)
    assert pipeline.get_list_adapters() == {"transformer": ["default_0"]}
