"""Adapters of a pipeline: the clips of diffusers from the same files, and the same bytes however weights are kept."""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    load_oracle,
    write_cogvideox_checkpoint,
    write_hunyuan_checkpoint,
    write_lora,
    write_ltx_checkpoint,
)
from safetensors.torch import load_file

from vramkit import CogVideoXPipeline, HunyuanVideoPipeline, LTXPipeline, PipelineQuantizationConfig, WanPipeline
from vramkit.errors import CheckpointError, ConfigError, ConflictError
from vramkit.offload import offload_of
from vramkit.quant import quantize
from vramkit.tensors import kind_of

FILE = "pytorch_lora_weights.safetensors"
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 5, "output_type": "pt"}


@pytest.fixture(scope="module")
def loras(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the Wan checkpoint, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("loras")
    transformer = WanPipeline.from_pretrained(wan_folder).transformer
    write_lora(transformer, folder / "cat", rank=4, seed=5)
    write_lora(transformer, folder / "dog", rank=2, seed=6)
    return {"cat": folder / "cat", "dog": folder / "dog"}


@pytest.fixture
def pipeline(wan_folder: Path) -> WanPipeline:
    return load(wan_folder)


def load(folder: Path, pipeline_class: Any = WanPipeline, **options: Any) -> Any:
    pipeline = pipeline_class.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_transformer(folder: Path, **options: Any) -> WanPipeline:
    pipeline: WanPipeline = load(folder, text_encoder=None, tokenizer=None, vae=None, **options)
    return pipeline


def clip(pipeline: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline("a cat on a log", **SMALL | options, generator=generator).frames)


def flow(pipeline: WanPipeline) -> torch.Tensor:
    """One prediction of the transformer."""
    generator = torch.Generator().manual_seed(1)
    dtype = pipeline.transformer.dtype
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator).to(dtype)
    text = torch.randn(1, 7, 32, generator=generator).to(dtype)
    sample: torch.Tensor = pipeline.transformer(latents, torch.tensor([500.0]), text).sample
    return sample


def load_both(pipeline: Any, loras: dict[str, Path]) -> None:
    for name, folder in loras.items():
        pipeline.load_lora_weights(folder, adapter_name=name)


@contextlib.contextmanager
def warnings_of_diffusers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|Adapter .* was active")
        yield


def test_each_step_is_the_clip_of_diffusers(pipeline: WanPipeline, wan_folder: Path, loras: dict[str, Path]) -> None:
    oracle = load_oracle(wan_folder)
    steps: dict[str, Callable[[Any], object]] = {
        "load": lambda p: p.load_lora_weights(str(loras["cat"]), adapter_name="cat"),
        "load another": lambda p: p.load_lora_weights(str(loras["dog"]), adapter_name="dog"),
        "weigh both": lambda p: p.set_adapters(["cat", "dog"], [0.3, 1.4]),
        "one weight": lambda p: p.set_adapters(["cat", "dog"], 0.5),
        "switch": lambda p: p.set_adapters("cat"),
        "fuse": lambda p: p.fuse_lora(lora_scale=0.7),
        "unload what is fused": lambda p: p.unload_lora_weights(),
    }
    clips = {"nothing": clip(pipeline)}
    for name, step in steps.items():
        step(pipeline)
        with warnings_of_diffusers():
            step(oracle)
        assert pipeline.get_active_adapters() == oracle.get_active_adapters()
        assert pipeline.get_list_adapters() == oracle.get_list_adapters()
        clips[name] = clip(pipeline)
        assert (clips[name] - clip(oracle)).abs().max() <= 1e-4, name
        assert (clips[name] - clips["nothing"]).abs().max() > 0.01, name


FAMILIES: list[tuple[Any, Callable[[Path], Path], dict[str, Any]]] = [
    (HunyuanVideoPipeline, write_hunyuan_checkpoint, {"max_sequence_length": 16}),
    (CogVideoXPipeline, write_cogvideox_checkpoint, {"num_frames": 9, "max_sequence_length": 16}),
    (LTXPipeline, write_ltx_checkpoint, {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16}),
]


@pytest.mark.parametrize(("pipeline_class", "write", "options"), FAMILIES, ids=lambda x: getattr(x, "__name__", ""))
def test_families_load_switch_and_unload_while_streamed(
    pipeline_class: Any, write: Callable[[Path], Path], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "checkpoint")
    theirs, ours, streamed = load_oracle(folder), load(folder, pipeline_class), load(folder, pipeline_class)
    plain = clip(ours, **options)
    path = write_lora(ours.transformer, tmp_path / "lora")
    streamed.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable")
    for each in (theirs, ours, streamed):
        each.load_lora_weights(str(path), adapter_name="style")
        each.set_adapters("style", 0.8)
    styled = clip(ours, **options)
    assert (styled - clip(theirs, **options)).abs().max() <= 1e-4
    assert (styled - plain).abs().max() > 0.01
    assert torch.equal(clip(streamed, **options), styled)
    streamed.unload_lora_weights()
    assert torch.equal(clip(streamed, **options), plain)


OFFLOADS: dict[str, Callable[[WanPipeline, Path], object]] = {
    "resident": lambda p, _: None,
    "block level": lambda p, _: p.transformer.enable_group_offload("cpu", store="pageable"),
    "leaf level": lambda p, _: p.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable"),
    "cut leaves": lambda p, _: p.transformer.enable_group_offload(
        "cpu", offload_type="leaf_level", store="pageable", unit_bytes=1024
    ),
    "spilled": lambda p, folder: p.transformer.enable_group_offload("cpu", offload_to_disk_path=folder),
    "model level": lambda p, _: p.enable_model_cpu_offload("cpu"),
}


@pytest.mark.parametrize(
    ("offload", "casting", "order"),
    [
        *((name, casting, "adapters last") for name in OFFLOADS if name != "resident" for casting in ("plain", "fp8")),
        ("leaf level", "fp8", "adapters first"),
        ("model level", "plain", "adapters first"),
    ],
)
def test_streamed_is_resident(
    offload: str, casting: str, order: str, wan_folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    def prepared(name: str) -> WanPipeline:
        pipeline = load_transformer(wan_folder, torch_dtype=torch.bfloat16)
        if order == "adapters first":
            load_both(pipeline, loras)
        if casting == "fp8":
            pipeline.transformer.enable_layerwise_casting()
        OFFLOADS[name](pipeline, tmp_path)
        if order == "adapters last":
            load_both(pipeline, loras)
        return pipeline

    resident, streamed = prepared("resident"), prepared(offload)
    weight = streamed.transformer.blocks[0].attn1.to_q.lora_A["cat"].weight
    assert kind_of(weight) is torch.nn.Parameter  # not one that is stored in fp8
    assert weight.dtype == torch.bfloat16
    flows = []
    for weights in ([1.0, 0.0], [0.4, 1.2], [0.0, 1.0]):
        for pipeline in (resident, streamed):
            pipeline.set_adapters(["cat", "dog"], weights)
        flows.append(flow(streamed))
        assert torch.equal(flows[-1], flow(resident))
        assert torch.equal(flows[-1], flow(streamed))
    assert not torch.equal(flows[0], flows[2])
    for pipeline in (resident, streamed):
        pipeline.unload_lora_weights()
    assert torch.equal(flow(streamed), flow(resident))
    assert not torch.equal(flow(streamed), flows[0])


def test_adapters_rest_in_their_file_or_in_memory_beside_weights_on_disk(
    wan_folder: Path, loras: dict[str, Path]
) -> None:
    resident, streamed = load_transformer(wan_folder), load_transformer(wan_folder)
    streamed.transformer.enable_group_offload("cpu", store="disk")
    for pipeline in (resident, streamed):
        pipeline.load_lora_weights(loras["cat"])
        from_memory = {key: tensor.clone() for key, tensor in load_file(loras["dog"] / FILE).items()}
        pipeline.load_lora_weights(from_memory)
        pipeline.set_adapters(pipeline.get_list_adapters()["transformer"])
    assert torch.equal(flow(streamed), flow(resident))


QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True}},
    "int8": {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}},
    "quanto int8": {"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}},
}


@pytest.mark.parametrize(
    ("kind", "order"), [*((kind, "adapters last") for kind in QUANTIZED), ("nf4", "adapters first")]
)
def test_quantized_weights_carry_adapters(kind: str, order: str, wan_folder: Path, loras: dict[str, Path]) -> None:
    config = PipelineQuantizationConfig(**QUANTIZED[kind], components_to_quantize=["transformer"])
    flows = []
    for is_streamed in (False, True):
        pipeline = load_transformer(wan_folder, torch_dtype=torch.bfloat16, quantization_config=config)
        plain = flow(pipeline)
        if order == "adapters first":
            pipeline.load_lora_weights(loras["cat"])
        if is_streamed:
            pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable")
        if order == "adapters last":
            pipeline.load_lora_weights(loras["cat"])
        flows.append(flow(pipeline))
        layer = pipeline.transformer.blocks[0].attn1.to_q
        assert layer.lora_A["default_0"].weight.dtype == torch.bfloat16
        with pytest.raises(ConfigError, match=r"quantized weight .* leave the adapters unfused"):
            pipeline.fuse_lora()
        assert torch.equal(flow(pipeline), flows[-1])
        pipeline.unload_lora_weights()
        assert torch.equal(flow(pipeline), plain)
    assert torch.equal(*flows)
    assert not torch.equal(flows[0], plain)


def test_quantizing_and_casting_leave_adapters_alone(wan_folder: Path, loras: dict[str, Path]) -> None:
    pipeline = load_transformer(wan_folder, torch_dtype=torch.bfloat16)
    pipeline.load_lora_weights(loras["cat"], adapter_name="cat")
    before = {name: weight.clone() for name, weight in pipeline.transformer.named_parameters() if "lora" in name}
    quantize(pipeline.transformer, {"backend": "quanto", "weights_dtype": "int8"})
    after = {name: weight for name, weight in pipeline.transformer.named_parameters() if "lora" in name}
    assert type(pipeline.transformer.blocks[0].attn1.to_q.weight).__name__ == "QuantoTensor"
    assert all(
        type(weight) is torch.nn.Parameter and torch.equal(weight, before[name]) for name, weight in after.items()
    )
    assert len(after) == len(before) > 0


@pytest.mark.parametrize("offload", ["resident", "leaf level", "spilled", "model level"])
def test_fused_is_unfused(offload: str, wan_folder: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    pipeline = load_transformer(wan_folder)
    plain = flow(pipeline)
    OFFLOADS[offload](pipeline, tmp_path)
    load_both(pipeline, loras)
    pipeline.set_adapters(["cat", "dog"], [0.4, 1.2])
    beside = flow(pipeline)
    pipeline.fuse_lora()
    assert (flow(pipeline) - beside).abs().max() <= 1e-5
    with pytest.raises(ConflictError, match=r"cat, dog is fused .* unfuse_lora"):
        pipeline.set_adapters("cat")
    with pytest.raises(ConflictError, match="unfuse_lora"):
        pipeline.load_lora_weights(loras["cat"], adapter_name="third")
    pipeline.unfuse_lora()
    assert torch.allclose(flow(pipeline), beside, atol=1e-5)
    pipeline.fuse_lora(lora_scale=0.5, adapter_names=["dog"])
    pipeline.unload_lora_weights()
    fused = flow(pipeline)
    pipeline.load_lora_weights(loras["dog"], adapter_name="dog")
    pipeline.set_adapters("dog", -0.6)  # 1.2 * 0.5 was fused
    assert (flow(pipeline) - plain).abs().max() <= 1e-5
    assert (fused - plain).abs().max() > 0.01


def test_fused_into_fp8_is_near(wan_folder: Path, loras: dict[str, Path]) -> None:
    pipeline = load_transformer(wan_folder, torch_dtype=torch.bfloat16)
    pipeline.transformer.enable_layerwise_casting()
    pipeline.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable")
    plain = flow(pipeline)
    pipeline.load_lora_weights(loras["cat"])
    beside = flow(pipeline)
    pipeline.fuse_lora()
    assert (flow(pipeline) - beside).norm() < 0.2 * (beside - plain).norm()


def test_switching_moves_nothing_and_keeps_memory(wan_folder: Path, loras: dict[str, Path]) -> None:
    pipeline = load_transformer(wan_folder)
    handle = pipeline.transformer.enable_group_offload("cpu", store="pageable")
    load_both(pipeline, loras)
    engine, held = handle._engine, []
    flows: dict[str, torch.Tensor] = {}
    for turn in range(22):
        name = ("cat", "dog")[turn % 2]
        pipeline.set_adapters(name, 0.5)
        assert torch.equal(flow(pipeline), flows.setdefault(name, flow(pipeline)))
        assert pipeline.get_active_adapters() == [name]
        if turn in (1, 21):
            held.append(live_bytes())
    assert not torch.equal(flows["cat"], flows["dog"])
    assert handle._engine is engine
    assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())
    assert held[1] == held[0]  # twenty switches later


@pytest.mark.parametrize(
    "turn", ["deleted", "deleted while disabled", "one of two that count", "one that does not count"]
)
def test_what_counts_after_another_adapter_is_deleted(wan_folder: Path, loras: dict[str, Path], turn: str) -> None:
    """The clips of diffusers, where the oldest adapter counts once none that counted is left, at its own weight."""
    turns: dict[str, Callable[[Any], object]] = {
        "deleted": lambda p: None,
        "deleted while disabled": lambda p: p.disable_lora(),
        "one of two that count": lambda p: p.set_adapters(["cat", "dog"], [0.3, 0.9]),
        "one that does not count": lambda p: p.set_adapters("cat", 0.7),
    }
    clips = []
    for pipeline in (load(wan_folder), load_oracle(wan_folder)):
        with warnings_of_diffusers():
            pipeline.load_lora_weights(loras["cat"], adapter_name="cat")
            pipeline.set_adapters("cat", 0.5)
            pipeline.load_lora_weights(loras["dog"], adapter_name="dog")
            turns[turn](pipeline)
            pipeline.delete_adapters("dog")
        clips.append(clip(pipeline, num_inference_steps=1))
    assert (clips[0] - clips[1]).abs().max() <= 1e-4


def test_loading_and_unloading_keeps_memory_and_disk(wan_folder: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    pipeline = load_transformer(wan_folder)
    pipeline.transformer.enable_group_offload("cpu", offload_to_disk_path=tmp_path)
    state = load_file(loras["cat"] / FILE)
    plain = flow(pipeline)
    sizes = []
    for _ in range(4):
        pipeline.load_lora_weights(state, adapter_name="cat")
        assert not torch.equal(flow(pipeline), plain)
        pipeline.delete_adapters("cat")
        assert torch.equal(flow(pipeline), plain)
        sizes.append((live_bytes(), sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))))
    assert sizes[-1] == sizes[1]


def live_bytes() -> int:
    """What all tensors of the process hold; views come and go while weights are on their way."""
    gc.collect()
    found = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def test_compiled_blocks(wan_folder: Path, loras: dict[str, Path]) -> None:
    resident, streamed = load_transformer(wan_folder), load_transformer(wan_folder)
    streamed.transformer.enable_group_offload("cpu", store="pageable")
    for pipeline in (resident, streamed):
        pipeline.load_lora_weights(loras["cat"])
    expected = flow(resident)
    for pipeline in (resident, streamed):
        for block in pipeline.transformer.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(flow(streamed), flow(resident))
    assert (flow(streamed) - expected).abs().max() <= 1e-5
    torch._dynamo.reset()


def test_a_compiled_transformer_takes_adapters(wan_folder: Path, loras: dict[str, Path]) -> None:
    pipeline = load_transformer(wan_folder)
    pipeline.load_lora_weights(loras["cat"])
    expected = flow(pipeline)
    pipeline.unload_lora_weights()
    dtype = pipeline.transformer.dtype
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.load_lora_weights(loras["cat"])
    assert dtype == torch.float32
    assert torch.allclose(flow(pipeline), expected, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        ({}, ["*.safetensors", "adapter_config.json"]),
        ({"weight_name": FILE}, [FILE, "adapter_config.json"]),
        ({"weight_name": FILE, "subfolder": "cat"}, [f"cat/{FILE}", "cat/adapter_config.json"]),
    ],
)
def test_only_the_file_of_a_repository_is_downloaded(
    options: dict[str, str],
    patterns: list[str],
    pipeline: WanPipeline,
    loras: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def download(repo: str, *, allow_patterns: list[str], **rest: Any) -> str:
        asked.append((repo, allow_patterns, rest["revision"]))
        return str(loras["cat"].parent if "subfolder" in options else loras["cat"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipeline.load_lora_weights("somebody/cats", revision="v1", **options)
    assert asked == [("somebody/cats", patterns, "v1")]
    assert pipeline.get_active_adapters() == ["default_0"]


class TestErrors:
    def test_names_of_adapters(self, pipeline: WanPipeline, loras: dict[str, Path]) -> None:
        pipeline.load_lora_weights(loras["cat"], adapter_name="cat")
        with pytest.raises(ConfigError, match="adapter_name='cat' is taken; loaded: cat"):
            pipeline.load_lora_weights(loras["dog"], adapter_name="cat")
        with pytest.raises(ConfigError, match="no name without dots"):
            pipeline.load_lora_weights(loras["dog"], adapter_name="a.b")
        with pytest.raises(ConfigError, match="no adapter 'bird'; loaded: cat"):
            pipeline.set_adapters(["cat", "bird"])
        with pytest.raises(ConfigError, match="no adapter 'bird'"):
            pipeline.delete_adapters("bird")
        with pytest.raises(ConfigError, match="2 adapter weights for 1 adapters"):
            pipeline.set_adapters(["cat"], [1.0, 2.0])
        for change in (pipeline.set_adapters, lambda names: pipeline.fuse_lora(adapter_names=names)):
            with pytest.raises(ConfigError, match=r"\['cat', 'cat'\]; expected each of them once"):
                change(["cat", "cat"])
        assert pipeline.get_list_adapters() == {"transformer": ["cat"]}
        pipeline.delete_adapters(["cat", "cat"])
        assert pipeline.get_list_adapters() == {}

    def test_nothing_loaded(self, pipeline: WanPipeline) -> None:
        assert pipeline.get_active_adapters() == []
        assert pipeline.get_list_adapters() == {}
        pipeline.unload_lora_weights()
        pipeline.unfuse_lora()
        with pytest.raises(ConfigError, match="no adapter to fuse"):
            pipeline.fuse_lora()

    def test_no_transformer(self, wan_folder: Path, loras: dict[str, Path]) -> None:
        pipeline = WanPipeline.from_pretrained(wan_folder, transformer=None)
        with pytest.raises(ConfigError, match="no transformer"):
            pipeline.load_lora_weights(loras["cat"])

    def test_peft_is_missing(
        self, pipeline: WanPipeline, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigError, match=r'pip install "vramkit\[lora\]"'):
            pipeline.load_lora_weights(loras["cat"])

    def test_saving_with_adapters(self, pipeline: WanPipeline, loras: dict[str, Path], tmp_path: Path) -> None:
        pipeline.load_lora_weights(loras["cat"])
        with pytest.raises(ConflictError, match="carries LoRA adapters"):
            pipeline.transformer.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        pipeline.fuse_lora()
        fused = flow(pipeline)
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path / "saved")
        assert torch.equal(flow(load_transformer(tmp_path / "saved")), fused)

    def test_files(self, pipeline: WanPipeline, loras: dict[str, Path], tmp_path: Path) -> None:
        for name in ("a", "b"):
            shutil.copy(loras["cat"] / FILE, tmp_path / f"{name}.safetensors")
        with pytest.raises(
            ConfigError, match=r"several files; choose one by weight_name: a.safetensors, b.safetensors"
        ):
            pipeline.load_lora_weights(tmp_path)
        with pytest.raises(CheckpointError, match=r"has no c.safetensors; it has a.safetensors, b.safetensors"):
            pipeline.load_lora_weights(tmp_path, weight_name="c.safetensors")
        with pytest.raises(CheckpointError, match=r"only .safetensors files are read"):
            pipeline.load_lora_weights(tmp_path, weight_name="c.bin")
        (tmp_path / "c.bin").write_bytes(b"pickle")
        with pytest.raises(CheckpointError, match=r"only .safetensors files are read"):
            pipeline.load_lora_weights(tmp_path / "c.bin")
        with pytest.raises(ConfigError, match="does not exist"):
            pipeline.load_lora_weights(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"has no .safetensors file"):
            pipeline.load_lora_weights(tmp_path, subfolder="empty")
        with pytest.raises(ConfigError, match="names to tensors"):
            pipeline.load_lora_weights({"a": 1})
        pipeline.load_lora_weights(tmp_path, weight_name="b.safetensors", adapter_name="b")
        pipeline.load_lora_weights(tmp_path.parent, subfolder=tmp_path.name, weight_name="a.safetensors")
        assert pipeline.get_list_adapters() == {"transformer": ["b", "default_1"]}

    def test_a_file_that_does_not_fit_changes_nothing(self, pipeline: WanPipeline, loras: dict[str, Path]) -> None:
        handle = pipeline.transformer.enable_group_offload("cpu", store="pageable")
        names = [name for name, _ in pipeline.transformer.named_modules()]
        state = load_file(loras["cat"] / FILE) | {"transformer.blocks.0.attn1.to_q.lora_middle": torch.ones(4, 48)}
        with pytest.raises(CheckpointError, match=r"the state dict does not fit WanTransformer3DModel: .*lora_middle"):
            pipeline.load_lora_weights(state)
        assert [name for name, _ in pipeline.transformer.named_modules()] == names
        assert handle.is_active
        assert offload_of(pipeline.transformer) is handle
