from __future__ import annotations

from functools import partial

import pytest
import torch
from autoencoders import AUTOENCODERS, build_pair
from diffusers import AutoencoderKLWan as Oracle
from families import normal, relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.wan.vae import AutoencoderKLWan


@pytest.fixture(scope="module")
def pair():
    return build_pair("Wan2.1")


@pytest.fixture
def tiled_pair():
    ours, oracle = build_pair("Wan2.1")
    sizes = {
        "tile_sample_min_height": 32,
        "tile_sample_min_width": 24,
        "tile_sample_stride_height": 24,
        "tile_sample_stride_width": 16,
    }
    ours.enable_tiling(**sizes)
    oracle.enable_tiling(**sizes)
    return ours, oracle


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5])
def test_decode_equals_the_oracle(pair, latent_frames):
    ours, oracle = pair
    z = normal(1, 4, latent_frames, 6, 5)
    result, expected = ours.decode(z).sample, oracle.decode(z).sample
    assert result.shape == (1, 3, 1 + 4 * (latent_frames - 1), 48, 40)
    assert expected.abs().lt(1).float().mean() > 0.5  # not all of it is clamped
    assert relative_error(result, expected) <= 1e-5


@pytest.mark.parametrize("frames", [1, 3, 5, 8, 9, 17])
def test_encode_equals_the_oracle(pair, frames):
    ours, oracle = pair
    x = normal(1, 3, frames, 40, 48)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist
    assert result.mean.shape == (1, 4, 1 + (frames - 1) // 4, 5, 6)
    assert relative_error(result.mean, expected.mean) <= 1e-5
    assert relative_error(result.logvar, expected.logvar) <= 1e-5


def test_sizes_that_are_no_multiples_of_eight_encode_as_in_the_oracle(pair):
    ours, oracle = pair
    x = normal(1, 3, 5, 45, 34)
    assert relative_error(ours.encode(x).latent_dist.mean, oracle.encode(x).latent_dist.mean) <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"num_res_blocks": 1},
        {"decoder_base_dim": 16, "dim_mult": [1, 2, 3, 2]},
        {"temperal_downsample": [True, False, True]},
        {"temperal_downsample": [True, True, False], "dropout": 0.1},
    ],
)
def test_every_option_equals_the_oracle(config):
    ours, oracle = build_pair("Wan2.1", **config)
    x, z = normal(1, 3, 9, 24, 32), normal(1, 4, 3, 3, 4)
    assert relative_error(ours.encode(x).latent_dist.parameters, oracle.encode(x).latent_dist.parameters) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


FIVE_B = ({}, {"num_res_blocks": 2}, {"temperal_downsample": [True, False, True]}, {"is_residual": False})


@pytest.mark.parametrize(("config", "tiled"), [(each, False) for each in FIVE_B] + [({}, True)], ids=str)
def test_the_one_of_5b_equals_the_oracle(config, tiled):
    ours, oracle = build_pair("Wan2.2 5B", **config)
    if tiled:
        for vae in (ours, oracle):
            vae.enable_tiling(32, 32, 16, 16)
    x, z = normal(1, 3, 9, 48, 80), normal(1, 4, 3, 4, 3)
    encoded, decoded = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    assert decoded.shape == (1, 3, 9, 64, 48)
    assert encoded.shape == (1, 8, 3, 3, 5)
    assert relative_error(decoded, oracle.decode(z).sample) <= 1e-5
    assert relative_error(encoded, oracle.encode(x).latent_dist.parameters) <= 1e-5
    with pytest.raises(ConfigError, match="40 x 32 pixels; multiples of 16"):
        build_pair("Wan2.2 5B")[0].encode(normal(1, 3, 1, 40, 32))


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (4, 4), (5, 2)])
@pytest.mark.parametrize("latent_frames", [1, 2])
def test_tiled_decode_equals_the_oracle(tiled_pair, rows, columns, latent_frames):
    ours, oracle = tiled_pair
    z = normal(1, 4, latent_frames, rows, columns)
    whole = build_pair("Wan2.1")[0].decode(z).sample
    result, expected = ours.decode(z).sample, oracle.decode(z).sample
    assert relative_error(result, expected) <= 1e-5
    assert relative_error(result, whole) > 1e-4  # it was tiled


@pytest.mark.parametrize(("height", "width"), [(56, 40), (44, 26), (32, 43)])
def test_tiled_encode_equals_the_oracle(tiled_pair, height, width):
    ours, oracle = tiled_pair
    x = normal(1, 3, 5, height, width)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist
    assert relative_error(result.parameters, expected.parameters) <= 1e-5


def test_tiling_keeps_the_oracles_defaults_and_is_turned_off():
    ours, oracle = build_pair("Wan2.1")
    z = normal(1, 4, 1, 34, 3)
    whole = ours.decode(z).sample
    ours.enable_tiling()
    oracle.enable_tiling()
    tiled = ours.decode(z).sample
    assert relative_error(tiled, oracle.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    assert torch.equal(ours.decode(z).sample, whole)
    assert not torch.equal(tiled, whole)


def test_samples_equal_the_oracles(pair):
    ours, oracle = pair
    x = normal(2, 3, 5, 16, 16)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist

    def generators(count):
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    assert torch.equal(result.mode(), result.mean)
    assert relative_error(result.std, expected.std) <= 1e-5
    assert relative_error(result.var, expected.var) <= 1e-5
    for make in (lambda: generators(1)[0], lambda: generators(1), lambda: generators(2)):
        assert relative_error(result.sample(make()), expected.sample(make())) <= 1e-5
    with pytest.raises(ConfigError, match="3 generators for a batch of 2"):
        result.sample(generators(3))


def test_a_decode_inside_a_decode_does_not_disturb_it(pair):
    ours, _ = pair
    z, other = normal(1, 4, 3, 4, 4), normal(1, 4, 2, 4, 4, seed=5)
    expected, expected_other = ours.decode(z).sample, ours.decode(other).sample
    inner = []

    def decode_other(*_):
        hook.remove()
        inner.append(ours.decode(other).sample)

    hook = ours.decoder.up_blocks[1].resnets[1].conv1.register_forward_pre_hook(decode_other)
    assert torch.equal(ours.decode(z).sample, expected)
    assert torch.equal(inner[0], expected_other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 2}, "patch_size=2 contradicts in_channels=3"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"attn_scales": [0.5]}, "attn_scales"),
    ],
)
def test_options_of_other_autoencoders_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLWan.from_config(config)


@pytest.mark.parametrize(
    "config", [{"scale_factor_spatial": 16}, {"scale_factor_temporal": 2}, {"temperal_downsample": [True, True]}]
)
def test_sizes_that_contradict_each_other_are_refused(config):
    with pytest.raises(ConfigError, match="temperal_downsample"):
        AutoencoderKLWan.from_config(config)


def test_tiles_between_latents_are_refused_and_change_nothing(pair):
    ours, _ = pair
    with pytest.raises(ConfigError, match="height 100 is no multiple of 8"):
        ours.enable_tiling(tile_sample_min_height=100, tile_sample_stride_height=96)
    assert not ours.use_tiling
    assert ours.tiling.height == 256


@pytest.mark.parametrize(
    ("method", "shape", "tiled", "limit"),
    [
        ("decode", (1, 16, 3, 60, 104), False, 0.65),
        ("decode", (1, 16, 2, 40, 72), True, 0.8),
        ("encode", (1, 3, 9, 480, 832), False, 0.6),
        ("encode", (1, 3, 5, 320, 576), True, 0.8),
    ],
)
@torch.no_grad()
def test_fewer_bytes_are_alive_than_in_the_oracle(method, shape, tiled, limit):
    peaks_bytes = []
    for vae in (AutoencoderKLWan, Oracle):
        with torch.device("meta"):
            model, x = vae.from_config(AUTOENCODERS["Wan2.1"].published).eval(), torch.empty(shape)
        if tiled:
            model.enable_tiling()
        peaks_bytes.append(peak_bytes(partial(getattr(model, method), x)))
    assert peaks_bytes[0] <= limit * peaks_bytes[1]
