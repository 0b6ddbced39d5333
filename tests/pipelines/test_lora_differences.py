"""Adapters that change norms, tables and convolutions: the effect of the file, however weights are kept, and none after."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vramkit import PipelineQuantizationConfig, WanPipeline
from vramkit.casting import apply_layerwise_casting
from vramkit.errors import ConfigError, ConflictError
from vramkit.offload import offload_of
from vramkit.pipelines.lora.differences import Differences

CHANGED = {  # original name and part -> the parameter that it is added to
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
    "blocks.2.norm3.diff": "blocks.2.norm2.weight",
    "blocks.2.norm3.diff_b": "blocks.2.norm2.bias",
    "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
    "head.head.diff": "proj_out.weight",
    "blocks.0.ffn.0.diff_b": "blocks.0.ffn.net.0.proj.bias",
}


@pytest.fixture(scope="module")
def weights(wan_folder: Path) -> dict[str, Tensor]:
    return load_file(wan_folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def files(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two step-distill LoRAs, as extractors write them."""
    folder = tmp_path_factory.mktemp("differences")
    for seed, name in enumerate(("quick", "quicker")):
        save_file(distill(weights, seed), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("quick", "quicker")}


def distill(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"diffusion_model.{name}": torch.randn(weights[parameter].shape, generator=generator) * 0.05
        for name, parameter in CHANGED.items()
    }
    state["diffusion_model.patch_embedding.alpha"] = torch.tensor(7.0)  # which differences have nothing to do with
    state["diffusion_model.head.head.alpha"] = torch.tensor(4.0)
    state["diffusion_model.blocks.1.self_attn.q.lora_down.weight"] = torch.randn(4, 48, generator=generator) * 0.3
    state["diffusion_model.blocks.1.self_attn.q.lora_up.weight"] = torch.randn(48, 4, generator=generator) * 0.3
    state["diffusion_model.blocks.1.self_attn.q.alpha"] = torch.tensor(2.0)
    return state


def effect(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What a file adds to each parameter."""
    added = {parameter: scale * state[f"diffusion_model.{name}"] for name, parameter in CHANGED.items()}
    query = "diffusion_model.blocks.1.self_attn.q"
    up, down = state[f"{query}.lora_up.weight"], state[f"{query}.lora_down.weight"]
    return added | {"blocks.1.attn1.to_q.weight": scale * 0.5 * up @ down}


def load(folder: Path, **options: Any) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None, **options)


def flow(pipeline: WanPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = pipeline.transformer.dtype
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator).to(dtype)
    text = torch.randn(1, 7, 32, generator=generator).to(dtype)
    sample: Tensor = pipeline.transformer(latents, torch.tensor([500.0]), text).sample
    return sample


def merged(folder: Path, *effects: dict[str, Tensor]) -> Tensor:
    """The prediction of a model whose weights were changed by hand."""
    pipeline = load(folder)
    for added in effects:
        for name, change in added.items():
            parameter = pipeline.transformer.get_parameter(name)
            parameter.data = parameter.data + change.reshape(parameter.shape)
    return flow(pipeline)


def test_the_effect_is_that_of_the_weights_in_the_files(wan_folder: Path, files: dict[str, Path]) -> None:
    quick, quicker = (load_file(path) for path in files.values())
    pipeline = load(wan_folder)
    plain = flow(pipeline)
    before = dict(pipeline.transformer.named_parameters())
    pipeline.load_lora_weights(files["quick"], adapter_name="quick")
    assert near(flow(pipeline), merged(wan_folder, effect(quick, 1.0)), plain)
    pipeline.load_lora_weights(files["quicker"], adapter_name="quicker")
    assert near(flow(pipeline), merged(wan_folder, effect(quicker, 1.0)), plain)
    pipeline.set_adapters(["quick", "quicker"], [0.5, -0.3])
    both = merged(wan_folder, effect(quick, 0.5), effect(quicker, -0.3))
    assert near(flow(pipeline), both, plain)
    pipeline.disable_lora()
    assert torch.equal(flow(pipeline), plain)
    pipeline.enable_lora()
    assert near(flow(pipeline), both, plain)
    pipeline.delete_adapters("quick")
    assert near(flow(pipeline), merged(wan_folder, effect(quicker, -0.3)), plain)
    pipeline.unload_lora_weights()
    assert torch.equal(flow(pipeline), plain)
    assert all(parameter is before[name] for name, parameter in pipeline.transformer.named_parameters())


def near(ours: Tensor, expected: Tensor, plain: Tensor) -> bool:
    assert (expected - plain).abs().max() > 0.01
    return bool((ours - expected).abs().max() <= 1e-4 * (expected - plain).abs().max() + 1e-6)


def test_what_is_fused_stays(wan_folder: Path, files: dict[str, Path]) -> None:
    pipeline = load(wan_folder)
    plain = flow(pipeline)
    quick = load_file(files["quick"])
    pipeline.load_lora_weights(files["quick"])
    pipeline.fuse_lora(lora_scale=0.5)
    assert near(flow(pipeline), merged(wan_folder, effect(quick, 0.5)), plain)
    pipeline.unfuse_lora()
    assert near(flow(pipeline), merged(wan_folder, effect(quick, 1.0)), plain)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert near(flow(pipeline), merged(wan_folder, effect(quick, 1.0)), plain)
    pipeline.load_lora_weights(files["quick"])
    pipeline.set_adapters("default_0", -1.0)
    assert (flow(pipeline) - plain).abs().max() <= 1e-5
    pipeline.unload_lora_weights()
    assert near(flow(pipeline), merged(wan_folder, effect(quick, 1.0)), plain)


OFFLOADS: dict[str, Callable[[WanPipeline, Path], object]] = {
    "resident": lambda p, _: None,
    "block level": lambda p, _: p.transformer.enable_group_offload("cpu", store="pageable"),
    "leaf level": lambda p, _: p.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="pageable"),
    "disk": lambda p, _: p.transformer.enable_group_offload("cpu", offload_type="leaf_level", store="disk"),
    "spilled": lambda p, folder: p.transformer.enable_group_offload("cpu", offload_to_disk_path=folder),
    "model level": lambda p, _: p.enable_model_cpu_offload("cpu"),
}


@pytest.mark.parametrize(
    ("offload", "order"),
    [
        *((name, "adapters last") for name in OFFLOADS if name != "resident"),
        ("block level", "adapters first"),
        ("spilled", "adapters first"),
    ],
)
def test_streamed_is_resident(
    offload: str, order: str, wan_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    resident, streamed = (load(wan_folder) for _ in range(2))
    plain = flow(resident)
    if order == "adapters last":
        OFFLOADS[offload](streamed, tmp_path)
    for pipeline in (resident, streamed):
        for name, path in files.items():
            pipeline.load_lora_weights(path, adapter_name=name)
    if order == "adapters first":
        OFFLOADS[offload](streamed, tmp_path)
    flows = []
    for weights in ([1.0, 0.0], [0.4, 1.2], [0.0, 1.0]):
        for pipeline in (resident, streamed):
            pipeline.set_adapters(["quick", "quicker"], weights)
        flows.append(flow(streamed))
        assert torch.equal(flows[-1], flow(resident))
    assert not torch.equal(flows[0], flows[2])
    streamed.disable_lora()
    assert torch.equal(flow(streamed), plain)
    streamed.unload_lora_weights()
    assert torch.equal(flow(streamed), plain)
    if offload != "model level":
        assert offload_of(streamed.transformer) is not None


def test_weights_in_memory_are_switched_without_opening_the_module(wan_folder: Path, files: dict[str, Path]) -> None:
    pipeline = load(wan_folder)
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()
    handle = pipeline.transformer.enable_group_offload("cpu", store="pageable")
    for name, path in files.items():
        pipeline.load_lora_weights({key: tensor.clone() for key, tensor in load_file(path).items()}, adapter_name=name)
    engine = handle._engine
    pipeline.set_adapters(["quick"], 0.5)
    flow(pipeline)
    assert handle._engine is engine


@pytest.mark.parametrize("order", ["casting first", "adapters first"])
def test_differences_of_weights_in_fp8(order: str, wan_folder: Path, files: dict[str, Path]) -> None:
    def cast(pipeline: WanPipeline) -> None:
        apply_layerwise_casting(
            pipeline.transformer, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["condition_embedder"]
        )

    wide, narrow, plain = (load(wan_folder) for _ in range(3))
    if order == "casting first":
        cast(narrow)
    for pipeline in (wide, narrow):
        pipeline.load_lora_weights(files["quick"], adapter_name="quick")
        pipeline.load_lora_weights(files["quicker"], adapter_name="quicker")
    if order == "adapters first":
        cast(narrow)
    cast(plain)
    without = flow(plain)
    for weights in ([1.0, 0.0], [0.7, 0.7]):
        for pipeline in (wide, narrow):
            pipeline.set_adapters(["quick", "quicker"], weights)
        expected = flow(wide)
        assert (flow(narrow) - expected).abs().max() < 0.2 * (without - expected).abs().max()
    narrow.unload_lora_weights()
    assert torch.equal(flow(narrow), without)


def test_differences_of_quantized_models(wan_folder: Path, files: dict[str, Path]) -> None:
    config = PipelineQuantizationConfig(
        quant_backend="quanto", quant_kwargs={"weights_dtype": "int8"}, components_to_quantize=["transformer"]
    )
    pipeline = load(wan_folder, quantization_config=config)
    plain = flow(pipeline)
    pipeline.load_lora_weights(files["quick"])
    wide = merged(wan_folder, effect(load_file(files["quick"]), 1.0))
    assert (flow(pipeline) - wide).abs().max() < 0.2 * (plain - wide).abs().max()
    pipeline.unload_lora_weights()
    assert torch.equal(flow(pipeline), plain)


def test_a_quantized_weight_that_would_change_is_named(wan_folder: Path, files: dict[str, Path]) -> None:
    pipeline = load(wan_folder)
    norm = pipeline.transformer.blocks[0].attn1.norm_q
    norm.weight = nn.Parameter(norm.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"blocks.0.attn1.norm_q.weight is quantized"):
        pipeline.load_lora_weights(files["quick"])
    assert pipeline.get_list_adapters() == {}


def test_pairs_of_convolutions_are_added(wan_folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, 16, 1, 2, 2, generator=generator) * 0.2
    up = torch.randn(48, 4, 1, 1, 1, generator=generator) * 0.2
    pipeline = load(wan_folder)
    plain = flow(pipeline)
    product = (up.flatten(1) @ down.flatten(1)).reshape(48, 16, 1, 2, 2)
    for shapes in ((down, up), (down.flatten(1), up.flatten(1)), (down, up.flatten(1))):
        state = {"patch_embedding.lora_A.weight": shapes[0], "patch_embedding.lora_B.weight": shapes[1]}
        pipeline.load_lora_weights(state | {"patch_embedding.alpha": torch.tensor(2.0)}, adapter_name="patches")
        assert near(flow(pipeline), merged(wan_folder, {"patch_embedding.weight": product * 0.5}), plain)
        pipeline.delete_adapters("patches")
    assert torch.equal(flow(pipeline), plain)


def test_changed_weights_are_not_saved(wan_folder: Path, tmp_path: Path) -> None:
    pipeline = load(wan_folder)
    pipeline.load_lora_weights({"blocks.0.attn1.norm_q.diff": torch.ones(48)})
    for each in (pipeline, pipeline.transformer):
        with pytest.raises(ConflictError, match="carries LoRA adapters"):
            each.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.unload_lora_weights()
    pipeline.transformer.save_pretrained(tmp_path / "saved")


def test_a_failure_on_the_way_changes_nothing(
    wan_folder: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(wan_folder)
    plain = flow(pipeline)

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Differences, "add", fail)
        with pytest.raises(MemoryError, match="no room"):
            pipeline.load_lora_weights(files["quick"])
    assert pipeline.get_list_adapters() == {}
    assert not any("lora" in name for name, _ in pipeline.transformer.named_modules())
    assert torch.equal(flow(pipeline), plain)
    pipeline.load_lora_weights(files["quick"])
    assert not torch.equal(flow(pipeline), plain)


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleDict({"first": nn.LayerNorm(3), "second": nn.LayerNorm(3)})
    weight = model["second"].weight = model["first"].weight
    differences = Differences()
    differences.add(model, "style", {"second.weight": torch.ones(3)})
    differences.show(model, ["style"], lambda adapter, name: 0.5)
    assert model["first"].weight is model["second"].weight
    assert model["first"].weight.tolist() == [1.5] * 3
    differences.drop(model, "style")
    assert model["first"].weight is model["second"].weight is weight


def test_no_warning_of_what_fits(wan_folder: Path, files: dict[str, Path]) -> None:
    pipeline = load(wan_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(files["quick"])
