"""The HunyuanVideo transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from dataclasses import asdict
from functools import partial

import diffusers
import pytest
import torch
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video.transformer import (
    DoubleAttention,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformer3DModel,
    HunyuanVideoTransformerConfig,
    SingleAttention,
)
from vramkit.pipelines.layers import FeedForward
from vramkit.pipelines.text_masks import text_lengths

TINY = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "rope_axes_dim": (4, 6, 6),
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 20,
    "pooled_projection_dim": 8,
    "mlp_ratio": 2.0,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
}
# transformer/config.json of hunyuanvideo-community/HunyuanVideo.
PUBLISHED = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}


def pair(**options):
    """Our model and diffusers' with the same random weights."""
    torch.manual_seed(0)
    reference = diffusers.HunyuanVideoTransformer3DModel(**TINY | options).eval().requires_grad_(False)
    for parameter in reference.parameters():  # norms at 1 and biases near 0 would hide mistakes
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = HunyuanVideoTransformer3DModel.from_config(TINY | options).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    return model, reference


def inputs(lengths=(9,), frames=3, height=8, width=12, text=9, channels=4, guidance=True, dtype=torch.float32):
    g, batch = torch.Generator().manual_seed(1), len(lengths)
    given = {
        "hidden_states": torch.randn(batch, channels, frames, height, width, generator=g).to(dtype),
        "timestep": torch.tensor([999.0, 314.5, 3.0][:batch]),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=g).to(dtype),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(lengths)[:, None]).to(dtype),
        "pooled_projections": torch.randn(batch, 8, generator=g).to(dtype),
    }
    return given | ({"guidance": torch.tensor([6000.0, 1500.0, 1000.0][:batch])} if guidance else {})


def error(got, expected):
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {}),
        ({}, {"lengths": (4,), "frames": 5}),
        ({}, {"lengths": (9, 3, 1)}),
        ({"guidance_embeds": False}, {"guidance": False, "lengths": (2, 5)}),
        ({"guidance_embeds": False}, {}),
        ({"patch_size": 1, "patch_size_t": 2, "out_channels": 6}, {"frames": 4, "height": 3, "width": 5}),
        ({"num_layers": 0, "num_refiner_layers": 1, "in_channels": 8}, {"frames": 1, "channels": 8}),
        ({"num_single_layers": 0, "rope_theta": 10000.0, "rope_axes_dim": (8, 4, 4)}, {"lengths": (6, 6)}),
    ],
    ids=str,
)
def test_equals_diffusers(options, shape):
    model, reference = pair(**options)
    given = inputs(**shape)
    expected = reference(**given).sample
    model.set_chunk_size(10)
    got = model(**given).sample
    assert got.shape == expected.shape
    assert error(got, expected) <= 1e-5


def test_padding_behind_a_text_changes_nothing_and_lengths_stand_for_a_mask():
    model, _ = pair()
    given = inputs(lengths=(6, 2))
    expected = model(**given).sample
    text = given["encoder_hidden_states"].clone()
    text[0, 6:], text[1, 2:] = 1e6, float("nan")
    assert torch.equal(model(**given | {"encoder_hidden_states": text, "encoder_attention_mask": [6, 2]})[0], expected)
    alone = {name: tensor[1:] for name, tensor in given.items()} | {"encoder_attention_mask": [2]}
    assert error(model(**alone | {"encoder_hidden_states": text[1:, :2]}).sample, expected[1:]) <= 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 36, 71, 72, 8192])
def test_chunk_size_changes_rounding_only(chunk):
    model, _ = pair()
    given = inputs(lengths=(9, 5))  # 3 x 4 x 6 = 72 tokens
    whole = model(**given).sample
    model.set_chunk_size(chunk)
    assert error(model(**given).sample, whole) <= 1e-6


def test_bfloat16_is_as_near_to_float32_as_diffusers():
    model, reference = pair()
    exact = reference(**inputs(lengths=(9, 5))).sample
    given = inputs(lengths=(9, 5), dtype=torch.bfloat16)
    model, reference = model.bfloat16(), reference.bfloat16()
    got, expected = model(**given).sample, reference(**given).sample
    assert got.dtype == model.dtype == torch.bfloat16
    assert (got - exact).norm() <= 1.2 * (expected - exact).norm()


def test_inputs_are_left_alone_and_calls_repeat():
    model, _ = pair()
    given = inputs()
    copies = {key: value.clone() for key, value in given.items()}
    first, again = model(**given).sample, model(**given, return_dict=False)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(given[key], copies[key]) for key in given)
    model(**inputs(frames=1))  # another size in between makes another rotary table
    assert torch.equal(first, model(**given)[0])


def test_one_timestep_serves_a_batch():
    model, _ = pair()
    given = inputs(lengths=(9, 5))
    expected = model(**given | {"timestep": torch.tensor([7.0, 7.0])}).sample
    assert torch.equal(model(**given | {"timestep": torch.tensor([7.0])}).sample, expected)


def test_published_checkpoint_has_these_keys_and_shapes():
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel.from_config(PUBLISHED)
        reference = diffusers.HunyuanVideoTransformer3DModel.from_config(PUBLISHED)
    got = {name: t.shape for name, t in model.state_dict().items()}
    assert got == {name: t.shape for name, t in reference.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 12_821_012_544
    assert not list(model.buffers())


def test_config_keys_defaults_and_exact_parts_are_diffusers():
    with torch.device("meta"):
        theirs = diffusers.HunyuanVideoTransformer3DModel(num_layers=0, num_single_layers=0, num_refiner_layers=0)
    sizes = {"num_layers": 0, "num_single_layers": 0, "num_refiner_layers": 0}
    assert asdict(HunyuanVideoTransformerConfig(**sizes)) == {
        key: value for key, value in theirs.config.items() if not key.startswith("_")
    }
    assert not HunyuanVideoTransformer3DModel._keep_in_fp32
    assert not theirs._keep_in_fp32_modules
    assert list(HunyuanVideoTransformer3DModel.skip_layerwise_casting) == theirs._skip_layerwise_casting_patterns


def test_each_unit_is_called_once_per_forward():
    model, _ = pair()
    model.set_chunk_size(10)
    units = [module for module in model.modules() if getattr(module, "offload_unit", False)]
    units = [unit for unit in units if not isinstance(unit, SingleAttention)]  # travels with its block
    assert [type(unit) for unit in units] == [DoubleAttention, FeedForward, FeedForward] * 2 + (
        [HunyuanVideoSingleTransformerBlock] * 2
    )
    calls = []
    for unit in units:
        unit.register_forward_hook(lambda module, args, output: calls.append(module))
    model(**inputs(lengths=(9, 5)))
    assert calls == units


def test_blocks_may_be_given_copies_of_the_tokens():
    """A hook that moves the inputs breaks the aliasing, so the results have to travel through the return values."""
    model, _ = pair()
    given = inputs()
    expected = model(**given).sample
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(lambda module, args: (args[0].clone(), args[1].clone(), *args[2:]))
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(offload_type):
    model, _ = pair()
    model.set_chunk_size(24)
    given = inputs(lengths=(9, 5))
    expected = model(**given).sample
    offload = model.enable_group_offload("cpu", offload_type=offload_type)
    assert torch.equal(model(**given).sample, expected)
    assert torch.equal(model(**given).sample, expected)
    offload.remove()


@pytest.mark.parametrize("whole", [True, False])
def test_compiles_fullgraph_without_recompiles(whole):
    model, _ = pair(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    model.set_chunk_size(40)
    given = inputs(lengths=(5,) if whole else (9, 5))
    expected = model(**given).sample
    torch._dynamo.reset()
    for module in [model] if whole else [*model.transformer_blocks, *model.single_transformer_blocks]:
        module.compile(fullgraph=True, backend="aot_eager")
    lengths = given | {"encoder_attention_mask": (5,) if whole else (9, 5)}
    assert error(model(**lengths).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(model(**lengths).sample, expected) <= 1e-6
    assert error(model(**given).sample, expected) <= 1e-6  # with a mask, whose lengths a graph does not know
    torch._dynamo.reset()


def test_casting_leaves_the_layers_alone_that_diffusers_leaves_alone():
    model, reference = pair()
    reference.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    model.enable_layerwise_casting()
    narrow = {name for name, parameter in reference.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    narrow_here = {name for name, parameter in model.named_parameters() if type(parameter.data) is not torch.Tensor}
    # Biases stay exact; diffusers also leaves the last layer of every model alone, beside what the class names.
    assert narrow_here == {name for name in narrow if name.endswith("weight")} | {"proj_out.weight"}
    given = inputs(lengths=(9, 5))
    resident = model(**given).sample
    assert 1e-4 < error(resident, reference(**given).sample) < 0.2
    model.enable_group_offload("cpu", offload_type="leaf_level")
    assert torch.equal(model(**given).sample, resident)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_token_tensors_are_alive(dtype):
    """x, keys and values, beside temporaries of the size of a chunk: attended and inner, joined, and the query."""
    tokens, chunk, channels = 512, 32, 96
    model, _ = pair(attention_head_dim=32, rope_axes_dim=(8, 12, 12))
    model.to(dtype).set_chunk_size(chunk)
    given = inputs(frames=2, height=32, width=32, dtype=dtype) | {"encoder_attention_mask": [9]}
    model(**given)
    kept = [value for value in given.values() if isinstance(value, torch.Tensor)]
    peak = peak_bytes(partial(model, **given), [*model.parameters(), *kept, model._rotary[1]])
    token_bytes, chunk_bytes = tokens * channels * dtype.itemsize, chunk * channels * dtype.itemsize
    small_bytes = 48 * 1024  # text, modulation
    assert peak >= 3 * token_bytes
    assert peak <= 3 * token_bytes + 8 * chunk_bytes + small_bytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_condition_type": "token_replace"}, "image_condition_type='token_replace' belongs to image-to-video"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"rope_axes_dim": (8, 8)}, "three even numbers with the sum 16"),
        ({"rope_axes_dim": (4, 6, 4)}, "sum 16"),
        ({"colour": "red"}, r"unknown options \['colour'\]"),
    ],
)
def test_wrong_configs_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        HunyuanVideoTransformer3DModel.from_config(TINY | config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 4, 3, 8, 7)}, "divisible"),
        ({"hidden_states": torch.zeros(4, 3, 8, 8)}, "expected .batch, channels, frames, height, width."),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs"),
        ({"guidance": None}, r"guidance: got none, expected \[1\]"),
        ({"encoder_attention_mask": torch.ones(1, 8)}, r"got shape \(1, 8\), expected \(1, 9\)"),
        ({"encoder_attention_mask": torch.zeros(1, 9)}, r"got texts of \(0,\) tokens, expected 1 of 1 to 9"),
        ({"encoder_attention_mask": [10]}, r"got texts of \(10,\) tokens, expected 1 of 1 to 9"),
        ({"encoder_attention_mask": [4, 4]}, "expected 1 of 1 to 9 tokens"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    model, _ = pair()
    with pytest.raises(ConfigError, match=message):
        model(**inputs() | change)


def test_lengths_are_read_from_masks_of_any_kind():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for kind in (mask, mask.bool(), mask.bfloat16()):
        assert text_lengths(kind) == (2, 4)
    assert text_lengths(mask.flip(1)) is None


@pytest.mark.parametrize("compiled", [False, True])
def test_masks_with_zeros_before_ones_are_read_as_diffusers_reads_them(compiled):
    model, reference = pair(num_layers=1, num_single_layers=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]])
    given = inputs(lengths=(9, 9, 9)) | {"encoder_attention_mask": mask}
    if compiled:
        torch._dynamo.reset()
        model.compile(fullgraph=True, backend="eager")
    assert error(model(**given).sample, reference(**given).sample) <= 1e-5
