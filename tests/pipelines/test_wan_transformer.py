"""The Wan transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from functools import partial

import diffusers
import pytest
import torch
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.layers import FeedForward, Modulated
from vramkit.pipelines.wan.transformer import (
    WanCrossAttention,
    WanSelfAttention,
    WanTransformer3DModel,
    WanTransformerConfig,
)

TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
# transformer/config.json of Wan-AI/Wan2.1-T2V-{1.3B,14B}-Diffusers.
PUBLISHED = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
SIZES = {
    "1.3B": {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
    "14B": {"ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40},
}


def pair(seed=0, **options):
    """Our model and diffusers' with the same random weights."""
    torch.manual_seed(seed)
    reference = diffusers.WanTransformer3DModel(**TINY | options).eval().requires_grad_(False)
    for name, parameter in reference.named_parameters():  # norms at 1 and 0 would hide mistakes
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model = WanTransformer3DModel.from_config(TINY | options).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    return model, reference


def inputs(batch=1, frames=3, height=8, width=12, text=9, channels=4, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, channels, frames, height, width, generator=g).to(dtype),
        "timestep": torch.tensor([999.0, 314.5, 3.0][:batch]),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=g).to(dtype),
    }


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


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
    assert error(got, expected) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 24, 36, 71, 72, 8192])
def test_chunk_size_changes_rounding_only(chunk):
    model, _ = pair()
    given = inputs(batch=2)  # 3 x 4 x 6 = 72 tokens
    whole = model(**given).sample
    model.set_chunk_size(chunk)
    assert error(model(**given).sample, whole) <= 1e-6


def test_bfloat16_with_the_parameters_that_stay_fp32():
    model, reference = pair()
    given = inputs(batch=2)
    exact = reference(**given).sample
    keep = diffusers.WanTransformer3DModel._keep_in_fp32_modules
    for module in (model, reference):
        for name, parameter in module.named_parameters():
            if not any(fragment in name for fragment in keep):
                parameter.data = parameter.data.bfloat16()
    given = inputs(batch=2, dtype=torch.bfloat16)
    got, expected = model(**given).sample, reference(**given).sample
    assert got.dtype == model.dtype == torch.bfloat16
    assert error(got, expected) <= 0.02
    # Not further from the exact result than diffusers is.
    assert error(got, exact) <= 1.2 * error(expected, exact)


def test_inputs_are_left_alone_and_calls_repeat():
    model, _ = pair()
    given = inputs()
    copies = {key: value.clone() for key, value in given.items()}
    first, again = model(**given).sample, model(**given, return_dict=False)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(given[key], copies[key]) for key in given)
    # Another size in between makes another rotary table.
    model(**inputs(frames=1))
    assert torch.equal(first, model(**given)[0])


def test_one_timestep_serves_a_batch():
    model, _ = pair()
    given = inputs(batch=2)
    expected = model(**given | {"timestep": torch.tensor([7.0, 7.0])}).sample
    assert torch.equal(model(**given | {"timestep": torch.tensor([7.0])}).sample, expected)


@pytest.mark.parametrize("size", SIZES)
def test_published_checkpoints_have_these_keys_and_shapes(size):
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(PUBLISHED | SIZES[size])
        reference = diffusers.WanTransformer3DModel.from_config(PUBLISHED | SIZES[size])
    got = {name: t.shape for name, t in model.state_dict().items()}
    assert got == {name: t.shape for name, t in reference.state_dict().items()}
    assert not list(model.buffers())


def test_config_keys_and_defaults_are_diffusers():
    with torch.device("meta"):
        ours = WanTransformer3DModel.from_config({"num_layers": 0}).config
        theirs = diffusers.WanTransformer3DModel(num_layers=0).config
    assert {key: getattr(ours, key) for key in ours.__slots__} == {
        key: value for key, value in theirs.items() if not key.startswith("_")
    }
    assert set(WanTransformer3DModel._keep_in_fp32) == set(diffusers.WanTransformer3DModel._keep_in_fp32_modules) - {
        "rope"
    }  # no module here
    assert list(WanTransformer3DModel.skip_layerwise_casting) == (
        diffusers.WanTransformer3DModel._skip_layerwise_casting_patterns
    )


def test_each_unit_is_called_once_per_block():
    model, _ = pair()
    model.set_chunk_size(10)
    units = [module for module in model.modules() if getattr(module, "offload_unit", False)]
    assert [type(unit) for unit in units] == [WanSelfAttention, WanCrossAttention, FeedForward] * 2
    calls = []
    for unit in units:
        unit.register_forward_hook(lambda module, args, output: calls.append(module))
    model(**inputs(batch=2))
    assert calls == units


def test_units_may_be_given_a_copy_of_the_tokens():
    """A hook that moves the inputs breaks the aliasing, so the result has to travel through the return value."""

    def copied(argument):
        return (
            argument._replace(tokens=argument.tokens.clone()) if isinstance(argument, Modulated) else argument.clone()
        )

    model, _ = pair()
    given = inputs()
    expected = model(**given).sample
    for block in model.blocks:
        for unit in (block.attn1, block.attn2, block.ffn):
            unit.register_forward_pre_hook(lambda module, args: (copied(args[0]), *args[1:]))
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_compile_fullgraph_without_recompiles(backend):
    model, _ = pair()
    model.set_chunk_size(24)
    given = inputs(batch=2)
    expected = model(**given).sample
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    assert error(model(**given).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(model(**given).sample, expected) <= 1e-6
    torch._dynamo.reset()


def test_compiled_elementwise_functions(monkeypatch):
    model, _ = pair()
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
    assert error(model(**given).sample, expected) <= 1e-6
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
        ({"image_dim": 1280}, "image_dim=1280 belongs to image-to-video"),
        ({"added_kv_proj_dim": 5120}, "image-to-video"),
        ({"pos_embed_seq_len": 514}, "image-to-video"),
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
        ({"timestep": torch.zeros(1, 72)}, "per token"),
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
