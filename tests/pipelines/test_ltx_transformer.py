"""The LTX-Video transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from dataclasses import asdict
from functools import partial

import diffusers
import pytest
import torch
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.layers import FeedForward, Modulated
from vramkit.pipelines.ltx.transformer import (
    LTXCrossAttention,
    LTXSelfAttention,
    LTXVideoTransformer3DModel,
    LTXVideoTransformerConfig,
)

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "in_channels": 8,
    "out_channels": 8,
    "caption_channels": 24,
    "num_layers": 2,
}
# transformer/config.json of Lightricks/LTX-Video, and what its 13B versions change.
PUBLISHED = {
    "_class_name": "LTXVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "attention_out_bias": True,
    "caption_channels": 4096,
    "cross_attention_dim": 2048,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 28,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm_across_heads",
}
SIZES = {"2B": {}, "13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}}
PARAMETERS = {"2B": 1_923_385_472, "13B": 13_042_569_344}
SCALE = (8 / 25, 32, 32)


def pair(seed=0, **options):
    """Our model and diffusers' with the same random weights."""
    torch.manual_seed(seed)
    reference = diffusers.LTXVideoTransformer3DModel(**TINY | options).eval().requires_grad_(False)
    for name, parameter in reference.named_parameters():  # norms at 1 would hide mistakes
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model = LTXVideoTransformer3DModel.from_config(TINY | options).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    return model, reference


def masks(lengths, tokens):
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def inputs(batch=1, frames=3, height=4, width=6, text=9, lengths=(5, 9), channels=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, frames * height * width, channels, generator=g).to(dtype),
        "timestep": torch.tensor([999.0, 314.5][:batch]),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=g).to(dtype),
        "encoder_attention_mask": masks(lengths[:batch], text),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": SCALE,
    }


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {}),
        ({}, {"batch": 2, "frames": 5}),
        ({}, {"batch": 2, "frames": 1, "height": 3, "width": 5, "lengths": (1, 7)}),
        ({"attention_bias": False, "attention_out_bias": False, "out_channels": None}, {}),
        ({"attention_head_dim": 20, "num_attention_heads": 1, "cross_attention_dim": 20, "norm_eps": 1e-3}, {}),
        ({"attention_head_dim": 6, "num_attention_heads": 3, "cross_attention_dim": 18, "out_channels": 6}, {}),
        ({"patch_size": 2, "patch_size_t": 3, "in_channels": 12}, {"channels": 12}),
    ],
    ids=str,
)
def test_equals_diffusers(options, given):
    model, reference = pair(**options)
    given = inputs(**given)
    expected = reference(**given).sample
    model.set_chunk_size(10)
    got = model(**given).sample
    assert got.shape == expected.shape
    assert error(got, expected) <= 1e-5


@pytest.mark.parametrize("scale", [None, (1.0, 1.0, 1.0), (8 / 30, 16, 64), torch.tensor([8 / 24, 32.0, 32.0])])
def test_positions_are_measured_as_in_diffusers(scale):
    model, reference = pair()
    given = inputs() | {"rope_interpolation_scale": scale}
    expected = reference(**given).sample
    assert error(model(**given).sample, expected) <= 1e-5
    assert error(model(**inputs()).sample, expected) > 1e-3  # another scale, another table


def test_coordinates_take_the_place_of_the_grid():
    model, reference = pair()
    given = inputs(batch=2)
    coordinates = torch.rand(2, 3, 72, generator=torch.Generator().manual_seed(3)) * 200
    sizes = dict.fromkeys(("num_frames", "height", "width", "rope_interpolation_scale"))
    got = model(**given | sizes | {"video_coords": coordinates}).sample
    assert error(got, reference(**given | sizes | {"video_coords": coordinates}).sample) <= 1e-5
    first = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    alone = model(**first | sizes | {"video_coords": coordinates[:1]}).sample
    assert error(alone, got[:1]) <= 1e-6


def test_text_is_cut_to_its_tokens_and_other_masks_are_masks():
    model, reference = pair()
    given = inputs(batch=2)
    cut = model(**given).sample
    assert torch.equal(model(**given | {"encoder_attention_mask": (5, 9)}).sample, cut)
    padded = given["encoder_hidden_states"].clone()
    padded[0, 5:] = 1e3
    assert torch.equal(model(**given | {"encoder_hidden_states": padded}).sample, cut)
    holes = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0], [1] * 9])
    # diffusers adds -10000 to masked scores: where all are masked, that rounds them and no more.
    for mask, limit in ((holes, 1e-5), (holes.bool(), 1e-5), (torch.zeros_like(holes), 1e-3), (masks((0, 4), 9), 1e-3)):
        given["encoder_attention_mask"] = mask
        expected = reference(**given).sample
        assert error(model(**given).sample, expected) <= limit
        assert error(cut, expected) > 1e-3
    given["encoder_attention_mask"] = torch.ones_like(holes)
    assert error(model(**given | {"encoder_attention_mask": None}).sample, reference(**given).sample) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 36, 71, 72, 8192])
def test_chunk_size_changes_rounding_only(chunk):
    model, _ = pair()
    given = inputs(batch=2)  # 72 tokens
    whole = model(**given).sample
    model.set_chunk_size(chunk)
    assert error(model(**given).sample, whole) <= 1e-6


def test_bfloat16_is_as_near_to_float32_as_diffusers():
    model, reference = pair()
    exact = reference(**inputs(batch=2)).sample
    given = inputs(batch=2, dtype=torch.bfloat16)
    got, expected = model.bfloat16()(**given).sample, reference.bfloat16()(**given).sample
    assert got.dtype == model.dtype == torch.bfloat16
    assert error(got, expected) <= 0.02
    assert error(got, exact) <= 1.2 * error(expected, exact)


def test_inputs_are_left_alone_and_calls_repeat():
    model, _ = pair()
    given = inputs(batch=2)
    copies = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    first, again = model(**given).sample, model(**given, return_dict=False)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(given[key], copy) for key, copy in copies.items())
    model(**inputs(frames=1))  # another size in between makes another rotary table
    assert torch.equal(first, model(**given)[0])
    one = given | {"timestep": torch.tensor([7.0])}
    assert torch.equal(model(**one).sample, model(**given | {"timestep": torch.tensor([7.0, 7.0])}).sample)


@pytest.mark.parametrize("size", SIZES)
def test_published_checkpoints_have_these_keys_and_shapes(size):
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel.from_config(PUBLISHED | SIZES[size])
        reference = diffusers.LTXVideoTransformer3DModel.from_config(PUBLISHED | SIZES[size])
    got = {name: t.shape for name, t in model.state_dict().items()}
    assert got == {name: t.shape for name, t in reference.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    assert not list(model.buffers())


def test_config_keys_and_defaults_are_diffusers():
    with torch.device("meta"):
        theirs = diffusers.LTXVideoTransformer3DModel(num_layers=0).config
    ours = asdict(LTXVideoTransformerConfig(num_layers=0))
    assert ours == {key: value for key, value in theirs.items() if not key.startswith("_")}
    reference = diffusers.LTXVideoTransformer3DModel
    assert list(LTXVideoTransformer3DModel._keep_in_fp32) == (reference._keep_in_fp32_modules or [])
    assert list(LTXVideoTransformer3DModel.skip_layerwise_casting) == reference._skip_layerwise_casting_patterns


def test_each_unit_is_called_once_per_block():
    model, _ = pair()
    model.set_chunk_size(10)
    units = [module for module in model.modules() if getattr(module, "offload_unit", False)]
    assert [type(unit) for unit in units] == [LTXSelfAttention, LTXCrossAttention, FeedForward] * 2
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
    for block in model.transformer_blocks:
        for unit in (block.attn1, block.attn2, block.ff):
            unit.register_forward_pre_hook(lambda module, args: (copied(args[0]), *args[1:]))
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(offload_type):
    model, _ = pair()
    given = inputs(batch=2)
    expected = model(**given).sample
    offload = model.enable_group_offload("cpu", offload_type=offload_type)
    assert torch.equal(model(**given).sample, expected)
    offload.remove()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_fp8_weights_give_the_same_bytes(offload_type):
    results = []
    for offloaded in (False, True):
        model, _ = pair()
        exact = model(**inputs()).sample
        model.enable_layerwise_casting()
        if offloaded:
            model.enable_group_offload("cpu", offload_type=offload_type)
        results.append(model(**inputs()).sample)
    assert torch.equal(*results)
    assert 1e-4 < error(results[0], exact) < 0.2


@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_compiles_fullgraph_without_recompiles(whole):
    model, _ = pair(num_layers=1 if whole else 2)
    model.set_chunk_size(40)
    given = inputs(batch=2)
    expected = model(**given).sample
    torch._dynamo.reset()
    for module in [model] if whole else model.transformer_blocks:
        module.compile(fullgraph=True, backend="eager" if whole else "aot_eager")
    lengths = given | {"encoder_attention_mask": (5, 9)}
    assert error(model(**lengths).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(model(**lengths).sample, expected) <= 1e-6
    assert error(model(**given).sample, expected) <= 1e-6  # with a mask, whose lengths a graph does not know
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_token_tensors_are_alive(dtype):
    """x, keys and values, beside temporaries of the size of a chunk and the rotary table, which is kept."""
    tokens, chunk, channels = 512, 32, 96
    model, _ = pair(attention_head_dim=48, cross_attention_dim=96)
    model.to(dtype).set_chunk_size(chunk)
    given = inputs(frames=2, height=16, width=16, dtype=dtype) | {"encoder_attention_mask": (5,)}
    model(**given)
    table = model._rotary[1]
    assert table.nbytes == tokens * channels * 4
    kept = [value for value in given.values() if isinstance(value, torch.Tensor)]
    peak = peak_bytes(partial(model, **given), [*model.parameters(), *kept, table])
    token_bytes, chunk_bytes = tokens * channels * dtype.itemsize, chunk * channels * dtype.itemsize
    inner_chunks = 10  # the feed-forward's inner layer before and after its activation, or four fp32 tensors
    small_bytes = 24 * 1024  # text, modulation
    assert peak >= 3 * token_bytes
    assert peak <= 3 * token_bytes + inner_chunks * chunk_bytes + small_bytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm', expected 'rms_norm_across_heads'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True, expected False"),
        ({"attention_head_dim": 15}, "even"),
        ({"cross_attention_dim": 64}, "cross_attention_dim=64, expected 32"),
        ({"colour": "red"}, r"unknown options \['colour'\]"),
    ],
)
def test_wrong_configs_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        LTXVideoTransformer3DModel.from_config(TINY | config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 72, 6)}, r"expected \[batch, tokens, 8\]"),
        ({"hidden_states": torch.zeros(1, 8, 3, 4, 6)}, r"expected \[batch, tokens, 8\]"),
        ({"width": 5}, "width=5: expected sizes in latents whose product is the number of tokens, 72"),
        ({"num_frames": None}, "or give video_coords"),
        ({"timestep": torch.zeros(1, 72)}, "per token"),
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs"),
        ({"rope_interpolation_scale": (1.0, 2.0)}, "expected three numbers"),
        ({"rope_interpolation_scale": torch.ones(3, 2)}, "expected three numbers"),
        ({"video_coords": torch.zeros(1, 3, 5)}, r"video_coords: got shape \(1, 3, 5\), expected \(1, 3, 72\)"),
        ({"encoder_attention_mask": torch.ones(1, 8)}, r"got shape \(1, 8\), expected \(1, 9\)"),
        ({"encoder_attention_mask": (10,)}, r"got texts of \(10,\) tokens, expected 1 of at most 9"),
        ({"encoder_attention_mask": (4, 4)}, "expected 1 of at most 9"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    model, _ = pair(num_layers=1)
    with pytest.raises(ConfigError, match=message):
        model(**inputs() | change)
