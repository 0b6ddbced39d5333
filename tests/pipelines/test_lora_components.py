"""Adapters of several models from one file, weights by block, swapped in place, switched off; as diffusers has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_oracle, write_hunyuan_checkpoint, write_lora
from safetensors.torch import load_file
from torch import Tensor, nn

from vramkit import HunyuanVideoPipeline, WanPipeline
from vramkit.errors import CheckpointError, ConfigError, ConflictError
from vramkit.offload import offload_of

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def loras(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("loras")
    transformer = load(wan_folder).transformer
    ranks = {"small": 2, "large": 6}
    return {
        name: load_file(write_lora(transformer, folder / name, rank=rank, seed=rank)) for name, rank in ranks.items()
    }


@pytest.fixture
def pipeline(wan_folder: Path) -> WanPipeline:
    return load(wan_folder)


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)


@torch.no_grad()
def flow(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    sample: Tensor = transformer(latents, torch.tensor([500.0]), text).sample
    return sample


BLOCK_WEIGHTS: dict[str, Any] = {
    "by block": {"transformer": {"blocks.0": 0.2, "blocks.1": 1.5}},
    "by kind": {"transformer": {"attn1": 0.0, "attn2": 2.0}},
    "by component": {"transformer": 0.3},
    "each of two": [0.7, {"transformer": {"blocks.0": 0.2}}],
}


@pytest.mark.parametrize("kind", BLOCK_WEIGHTS)
def test_weights_by_block_are_those_of_diffusers(
    kind: str, pipeline: WanPipeline, wan_folder: Path, loras: dict[str, dict[str, Tensor]]
) -> None:
    oracle = load_oracle(wan_folder)
    weights = BLOCK_WEIGHTS[kind]
    names = list(loras)[: len(weights) if isinstance(weights, list) else 1]
    for each in (pipeline, oracle):
        for name in names:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *_, **__: None)  # PEFT's, of a second adapter
                each.load_lora_weights(dict(loras[name]), adapter_name=name)
        each.set_adapters(names, weights)
    one = flow(pipeline.transformer)
    assert (one - flow(oracle.transformer)).abs().max() <= 1e-5
    if kind == "by block":
        pipeline.set_adapters(names, [weights["transformer"]])  # blocks of all components
        assert torch.equal(flow(pipeline.transformer), one)
    pipeline.set_adapters(names)
    assert not torch.allclose(one, flow(pipeline.transformer), atol=1e-3)


def test_a_block_is_not_the_beginning_of_another(pipeline: WanPipeline) -> None:
    blocks = pipeline.transformer.blocks
    pipeline.transformer.blocks = nn.ModuleList([*blocks, *[nn.Identity()] * 8, blocks[1]])  # blocks.11
    state = {
        "blocks.11.attn1.to_q.lora_A.weight": torch.ones(1, 48),
        "blocks.11.attn1.to_q.lora_B.weight": torch.ones(48, 1),
    }
    pipeline.transformer.blocks[1] = nn.Identity()
    pipeline.load_lora_weights(state, adapter_name="late")
    with pytest.raises(ConfigError, match=r"weights for 'blocks.1', and 'late' has no layer"):
        pipeline.set_adapters("late", [{"blocks.1": 0.5}])


def test_wrong_weights(pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]]) -> None:
    pipeline.load_lora_weights(loras["small"], adapter_name="small")
    before = flow(pipeline.transformer)
    with pytest.raises(ConfigError, match="weights for 'unet', and 'small' has no layer with that in its name"):
        pipeline.set_adapters("small", {"unet": 0.5})
    with pytest.raises(ConfigError, match="mix components and parts"):
        pipeline.set_adapters("small", {"transformer": 0.5, "blocks.0": 1.0})
    assert torch.equal(flow(pipeline.transformer), before)


def test_one_file_for_two_transformers(
    pipeline: WanPipeline, wan_folder: Path, loras: dict[str, dict[str, Tensor]]
) -> None:
    pipeline.transformer_2 = load(wan_folder).transformer
    second = {key.replace("transformer.", "transformer_2."): tensor for key, tensor in loras["large"].items()}
    single = load(wan_folder)
    expected = []
    for name, state in loras.items():
        single.load_lora_weights(state, adapter_name=name)
        expected.append(flow(single.transformer))
    plain = flow(load(wan_folder).transformer)
    pipeline.load_lora_weights(loras["small"] | second, adapter_name="both")
    assert pipeline.get_list_adapters() == {"transformer": ["both"], "transformer_2": ["both"]}
    assert [flow(pipeline.transformer), flow(pipeline.transformer_2)] == [
        pytest.approx(each, abs=1e-6) for each in expected
    ]
    pipeline.set_adapters("both", {"transformer": 0.0, "transformer_2": 1.0})
    assert torch.allclose(flow(pipeline.transformer), plain, atol=1e-6)
    assert torch.equal(flow(pipeline.transformer_2), expected[1])
    pipeline.fuse_lora(components=["transformer_2"])
    assert pipeline.fused_loras == ["both"]
    assert pipeline.num_fused_loras == 1
    assert torch.allclose(flow(pipeline.transformer_2), expected[1], atol=1e-5)
    pipeline.unfuse_lora(components=["transformer"])
    assert pipeline.num_fused_loras == 1
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(loras["large"], adapter_name="low", load_into_transformer_2=True)
    assert pipeline.get_list_adapters() == {"transformer_2": ["low"]}
    assert torch.allclose(flow(pipeline.transformer_2), expected[1], atol=1e-5)
    pipeline.load_lora_weights(loras["small"], adapter_name="high")  # of another model: both count
    assert pipeline.get_active_adapters() == ["high", "low"]
    assert torch.allclose(flow(pipeline.transformer), expected[0], atol=1e-5)
    pipeline.set_adapters(["high"])
    assert torch.allclose(flow(pipeline.transformer_2), plain, atol=1e-5)
    pipeline.load_lora_weights(loras["small"], adapter_name="low")  # a name of each model
    pipeline.load_lora_weights(loras["small"], adapter_name="low", hotswap=True, load_into_transformer_2=True)
    pipeline.set_adapters("low")
    assert torch.allclose(flow(pipeline.transformer), expected[0], atol=1e-5)
    assert torch.allclose(flow(pipeline.transformer_2), expected[0], atol=1e-5)
    with pytest.raises(ConfigError, match="unknown component vae"):
        pipeline.fuse_lora(components=["vae"])
    with pytest.raises(ConfigError, match=r"components=0\.5; expected a list"):
        pipeline.fuse_lora(0.5)


def test_text_encoders(tmp_path: Path) -> None:
    folder = write_hunyuan_checkpoint(tmp_path / "hunyuan")
    pipeline = HunyuanVideoPipeline.from_pretrained(folder, vae=None)
    layers = {
        "lora_te1_layers_0_self_attn_q_proj": ("text_encoder", "layers.0.self_attn.q_proj"),
        "text_encoder.model.layers.1.mlp.up_proj": ("text_encoder", "layers.1.mlp.up_proj"),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("text_encoder_2", "encoder.layers.0.mlp.fc1"),
        "transformer.proj_out": ("transformer", "proj_out"),
    }
    state, expected = {}, {}
    for written, (component, name) in layers.items():
        prefix = (
            "text_model." if component == "text_encoder_2" and hasattr(pipeline.text_encoder_2, "text_model") else ""
        )
        layer = getattr(pipeline, component).get_submodule(prefix + name)
        down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        down_name, up_name = ("lora_A", "lora_B") if written.startswith("transformer") else ("lora_down", "lora_up")
        state |= {f"{written}.{down_name}.weight": down, f"{written}.{up_name}.weight": up}
        x = torch.randn(3, layer.in_features)
        expected[component, prefix + name] = x, layer(x) + 0.5 * x @ down.T @ up.T
    pipeline.text_encoder.eval()
    pipeline.text_encoder_2.eval()
    from vramkit.offload import apply_group_offloading

    apply_group_offloading(pipeline.text_encoder, "cpu", offload_type="leaf_level", store="pageable")
    pipeline.load_lora_weights(state, adapter_name="all")
    assert list(pipeline.get_list_adapters()) == ["transformer", "text_encoder", "text_encoder_2"]
    pipeline.set_adapters("all", 0.5)
    for (component, name), (x, wanted) in expected.items():
        assert torch.allclose(getattr(pipeline, component).get_submodule(name)(x), wanted, atol=1e-4)
    pipeline.unload_lora_weights()
    assert not any("lora" in name for name, _ in pipeline.text_encoder.named_modules())
    assert offload_of(pipeline.text_encoder) is not None


def test_switched_off_and_on(pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]]) -> None:
    plain = flow(pipeline.transformer)
    handle = pipeline.transformer.enable_group_offload("cpu", store="pageable")
    pipeline.load_lora_weights(loras["small"], adapter_name="small")
    styled, engine = flow(pipeline.transformer), handle._engine
    pipeline.disable_lora()
    assert torch.equal(flow(pipeline.transformer), plain)
    pipeline.enable_lora()
    assert torch.equal(flow(pipeline.transformer), styled)
    assert handle._engine is engine
    assert pipeline.get_active_adapters() == ["small"]
    pipeline.disable_lora()
    pipeline.fuse_lora()
    assert torch.allclose(flow(pipeline.transformer), styled, atol=1e-5)
    with pytest.raises(ConflictError, match="unfuse_lora"):
        pipeline.enable_lora()
    pipeline.unfuse_lora()
    assert torch.allclose(flow(pipeline.transformer), plain, atol=1e-5)
    pipeline.load_lora_weights(loras["large"], adapter_name="large")  # loading switches on
    assert not torch.allclose(flow(pipeline.transformer), plain, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())


def test_numbers_that_are_not_finite_are_not_fused_safely(pipeline: WanPipeline) -> None:
    state = {"proj_out.lora_A.weight": torch.ones(1, 48), "proj_out.lora_B.weight": torch.full((64, 1), torch.inf)}
    pipeline.load_lora_weights(state)
    with pytest.raises(ConfigError, match="at proj_out that are not finite"):
        pipeline.fuse_lora(safe_fusing=True)
    assert pipeline.fused_loras == []


class TestHotswap:
    """An adapter in the place of another."""

    @pytest.mark.parametrize("offload", ["resident", "pageable", "spilled", "model level"])
    @pytest.mark.parametrize("prepared", [True, False])
    def test_swapped_is_loaded(
        self,
        offload: str,
        prepared: bool,
        pipeline: WanPipeline,
        wan_folder: Path,
        loras: dict[str, dict[str, Tensor]],
        tmp_path: Path,
    ) -> None:
        expected = {}
        given = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in loras.items()}
        for name, state in loras.items():
            fresh = load(wan_folder)
            fresh.load_lora_weights(state)
            expected[name] = flow(fresh.transformer)
        if offload == "pageable":
            pipeline.transformer.enable_group_offload("cpu", store="pageable")
        elif offload == "spilled":
            pipeline.transformer.enable_group_offload("cpu", offload_to_disk_path=tmp_path)
        elif offload == "model level":
            pipeline.enable_model_cpu_offload("cpu")
        if prepared:
            pipeline.enable_lora_hotswap(target_rank=8)
        pipeline.load_lora_weights(loras["small"], adapter_name="style")
        for name in ("large", "small", "large"):
            pipeline.load_lora_weights(loras[name], adapter_name="style", hotswap=True)
            assert torch.allclose(flow(pipeline.transformer), expected[name], atol=1e-5)
        assert pipeline.get_list_adapters() == {"transformer": ["style"]}
        assert pipeline.get_active_adapters() == ["style"]
        assert all(torch.equal(tensor, given[name][key]) for name in loras for key, tensor in loras[name].items())

    def test_the_same_tensors_and_no_compiling(
        self, pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]], compiling: None
    ) -> None:
        handle = pipeline.transformer.enable_group_offload("cpu", store="pageable")
        pipeline.enable_lora_hotswap(target_rank=8)
        norms = {"blocks.0.attn1.norm_q.diff": torch.full((48,), 0.5)}
        alphas = {f"blocks.{n}.attn1.to_q.alpha": torch.tensor(3.0) for n in range(3)}
        pipeline.load_lora_weights(loras["large"] | norms, adapter_name="style")
        frames = []

        def backend(module: Any, _: Any) -> Any:
            frames.append(module)
            return module

        for block in pipeline.transformer.blocks:
            block.compile(backend=backend, fullgraph=True)
        first = flow(pipeline.transformer)
        compiled, engine = len(frames), handle._engine
        weight = pipeline.transformer.blocks[0].attn1.to_q.lora_A["style"].weight
        pipeline.load_lora_weights(loras["small"] | norms | alphas, adapter_name="style", hotswap=True)
        second = flow(pipeline.transformer)
        assert len(frames) == compiled > 0
        assert not torch.allclose(first, second, atol=1e-3)
        assert pipeline.transformer.blocks[0].attn1.to_q.lora_A["style"].weight is weight
        assert handle._engine is engine
        more = {
            "blocks.0.ffn.net.2.lora_A.weight": torch.ones(2, 96),
            "blocks.0.ffn.net.2.lora_B.weight": torch.ones(48, 2),
        }
        with pytest.raises(ConfigError, match=r"no layer blocks.0.ffn.net.2, .* enable_lora_hotswap"):
            pipeline.load_lora_weights(more, adapter_name="style", hotswap=True)
        assert torch.equal(flow(pipeline.transformer), second)

    def test_errors(self, pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]]) -> None:
        with pytest.raises(
            ConfigError, match="no adapter 'style' in transformer to put another one in the place of; loaded: none"
        ):
            pipeline.load_lora_weights(loras["small"], adapter_name="style", hotswap=True)
        with pytest.raises(ConfigError, match="target_rank=0"):
            pipeline.enable_lora_hotswap(target_rank=0)
        pipeline.enable_lora_hotswap(target_rank=4)
        with pytest.raises(ConfigError, match=r"rank 6, above target_rank=4: enable_lora_hotswap\(target_rank=6\)"):
            pipeline.load_lora_weights(loras["large"])
        assert pipeline.get_list_adapters() == {}


@pytest.mark.parametrize("weight", [float("nan"), [float("inf")], {"blocks.0": None}, {"transformer": torch.ones(2)}])
def test_weights_that_are_no_numbers(weight: Any, pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]]) -> None:
    pipeline.load_lora_weights(dict(loras["small"]), "a")
    with pytest.raises(ConfigError, match=r"the adapter weight is .*; expected a finite number"):
        pipeline.set_adapters("a", weight)
    pipeline.set_adapters("a", torch.tensor(0.5))


def test_a_file_that_says_whom_it_is_for_is_as_strong_where_the_call_says_so_too(
    wan_folder: Path, pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    pipeline.transformer_2 = load(wan_folder).transformer
    layers = {key.removeprefix("transformer."): tensor for key, tensor in loras["small"].items()}
    entries = {"r": 2, "lora_alpha": 8}
    for component in ("transformer", "transformer_2"):
        named = {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": entries}
        pipeline.save_lora_weights(tmp_path / component, **named)
    pipeline.load_lora_weights(tmp_path / "transformer")
    expected = flow(pipeline.transformer)
    for folder, second in (("transformer_2", False), ("transformer_2", True), ("transformer", True)):
        pipeline.load_lora_weights(tmp_path / folder, "low", load_into_transformer_2=second)
        assert torch.equal(flow(pipeline.transformer_2), expected)
        pipeline.delete_adapters("low")


def test_a_file_of_two_models_cannot_be_for_the_second_alone(
    wan_folder: Path, pipeline: WanPipeline, loras: dict[str, dict[str, Tensor]]
) -> None:
    pipeline.transformer_2 = load(wan_folder).transformer
    second = {key.replace("transformer.", "transformer_2.", 1): tensor for key, tensor in loras["small"].items()}
    with pytest.raises(CheckpointError, match="leave out load_into_transformer_2, and each gets its own"):
        pipeline.load_lora_weights(loras["small"] | second, load_into_transformer_2=True)
    assert pipeline.get_list_adapters() == {}
