"""The LTX-Video transformer against diffusers', its memory, and its behaviour as a set of streamed units."""

from functools import partial

import pytest
import torch
from denoisers import DENOISERS, build_pair, ltx_inputs, ltx_masks
from families import relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.ltx.transformer import (
    LTXVideoTransformer3DModel,
)

TINY = DENOISERS["LTX-Video"].tiny
pair, inputs = partial(build_pair, "LTX-Video"), ltx_inputs


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
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("scale", [None, (1.0, 1.0, 1.0), (8 / 30, 16, 64), torch.tensor([8 / 24, 32.0, 32.0])])
def test_positions_are_measured_as_in_diffusers(scale):
    model, reference = pair()
    given = inputs() | {"rope_interpolation_scale": scale}
    expected = reference(**given).sample
    assert relative_error(model(**given).sample, expected) <= 1e-5
    assert relative_error(model(**inputs()).sample, expected) > 1e-3  # another scale, another table


def test_coordinates_take_the_place_of_the_grid():
    model, reference = pair()
    given = inputs(batch=2)
    coordinates = torch.rand(2, 3, 72, generator=torch.Generator().manual_seed(3)) * 200
    sizes = dict.fromkeys(("num_frames", "height", "width", "rope_interpolation_scale"))
    got = model(**given | sizes | {"video_coords": coordinates}).sample
    assert relative_error(got, reference(**given | sizes | {"video_coords": coordinates}).sample) <= 1e-5
    first = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    alone = model(**first | sizes | {"video_coords": coordinates[:1]}).sample
    assert relative_error(alone, got[:1]) <= 1e-6


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
    for mask, limit in (
        (holes, 1e-5),
        (holes.bool(), 1e-5),
        (torch.zeros_like(holes), 1e-3),
        (ltx_masks((0, 4), 9), 1e-3),
    ):
        given["encoder_attention_mask"] = mask
        expected = reference(**given).sample
        assert relative_error(model(**given).sample, expected) <= limit
        assert relative_error(cut, expected) > 1e-3
    given["encoder_attention_mask"] = torch.ones_like(holes)
    assert relative_error(model(**given | {"encoder_attention_mask": None}).sample, reference(**given).sample) <= 1e-5


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
    assert relative_error(model(**lengths).sample, expected) <= 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative_error(model(**lengths).sample, expected) <= 1e-6
    assert relative_error(model(**given).sample, expected) <= 1e-6  # with a mask, whose lengths a graph does not know
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


def test_the_table_of_coordinates_is_kept_until_they_change():
    model, reference = pair()
    given, places = inputs(), torch.rand(1, 3, 72) * 100
    for _ in range(2):
        first, kept = model(**given, video_coords=places).sample, model._placed[2]
        assert torch.equal(model(**given, video_coords=places).sample, first)
        assert model._placed[2] is kept
        with torch.no_grad():
            assert relative_error(first, reference(**given, video_coords=places).sample) <= 1e-5
        places.add_(30.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 72, 6)}, r"expected \[batch, tokens, 8\]"),
        ({"hidden_states": torch.zeros(1, 8, 3, 4, 6)}, r"expected \[batch, tokens, 8\]"),
        ({"width": 5}, "width=5: expected sizes in latents whose product is the number of tokens, 72"),
        ({"num_frames": None}, "or give video_coords"),
        ({"timestep": torch.zeros(1, 71)}, r"or \(1, 72\), one for each token"),
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
