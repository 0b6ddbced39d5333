"""The Wan transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from functools import partial

import pytest
import torch
from denoisers import DENOISERS, build_pair, other_text, wan_inputs
from families import relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.wan.transformer import (
    WanTransformer3DModel,
    WanTransformerConfig,
)

TINY = DENOISERS["Wan2.1"].tiny
pair, inputs = partial(build_pair, "Wan2.1"), wan_inputs


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {}),
        ({}, {"batch": 2, "frames": 5}),
        ({"cross_attn_norm": False}, {"batch": 2}),
        ({"patch_size": (2, 2, 1), "out_channels": 6}, {"frames": 4, "width": 5}),
        ({"patch_size": (1, 1, 1), "num_layers": 1}, {"frames": 1, "height": 3, "width": 5}),
        ({"attention_head_dim": 16, "num_attention_heads": 3, "in_channels": 8, "eps": 1e-3}, {"channels": 8}),
        ({"attention_head_dim": 32, "num_attention_heads": 1, "freq_dim": 64}, {"text": 1}),
    ],
    ids=str,
)
def test_equals_diffusers(options, shape):
    model, reference = pair(**options)
    given = inputs(**shape)
    with torch.no_grad():
        expected = reference(**given).sample
    model.set_chunk_size(10)
    got = model(**given).sample
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= 1e-5


IMAGE = {"image_dim": 20, "added_kv_proj_dim": 48}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [{}, {"pos_embed_seq_len": 10}], ids=str)
def test_image_tokens_equal_diffusers(options, rows):
    model, reference = pair(**IMAGE | options)
    given = inputs(
        batch=rows, text=512
    )  # that many are the text's in the reference, and what is before them the image's
    image = torch.randn(rows * (2 if options else 1), 5, 20)
    with torch.no_grad():
        expected = reference(**given, encoder_hidden_states_image=image).sample
    model.set_chunk_size(10)
    got = model(**given, encoder_hidden_states_image=image).sample
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(model(**given, encoder_hidden_states_image=-image).sample, expected) > 1e-4
    if options:
        joined = image.reshape(rows, 10, 20)
        assert torch.equal(model(**given, encoder_hidden_states_image=joined).sample, got)
    with pytest.raises(ConfigError, match=r"encoder_hidden_states_image: got None, expected \("):
        model(**given)


def test_blocks_compile_fullgraph_without_recompiles():
    model, _ = pair()
    model.set_chunk_size(24)
    given = inputs(batch=2) | {"others": [other_text("Wan2.1")]}
    expected = model(**given)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(model(**given).sample, expected.sample) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        made = model(**given)
    assert relative_error(made.sample, expected.sample) <= 1e-6
    assert relative_error(made.others[0], expected.others[0]) <= 1e-6
    torch._dynamo.reset()


def test_compiled_elementwise_functions(monkeypatch):
    model, _ = pair(num_layers=1)
    given = inputs(batch=2)
    expected = model(**given).sample
    compiled = []
    compile_function = torch.compile

    def compile_without_codegen(function, **options):
        compiled.append(function.__name__)
        return compile_function(function, backend="aot_eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_without_codegen)
    model.compile_elementwise()
    assert compiled == ["layer_norm", "rms_norm", "rms_rotate", "layer_norm_rotate", "gated_add"]
    assert relative_error(model(**given).sample, expected) <= 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_token_tensors_are_alive(dtype):
    """x, keys and values, beside temporaries of the size of a chunk."""
    tokens, chunk, channels = 512, 32, 96
    model, _ = pair(attention_head_dim=24)
    model.to(dtype).set_chunk_size(chunk)
    given = inputs(frames=2, height=32, width=32, dtype=dtype)
    model(**given)
    peak = peak_bytes(partial(model, **given), [*model.parameters(), *given.values(), model._rotary[1]])
    token_bytes, chunk_bytes = tokens * channels * dtype.itemsize, chunk * channels * dtype.itemsize
    fp32_chunks = 2 if dtype == torch.float32 else 4  # two fp32 tensors, in units of chunk_bytes
    small_bytes = 24 * 1024  # text, modulation
    assert peak >= 3 * token_bytes
    assert peak <= 3 * token_bytes + (fp32_chunks + 2) * chunk_bytes + small_bytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_dim": 1280}, "image_dim=1280, added_kv_proj_dim=None; expected neither, or both, the second 48"),
        ({"image_dim": 1280, "added_kv_proj_dim": 64}, "the second 48"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len=514 is for image tokens"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"patch_size": (2, 2)}, "three numbers"),
        ({"attention_head_dim": 7}, "even"),
        ({"colour": "red"}, r"unknown options \['colour'\]"),
    ],
)
def test_wrong_configs_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        WanTransformer3DModel.from_config(TINY | config)


def test_a_bare_dict_is_not_a_config():
    with pytest.raises(ConfigError, match="from_config"):
        WanTransformer3DModel(dict(TINY))
    assert WanTransformer3DModel.from_config(WanTransformerConfig(**TINY)).config.num_layers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 4, 3, 8, 7)}, "divisible"),
        ({"hidden_states": torch.zeros(4, 3, 8, 8)}, "expected .batch, channels, frames, height, width."),
        ({"hidden_states": torch.zeros(1, 4, 65, 2, 2)}, "at most 64 along an axis"),
        ({"timestep": torch.zeros(1, 71)}, r"expected \(1,\), one for each clip, or \(1, 72\), one for each token"),
        ({"timestep": torch.zeros(1, 2), "timestep_tokens": (24, 24)}, r"for runs of \(24, 24\) tokens"),
        ({"encoder_hidden_states_image": torch.zeros(1, 5, 8)}, "expected None for this checkpoint"),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    model, _ = pair(rope_max_seq_len=64)
    with pytest.raises(ConfigError, match=message):
        model(**inputs() | change)
    with pytest.raises(ConfigError, match="at least 1"):
        model.set_chunk_size(0)
