"""The HunyuanVideo transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from functools import partial

import pytest
import torch
from denoisers import DENOISERS, build_pair, hunyuan_inputs
from families import relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video.transformer import (
    HunyuanVideoTransformer3DModel,
)
from vramkit.pipelines.networks.text_masks import text_lengths

TINY = DENOISERS["HunyuanVideo"].tiny
pair, inputs = partial(build_pair, "HunyuanVideo"), hunyuan_inputs


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
    assert relative_error(got, expected) <= 1e-5


def test_padding_behind_a_text_changes_nothing_and_lengths_stand_for_a_mask():
    model, _ = pair()
    given = inputs(lengths=(6, 2))
    expected = model(**given).sample
    text = given["encoder_hidden_states"].clone()
    text[0, 6:], text[1, 2:] = 1e6, float("nan")
    assert torch.equal(model(**given | {"encoder_hidden_states": text, "encoder_attention_mask": [6, 2]})[0], expected)
    alone = {name: tensor[1:] for name, tensor in given.items()} | {"encoder_attention_mask": [2]}
    assert relative_error(model(**alone | {"encoder_hidden_states": text[1:, :2]}).sample, expected[1:]) <= 1e-6


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
    assert relative_error(model(**lengths).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative_error(model(**lengths).sample, expected) <= 1e-6
    assert relative_error(model(**given).sample, expected) <= 1e-6  # with a mask, whose lengths a graph does not know
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
    assert 1e-4 < relative_error(resident, reference(**given).sample) < 0.2
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
    model, reference = pair(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]])
    given = inputs(lengths=(9, 9, 9)) | {"encoder_attention_mask": mask}
    if compiled:
        torch._dynamo.reset()
        model.compile(fullgraph=True, backend="eager")
    assert relative_error(model(**given).sample, reference(**given).sample) <= 1e-5
