"""The CogVideoX transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from live_bytes import peak_bytes
from torch import nn

from vramkit.errors import ConfigError
from vramkit.pipelines.cogvideox.transformer import (
    AdaptiveNorm,
    CogVideoXAttention,
    CogVideoXTransformer3DModel,
    CogVideoXTransformerConfig,
)
from vramkit.pipelines.layers import FeedForward, Modulated

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 20,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 7,
}
ROTARY = {"use_rotary_positional_embeddings": True}
FRAME_PATCHES = ROTARY | {"patch_size_t": 2, "patch_bias": False, "sample_height": 30, "sample_width": 30}
# transformer/config.json of zai-org/CogVideoX-2b; the others differ in what follows.
PUBLISHED: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "_diffusers_version": "0.30.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 30,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
FIVE_B = ROTARY | {"num_attention_heads": 48, "num_layers": 42}
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "2b": ({}, 1_693_783_872),
    "5b": (FIVE_B, 5_570_283_072),
    "1.5-5b": (
        FIVE_B
        | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81},
        5_570_676_352,
    ),
}


def pair(**options: Any) -> tuple[CogVideoXTransformer3DModel, Any]:
    """Our model and diffusers' with the same random weights."""
    torch.manual_seed(0)
    reference = diffusers.CogVideoXTransformer3DModel(**TINY | options).eval().requires_grad_(False)
    for parameter in reference.parameters():  # norms at 1 and 0 would hide mistakes
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = CogVideoXTransformer3DModel.from_config(TINY | options).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    return model, reference


def inputs(
    batch: int = 1, frames: int = 3, height: int = 8, width: int = 12, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, frames, 4, height, width, generator=g).to(dtype),
        "timestep": torch.tensor([999, 314, 3][:batch]),
        "encoder_hidden_states": torch.randn(batch, 7, 20, generator=g).to(dtype),
    }


def predicted(reference: Any, given: dict[str, Any]) -> torch.Tensor:
    """What diffusers' model says, with the rotary table that its pipeline makes."""
    table = None
    if reference.config.use_rotary_positional_embeddings:
        _, frames, _, height, width = given["hidden_states"].shape
        pipeline: Any = SimpleNamespace(transformer=reference, vae_scale_factor_spatial=8)
        make = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
        table = make(pipeline, 8 * height, 8 * width, frames, torch.device("cpu"))
    with torch.no_grad():
        sample: torch.Tensor = reference(**given, image_rotary_emb=table).sample
    return sample


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"batch": 2, "frames": 2, "height": 4, "width": 16}),
    ({"spatial_interpolation_scale": 1.3, "temporal_interpolation_scale": 2.0}, {"frames": 1}),
    ({"norm_elementwise_affine": False, "attention_bias": False, "patch_bias": False}, {}),
    ({"patch_size": 1, "out_channels": 6, "norm_eps": 1e-2}, {"height": 3, "width": 5}),
    (ROTARY, {"batch": 2}),
    (ROTARY, {"frames": 1, "height": 16, "width": 24}),
    (ROTARY, {"frames": 2, "height": 14, "width": 6}),
    (ROTARY, {"frames": 2, "height": 4, "width": 14}),
    (FRAME_PATCHES, {"batch": 2, "frames": 4}),
    (FRAME_PATCHES, {"frames": 2, "height": 14, "width": 6}),
]


@pytest.mark.parametrize(("options", "shape"), CASES, ids=str)
def test_equals_diffusers(options: dict[str, Any], shape: dict[str, Any]) -> None:
    model, reference = pair(**options)
    given = inputs(**shape)
    model.set_chunk_size(10)
    assert error(model(**given).sample, predicted(reference, given)) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 5, 24, 71, 72, 8192])
def test_chunk_size_changes_rounding_only(chunk: int) -> None:
    model, _ = pair(**ROTARY)
    given = inputs(batch=2)  # 3 x 4 x 6 = 72 tokens
    whole = model(**given).sample
    model.set_chunk_size(chunk)
    assert error(model(**given).sample, whole) <= 1e-6


@pytest.mark.parametrize("options", [{}, ROTARY])
def test_bfloat16_is_as_near_to_float32_as_diffusers(options: dict[str, Any]) -> None:
    model, reference = pair(**options)
    exact = predicted(reference, inputs(batch=2))
    for module in (model, reference):
        nn.Module.to(module, torch.bfloat16)
    given = inputs(batch=2, dtype=torch.bfloat16)
    got, expected = model(**given).sample, predicted(reference, given)
    assert got.dtype == model.dtype == torch.bfloat16
    assert error(got, expected) <= 0.03
    assert (got - exact).norm() <= 1.2 * (expected - exact).norm()


@pytest.mark.parametrize("options", [{}, ROTARY])
def test_inputs_are_left_alone_and_calls_repeat(options: dict[str, Any]) -> None:
    model, _ = pair(**options)
    given = inputs()
    copies = {key: value.clone() for key, value in given.items()}
    first, again = model(**given).sample, model(**given, return_dict=False)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(given[key], copies[key]) for key in given)
    model(**inputs(frames=1))  # other positions in between
    assert torch.equal(first, model(**given)[0])


def test_one_timestep_serves_a_batch() -> None:
    model, _ = pair()
    given = inputs(batch=2)
    expected = model(**given | {"timestep": torch.tensor([7, 7])}).sample
    assert torch.equal(model(**given | {"timestep": torch.tensor([7])}).sample, expected)


@pytest.mark.parametrize("size", SIZES)
def test_published_checkpoints_have_these_keys_and_shapes(size: str) -> None:
    options, count = SIZES[size]
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(PUBLISHED | options)
        # Its sinusoidal buffer, which is in no file, would be computed on the CPU.
        reference = diffusers.CogVideoXTransformer3DModel.from_config(PUBLISHED | options)
    got = {name: t.shape for name, t in model.state_dict().items()}
    assert got == {name: t.shape for name, t in reference.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())


def test_config_keys_and_defaults_are_diffusers() -> None:
    oracle = diffusers.CogVideoXTransformer3DModel
    with torch.device("meta"):
        ours = CogVideoXTransformer3DModel.from_config({"num_layers": 0}).config
        theirs = oracle(num_layers=0).config
    assert {key: getattr(ours, key) for key in ours.__slots__} == {
        key: value for key, value in theirs.items() if not key.startswith("_")
    }
    assert CogVideoXTransformer3DModel._keep_in_fp32 == tuple(oracle._keep_in_fp32_modules or ())
    assert list(CogVideoXTransformer3DModel.skip_layerwise_casting) == oracle._skip_layerwise_casting_patterns


def test_each_unit_is_called_once_per_block() -> None:
    model, _ = pair()
    model.set_chunk_size(10)
    units = [module for module in model.modules() if getattr(module, "offload_unit", False)]
    per_block = [AdaptiveNorm, CogVideoXAttention, AdaptiveNorm, FeedForward]
    assert [type(unit) for unit in units] == [*per_block * 2, AdaptiveNorm]
    calls: list[nn.Module] = []
    for unit in units:
        unit.register_forward_hook(lambda module, args, output: calls.append(module))
    model(**inputs(batch=2))
    assert calls == units


def test_units_may_be_given_a_copy_of_the_tokens() -> None:
    """A hook that moves the inputs breaks the aliasing, so the result has to travel through the return value."""

    def copied(stream: Modulated) -> Modulated:
        return stream._replace(tokens=stream.tokens.clone())

    model, _ = pair(**ROTARY)
    given = inputs()
    expected = model(**given).sample
    for block in model.transformer_blocks:
        for unit in (block.attn1, block.ff):
            unit.register_forward_pre_hook(lambda module, args: tuple(copied(each) for each in args))
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("options", [{}, FRAME_PATCHES])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("casting", [False, True])
def test_streamed_weights_give_the_same_bytes(options: dict[str, Any], offload_type: str, casting: bool) -> None:
    model, _ = pair(**options)
    if casting:
        model.enable_layerwise_casting()
    given = inputs(batch=2, frames=2)
    expected = model(**given).sample
    offload = model.enable_group_offload("cpu", offload_type=offload_type)
    assert all(torch.equal(model(**given).sample, expected) for _ in range(2))
    offload.remove()
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize(("options", "backend"), [({}, "aot_eager"), (ROTARY, "eager")])
def test_the_whole_model_compiles_fullgraph(options: dict[str, Any], backend: str) -> None:
    model, _ = pair(**options, num_layers=1)
    model.set_chunk_size(36)
    given = inputs()
    expected = model(**given).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert error(compiled(**given).sample, expected) <= 1e-6
    torch._dynamo.reset()


def test_blocks_compile_without_recompiles() -> None:
    model, _ = pair(**ROTARY)
    given = inputs(batch=2)
    expected = model(**given).sample
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    assert error(model(**given).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(model(**given).sample, expected) <= 1e-6
    torch._dynamo.reset()


def test_channels_last_changes_no_numbers() -> None:
    model, _ = pair()
    given = inputs()
    expected = model(**given).sample
    model.to(memory_format=torch.channels_last)
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("options", [{}, ROTARY])
def test_three_token_tensors_are_alive(options: dict[str, Any]) -> None:
    """Tokens, keys and values, beside temporaries of the size of a chunk."""
    model, _ = pair(**options, attention_head_dim=48)
    tokens, text, chunk, channels = 512, 7, 32, 96
    model.set_chunk_size(chunk)
    given = inputs(frames=2, height=32, width=32)
    model(**given)
    existing = [*model.parameters(), *given.values()] + ([] if model._rotary is None else [model._rotary[1]])
    peak = peak_bytes(lambda: model(**given), existing)
    token_bytes, chunk_bytes = 4 * channels * (tokens + text), 4 * channels * chunk
    small_bytes = 4 * (4 * 6 * channels * 2 + 3 * 32 * channels)  # modulation, tables of positions
    assert 3 * token_bytes <= peak <= 3 * token_bytes + 6 * chunk_bytes + small_bytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ofs_embed_dim": 512}, "ofs_embed_dim=512.*image-to-video"),
        (ROTARY | {"use_learned_positional_embeddings": True}, "image-to-video"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu', expected 'gelu-approximate'"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False"),
        ({"out_channels": None}, "out_channels=None"),
        (ROTARY | {"attention_head_dim": 12}, "attention_head_dim=12, expected a multiple of 16"),
        ({"colour": "red"}, r"unknown options \['colour'\]"),
    ],
)
def test_wrong_configs_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CogVideoXTransformer3DModel.from_config(TINY | config)


def test_a_config_object_makes_a_model() -> None:
    config = CogVideoXTransformerConfig(**TINY)
    assert CogVideoXTransformer3DModel.from_config(config).config is config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 4, 4, 8, 7)}, "divisible"),
        ({"hidden_states": torch.zeros(1, 3, 4, 8, 8)}, "divisible"),
        ({"hidden_states": torch.zeros(1, 4, 3, 8, 8)}, r"expected \[batch, frames, 4, height"),
        ({"hidden_states": torch.zeros(4, 4, 8, 8)}, r"expected \[batch, frames, 4, height"),
        ({"hidden_states": torch.zeros(1, 2, 4, 32, 8)}, "16 rows and 4 columns of patches, at most 15 and 15"),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], message: str) -> None:
    model, _ = pair(**FRAME_PATCHES)
    with pytest.raises(ConfigError, match=message):
        model(**inputs() | change)
