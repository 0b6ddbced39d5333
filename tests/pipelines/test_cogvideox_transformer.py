"""The CogVideoX transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from denoisers import DENOISERS, ROTARY, build_pair, cogvideox_inputs
from families import relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.cogvideox.transformer import (
    CogVideoXTransformer3DModel,
    CogVideoXTransformerConfig,
)

TINY = DENOISERS["CogVideoX"].tiny
pair, inputs = partial(build_pair, "CogVideoX"), cogvideox_inputs

FRAME_PATCHES = ROTARY | {"patch_size_t": 2, "patch_bias": False, "sample_height": 30, "sample_width": 30}
LEARNED = ROTARY | {"use_learned_positional_embeddings": True}
OFFSET = ROTARY | {"ofs_embed_dim": 24}


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
    (LEARNED, {"batch": 2}),
    (LEARNED, {"frames": 2}),  # which gets sinusoids
    (OFFSET, {"batch": 2, "ofs": 2.0}),
]


@pytest.mark.parametrize(("options", "shape"), CASES, ids=str)
def test_equals_diffusers(options: dict[str, Any], shape: dict[str, Any]) -> None:
    model, reference = pair(**options)
    given = inputs(**shape)
    model.set_chunk_size(10)
    assert relative_error(model(**given).sample, predicted(reference, given)) <= 1e-5


@pytest.mark.parametrize(("options", "backend"), [({}, "aot_eager"), (ROTARY, "eager")])
def test_the_whole_model_compiles_fullgraph(options: dict[str, Any], backend: str) -> None:
    model, _ = pair(**options, num_layers=1)
    model.set_chunk_size(36)
    given = inputs()
    expected = model(**given).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert relative_error(compiled(**given).sample, expected) <= 1e-6
    torch._dynamo.reset()


def test_blocks_compile_without_recompiles() -> None:
    model, _ = pair(**ROTARY)
    given = inputs(batch=2)
    expected = model(**given).sample
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    assert relative_error(model(**given).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative_error(model(**given).sample, expected) <= 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("chunk", [1, 5, 24, 71, 8192])
def test_chunks_of_rotated_tokens_change_rounding_only(chunk: int) -> None:
    model, _ = pair(**ROTARY)
    given = inputs(batch=2)  # 72 tokens
    whole = model(**given).sample
    model.set_chunk_size(chunk)
    assert relative_error(model(**given).sample, whole) <= 1e-6


def test_rotated_bfloat16_is_as_near_to_float32_as_diffusers() -> None:
    model, reference = pair(**ROTARY)
    exact = predicted(reference, inputs(batch=2))
    for module in (model, reference):
        torch.nn.Module.to(module, torch.bfloat16)
    given = inputs(batch=2, dtype=torch.bfloat16)
    got, expected = model(**given).sample, predicted(reference, given)
    assert (got - exact).norm() <= 1.2 * (expected - exact).norm()
    copies = {key: value.clone() for key, value in given.items()}
    model(**inputs(frames=1, dtype=torch.bfloat16))  # other positions in between
    assert torch.equal(model(**given).sample, got)
    assert all(torch.equal(given[key], copies[key]) for key in given)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("casting", [False, True])
def test_patches_of_frames_are_streamed(offload_type: str, casting: bool) -> None:
    model, _ = pair(**FRAME_PATCHES)
    if casting:
        model.enable_layerwise_casting()
    given = inputs(batch=2, frames=2)
    expected = model(**given).sample
    model.enable_group_offload("cpu", offload_type=offload_type)
    assert all(torch.equal(model(**given).sample, expected) for _ in range(2))


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
        ({"ofs_embed_dim": 512}, "ofs_embed_dim=512, expected None or time_embed_dim=24"),
        ({"use_learned_positional_embeddings": True}, "goes with use_rotary"),
        (LEARNED | {"patch_size_t": 2}, "patch_size_t=None; got True and 2"),
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


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (LEARNED, {"hidden_states": torch.zeros(1, 3, 4, 8, 10)}, "4 rows and 5 columns of patches and 7 text tokens"),
        (LEARNED, {"encoder_hidden_states": torch.zeros(1, 6, 20)}, "and 6 text tokens"),
        (OFFSET, {}, "ofs: got None, expected one with ofs_embed_dim=24"),
        ({}, {"ofs": torch.ones(1)}, "expected None with ofs_embed_dim=None"),
    ],
)
def test_what_image_to_video_checkpoints_do_not_take(options: Any, change: dict[str, Any], message: str) -> None:
    model, _ = pair(**options)
    with pytest.raises(ConfigError, match=message):
        model(**inputs() | change)
