"""Loading as scripts for diffusers write it: what is taken, what is refused and with which way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import load, models_of

import vramkit
from vramkit.errors import CheckpointError, ConfigError
from vramkit.pipelines.loading.arguments import device_of, dtype_of, wanted_dtype


@pytest.fixture
def family() -> str:
    return "Wan2.1"


@pytest.mark.parametrize("kind", ["pipeline", "model", "auto"])
@pytest.mark.parametrize("named", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}])
def test_dtypes_by_both_names(kind: str, named: dict[str, Any], folder: Path) -> None:
    passed_over = {"low_cpu_mem_usage": True, "use_safetensors": True, "token": None, "local_files_only": True}
    if kind == "pipeline":
        transformer = load("Wan2.1", folder, text_encoder=None, vae=None, **named, **passed_over).transformer
    else:
        source = vramkit.WanTransformer3DModel if kind == "model" else vramkit.AutoModel
        transformer = source.from_pretrained(folder, subfolder="transformer", **named, **passed_over)
    assert transformer.dtype == torch.bfloat16


def test_names_of_dtypes() -> None:
    assert [dtype_of(name) for name in (None, "auto", "float16", torch.float64)] == [
        None,
        None,
        torch.float16,
        torch.float64,
    ]
    for wrong in ("bf16", "int8", "nn", 3):
        with pytest.raises(ConfigError, match="expected a floating dtype"):
            dtype_of(wrong)
    assert wanted_dtype("auto", None) == wanted_dtype(None, "auto") == wanted_dtype("auto", "auto") == "auto"
    with pytest.raises(ConfigError, match="two names of one argument"):
        wanted_dtype(torch.float16, torch.float32)


def test_dtypes_by_component(folder: Path) -> None:
    pipeline = load("Wan2.1", folder, dtype={"default": "bfloat16", "vae": "float32", "text_encoder": "auto"})
    dtypes = {name: model.dtype for name, model in models_of(pipeline).items()}
    assert dtypes == {"transformer": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float32}


def test_device_maps(folder: Path) -> None:
    for given, device in (("cuda", "cuda"), ({"": "cpu"}, "cpu"), (1, "cuda:1"), (torch.device("cpu"), "cpu")):
        assert device_of(given) == torch.device(device)
    assert device_of(None) is None
    for plan in ("balanced", "auto", {"transformer": 0, "vae": "cpu"}):
        with pytest.raises(ConfigError, match=r"expected one device.*enable_group_offload"):
            load("Wan2.1", folder, device_map=plan)
    without = {"text_encoder": None, "transformer": None}
    assert load("Wan2.1", folder, device_map="meta", **without).vae.device.type == "meta"
    model = vramkit.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", device_map="meta")
    assert model.device.type == "meta"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_safetensors": False}, "pickles"),
        ({"custom_pipeline": "x"}, "code from repositories"),
        ({"trust_remote_code": True}, "code from repositories"),
        ({"max_memory": {0: "4GB"}}, "enable_group_offload"),
        ({"offload_folder": "x"}, "offload_to_disk_path"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str, folder: Path) -> None:
    for source, options in (
        (vramkit.Pipeline, {}),
        (vramkit.AutoModel, {"subfolder": "transformer"}),
        (vramkit.UniPCMultistepScheduler, {"subfolder": "scheduler"}),
    ):
        with pytest.raises(ConfigError, match=message):
            source.from_pretrained(folder, **options, **given)


def test_what_asks_for_nothing_is_passed_over(folder: Path) -> None:
    vramkit.Pipeline.from_pretrained(
        folder, transformer=None, text_encoder=None, vae=None, trust_remote_code=False, max_memory=None
    )


def test_how_downloads_are_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    given = {"token": "t", "local_files_only": True, "force_download": True, "revision": "r"}
    vramkit.Pipeline.from_pretrained("owner/name", transformer=None, text_encoder=None, **given)
    vramkit.AutoModel.from_pretrained("owner/name", subfolder="transformer", **given)
    vramkit.UniPCMultistepScheduler.from_pretrained("owner/name", subfolder="scheduler", **given)
    assert vramkit.WanPipeline.download("owner/name", **given) == folder
    assert len(asked) > 4
    assert all(given.items() <= options.items() for options in asked)


@pytest.fixture
def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("source", [vramkit.WanTransformer3DModel, vramkit.AutoModel, vramkit.WanPipeline])
def test_single_files_take_the_arguments_of_folders(source: Any, folder: Path, weights: Path) -> None:
    is_pipeline = source is vramkit.WanPipeline
    options: dict[str, Any] = {"text_encoder": None, "vae": None} if is_pipeline else {}
    options |= {"config": folder, "low_cpu_mem_usage": True, "token": None, "local_files_only": True}
    for named in ({"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}, {"dtype": torch.bfloat16}):
        made = source.from_single_file(weights, device_map="meta", **named, **options)
        model = made.transformer if is_pipeline else made
        assert (model.dtype, model.device.type) == (torch.bfloat16, "meta")
    for wrong, message in (
        ({"nonsense": 1}, "nonsense"),
        ({"original_config": "x.yaml"}, "config= takes"),
        ({"dtype": "bf16"}, "expected a floating dtype"),
        ({"device_map": "auto"}, "expected one device"),
    ):
        with pytest.raises(ConfigError, match=message):
            source.from_single_file(weights, **options, **wrong)


def test_how_single_files_and_adapters_are_downloaded(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    given = {"token": "t", "local_files_only": True, "force_download": True, "cache_dir": "c"}
    url = f"https://huggingface.co/owner/name/blob/main/{weights.relative_to(folder)}"
    for source in (vramkit.WanTransformer3DModel, vramkit.AutoModel):
        source.from_single_file(url, config="owner/name", **given)
    pipeline = vramkit.WanPipeline.from_single_file(url, config="owner/name", text_encoder=None, vae=None, **given)
    assert len(asked) > 5
    with pytest.raises(CheckpointError):  # no adapter is there
        pipeline.load_lora_weights("owner/name", subfolder="vae", **given)
    assert all(given.items() <= options.items() for options in asked)
    with pytest.raises(ConfigError, match="load_lora_weights has no argument nonsense"):
        pipeline.load_lora_weights(weights, nonsense=1)


def test_from_pipe(pipeline: Any) -> None:
    other = vramkit.WanPipeline.from_pipe(pipeline)
    assert other.components == pipeline.components
    assert other.config == pipeline.config
    assert vramkit.WanPipeline.from_pipe(pipeline, vae=None).vae is None
    for given, message in (
        ({"nonsense": 1}, "unknown component or option nonsense"),
        ({"dtype": "nonsense"}, "expected a floating dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            vramkit.WanPipeline.from_pipe(pipeline, **given)
    with pytest.raises(
        ConfigError, match=r"WanPipeline has no text_encoder_2, tokenizer_2; give text_encoder_2=\.\.\."
    ):
        vramkit.HunyuanVideoPipeline.from_pipe(pipeline)
    with pytest.raises(ConfigError, match=r"WanPipeline.from_pipe: got a str; expected a pipeline"):
        vramkit.WanPipeline.from_pipe("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_from_pipe_casts_what_it_is_asked_to(folder: Path) -> None:
    pipeline = load("Wan2.1", folder, text_encoder=None, vae=None)
    assert vramkit.WanPipeline.from_pipe(pipeline, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_save_pretrained(folder: Path, tmp_path: Path) -> None:
    pipeline = load("Wan2.1", folder, text_encoder=None, transformer=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path / "saved", safe_serialization=True, push_to_hub=False)
    assert (tmp_path / "saved" / "model_index.json").is_file()
    for given, message in (
        ({"safe_serialization": False}, "only safetensors"),
        ({"push_to_hub": True}, "hf upload"),
        ({"variant": "a/b"}, "variant is 'a/b'"),
        ({"nonsense": 1}, "no argument 'nonsense'"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline.save_pretrained(tmp_path / "refused", **given)
    assert not (tmp_path / "refused").exists()


def test_register_modules(pipeline: Any) -> None:
    pipeline.register_modules(vae=None)
    assert pipeline.vae is None
    with pytest.raises(ConfigError, match="unknown component nonsense"):
        pipeline.register_modules(nonsense=1)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        vramkit.UniPCMultistepScheduler.from_pretrained(tmp_path, local_files_only=True)
