"""Models to and from folders in the diffusers layout."""

import json
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from vramkit.errors import CheckpointError, ConfigError
from vramkit.memory import module_bytes
from vramkit.pipelines.calling.pipeline import Pipeline
from vramkit.pipelines.loading.auto_model import AutoModel
from vramkit.pipelines.loading.registry import MODELS
from vramkit.pipelines.wan.pipeline import WanPipeline
from vramkit.pipelines.wan.transformer import WanTransformer3DModel
from vramkit.quant import Fp8Config

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return WanTransformer3DModel.from_config(TINY).eval()


def assert_same_weights(got, expected):
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


@pytest.mark.parametrize("shard_size", ["10GB", 20_000])
def test_round_trip(model, tmp_path, shard_size):
    model.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    files = sorted(p.name for p in (tmp_path / "transformer").iterdir())
    assert ("diffusion_pytorch_model.safetensors" in files) == (shard_size == "10GB")
    assert ("diffusion_pytorch_model.safetensors.index.json" in files) == (shard_size != "10GB")

    loaded = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert type(AutoModel.from_pretrained(tmp_path, subfolder="transformer")) is WanTransformer3DModel
    # diffusers reads what we write.
    assert_same_weights(diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer"), model)


def test_reads_what_diffusers_writes_with_a_variant(tmp_path):
    torch.manual_seed(0)
    reference = diffusers.WanTransformer3DModel(**TINY)
    reference.save_pretrained(tmp_path, variant="fp16")
    assert_same_weights(WanTransformer3DModel.from_pretrained(tmp_path, variant="fp16"), reference)
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.safetensors.*it holds config\.json"):
        WanTransformer3DModel.from_pretrained(tmp_path)


def test_reads_the_shards_of_a_variant(tmp_path):
    torch.manual_seed(0)
    reference = diffusers.WanTransformer3DModel(**TINY)
    reference.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    assert not (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert_same_weights(WanTransformer3DModel.from_pretrained(tmp_path, variant="fp16"), reference)


def test_a_lower_dtype_leaves_some_parameters_fp32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    reference = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert_same_weights(loaded, reference)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in reference.named_parameters()}
    assert loaded.dtype == torch.bfloat16
    assert loaded.scale_shift_table.dtype == torch.float32
    assert loaded.device == torch.device("cpu")


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("quantizing", [{}, {"quantization_config": Fp8Config()}], ids=["as it is", "quantizing"])
def test_a_file_of_mixed_dtypes_is_as_if_asked_for_that_of_most(model, tmp_path, narrow, quantizing):
    """As some tools write them: biases and norms of another dtype than the matrices that they stand beside."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    other = torch.bfloat16 if narrow == torch.float8_e4m3fn else torch.float32
    weights = {
        name: tensor.to(narrow if "ffn" in name and tensor.ndim == 2 else other if tensor.ndim == 1 else torch.bfloat16)
        for name, tensor in load_file(file).items()
    }
    weights |= {name: tensor.float() for name, tensor in weights.items() if name.startswith("proj_out")}
    save_file(weights, file)
    with pytest.warns(UserWarning, match=r"hold torch.bfloat16 and torch.float32, .* made torch.bfloat16, the dtype"):
        loaded = WanTransformer3DModel.from_pretrained(tmp_path, **quantizing)
    asked = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **quantizing)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in asked.named_parameters()}
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
    }
    inputs = {name: each.bfloat16() for name, each in inputs.items()}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], asked(**inputs)[0])


@pytest.mark.parametrize("loader", [AutoModel, WanTransformer3DModel])
def test_downloads_go_where_they_are_wanted(loader, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "snapshot" / "transformer")
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options["revision"], options["cache_dir"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = loader.from_pretrained(
        "owner/name", subfolder="transformer", revision="main", cache_dir=tmp_path / "cache"
    )
    assert_same_weights(loaded, model)
    assert set(calls) == {("owner/name", "main", str(tmp_path / "cache"))}


def test_models_of_the_registry_exist():
    for name in MODELS:
        assert AutoModel.class_named(name).__name__ == name


def test_missing_and_damaged_files_are_named(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json; it holds nothing"):
        WanTransformer3DModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{,")
    with pytest.raises(CheckpointError, match="not JSON"):
        WanTransformer3DModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        WanTransformer3DModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\['diffusion_pytorch_model\.bin'\] are pickles"):
        WanTransformer3DModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"ffn_dim": 50}))
    with pytest.raises(CheckpointError, match="ffn"):
        WanTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"ffn_dim": "many"}, ConfigError, "WanTransformer3DModel: option ffn_dim='many', expected int"),
        ({"num_attention_heads": None}, ConfigError, "num_attention_heads=None"),
        ({"patch_size": 3}, ConfigError, "patch_size=3"),
        ({"ffn_dim": -3}, CheckpointError, r"config\.json does not describe a WanTransformer3DModel: ."),
    ],
)
def test_a_config_of_no_model_is_named(changes, kind, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(kind, match=message):
        WanTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (TINY, CheckpointError, "no _class_name"),
        (TINY | {"_class_name": "UNet2DModel"}, ConfigError, r"'UNet2DModel' is not supported, expected one of"),
    ],
)
def test_unknown_classes(tmp_path, config, kind, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_the_base_pipeline_is_of_the_class_that_the_checkpoint_names(wan_folder, tmp_path):
    pipeline = Pipeline.from_pretrained(wan_folder, torch_dtype=torch.bfloat16, text_encoder=None)
    assert type(pipeline) is WanPipeline
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.text_encoder is None
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MochiPipeline"}))
    with pytest.raises(CheckpointError, match="'MochiPipeline', which is not supported; expected one of WanPipeline"):
        Pipeline.from_pretrained(tmp_path)


def test_memory_footprint_is_what_is_stored(wan_folder: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    wide = model.get_memory_footprint()
    assert wide == module_bytes(model)
    assert model.get_memory_footprint(return_buffers=False) == sum(p.nbytes for p in model.parameters())
    casting = model.enable_layerwise_casting()
    assert (
        model.get_memory_footprint()
        == module_bytes(model)
        == wide - (casting.coverage.covered_bytes - casting.coverage.stored_bytes)
    )
