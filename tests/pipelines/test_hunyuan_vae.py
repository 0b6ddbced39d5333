"""The HunyuanVideo autoencoder against diffusers': numbers in every tiling, names and shapes, and bytes alive."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from autoencoders import AUTOENCODERS, build_pair, encoded
from diffusers import AutoencoderKLHunyuanVideo as Oracle
from families import normal, relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video.vae import AutoencoderKLHunyuanVideo

TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 24,
    "tile_sample_stride_height": 24,
    "tile_sample_stride_width": 16,
}


@pytest.fixture(scope="module")
def pair():
    return build_pair("HunyuanVideo")


@pytest.fixture
def tiled_pair():
    pair = build_pair("HunyuanVideo")
    for vae in pair:
        vae.enable_tiling(**TILES)
    return pair


# Up to four latent frames whole; above that in tiles of frames: with a full last tile, a short one, one of no new frame.
@pytest.mark.parametrize("latent_frames", [1, 2, 4, 5, 6, 7, 9])
def test_decode_equals_the_oracle(pair, latent_frames):
    ours, oracle = pair
    z = normal(1, 4, latent_frames, 4, 5)
    result, expected = ours.decode(z).sample, oracle.decode(z).sample
    assert result.shape == (1, 3, 1 + 4 * (latent_frames - 1), 32, 40)
    assert relative_error(result, expected) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 8, 16, 17, 18, 25, 29])
def test_encode_equals_the_oracle(pair, frames):
    ours, oracle = pair
    x = normal(1, 3, frames, 32, 40)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist
    assert result.mean.shape == (1, 4, 1 + (frames - 1) // 4, 4, 5)
    assert relative_error(result.mean, expected.mean) <= 1e-5
    assert relative_error(result.logvar, expected.logvar) <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 2, "norm_num_groups": 2},
        {"mid_block_add_attention": False},
        {"spatial_compression_ratio": 4},
        {
            "block_out_channels": [4, 12, 8],
            "down_block_types": ["HunyuanVideoDownBlock3D"] * 3,
            "up_block_types": ["HunyuanVideoUpBlock3D"] * 3,
        },
    ],
    ids=str,
)
def test_every_option_equals_the_oracle(config):
    ours, oracle = build_pair("HunyuanVideo", **config)
    x, z = normal(1, 3, 9, 24, 32), normal(1, 4, 3, 3, 4)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


@pytest.mark.parametrize(("latent_frames", "rows", "columns"), [(1, 7, 5), (6, 4, 4), (7, 5, 2), (2, 4, 3)])
def test_tiled_decode_equals_the_oracle(tiled_pair, latent_frames, rows, columns):
    ours, oracle = tiled_pair
    z = normal(1, 4, latent_frames, rows, columns)
    result = ours.decode(z).sample
    assert relative_error(result, oracle.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    tiled = max(rows, columns) > 4 or columns > 3
    assert (relative_error(result, ours.decode(z).sample) > 1e-4) == tiled


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 56, 40), (21, 40, 24), (30, 32, 48)])
def test_tiled_encode_equals_the_oracle(tiled_pair, frames, height, width):
    ours, oracle = tiled_pair
    x = normal(1, 3, frames, height, width)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5


def test_tiles_of_frames_are_chosen_and_turned_off_as_in_the_oracle():
    ours, oracle = build_pair("HunyuanVideo")
    z, x = normal(1, 4, 7, 3, 3), normal(1, 3, 25, 24, 24)
    usual = ours.decode(z).sample
    for vae in (ours, oracle):
        vae.enable_tiling(tile_sample_min_num_frames=12, tile_sample_stride_num_frames=4)
    assert relative_error(ours.decode(z).sample, usual) > 1e-4
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    for vae in (ours, oracle):
        vae.use_framewise_decoding = vae.use_framewise_encoding = False
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(ours.decode(z).sample, usual) > 1e-4


def test_tiles_keep_the_oracles_default_sizes():
    ours, oracle = build_pair("HunyuanVideo", layers_per_block=1, block_out_channels=[4, 4, 4, 4])
    z = normal(1, 4, 1, 34, 3)
    whole = ours.decode(z).sample
    ours.enable_tiling()
    oracle.enable_tiling()
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5
    assert not torch.equal(ours.decode(z).sample, whole)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ["DownBlock3D"] * 4}, "down_block_types"),
        ({"up_block_types": ["HunyuanVideoUpBlock3D"] * 3}, "each of the 4 entries"),
        ({"act_fn": "relu"}, "act_fn='relu'; 'silu'"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio=8"),
        ({"spatial_compression_ratio": 6}, "spatial_compression_ratio=6"),
        ({"norm_num_groups": 3}, "no multiples of norm_num_groups=3"),
    ],
)
def test_options_of_other_autoencoders_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLHunyuanVideo.from_config(AUTOENCODERS["HunyuanVideo"].tiny | config)


def test_pixels_between_latents_are_refused(pair):
    ours, _ = pair
    with pytest.raises(ConfigError, match="20 x 16 pixels; multiples of 8"):
        ours.encode(normal(1, 3, 1, 20, 16))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tile_sample_min_height": 100, "tile_sample_stride_height": 96}, "height 100 is no multiple of 8"),
        ({"tile_sample_stride_num_frames": 20}, "16 frames at a distance of 20"),
        ({"tile_sample_min_num_frames": 18}, "frames 18 is no multiple of 4"),
    ],
)
def test_impossible_tiles_are_refused_and_change_nothing(pair, sizes, message):
    ours, _ = pair
    with pytest.raises(ConfigError, match=message):
        ours.enable_tiling(**sizes)
    assert not ours.use_tiling
    assert (ours.tiling.height, ours.frame_tiling.frames, ours.frame_tiling.stride) == (256, 16, 12)


@pytest.mark.parametrize(
    ("method", "shape", "limit"),
    [("decode", (1, 16, 5, 32, 32), 0.42), ("encode", (1, 3, 17, 256, 256), 0.48)],
)
def test_fewer_bytes_are_alive_than_in_the_oracle(method, shape, limit):
    peaks = []
    for vae in (AutoencoderKLHunyuanVideo, Oracle):
        with torch.device("meta"):
            model, x = vae.from_config(AUTOENCODERS["HunyuanVideo"].published).eval(), torch.empty(shape)
        peaks.append(peak_bytes(partial(getattr(model, method), x), [x, *model.parameters()]))
    assert peaks[0] <= limit * peaks[1]


def test_a_long_large_clip_needs_the_result_and_one_tile():
    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo.from_config(AUTOENCODERS["HunyuanVideo"].published).bfloat16().eval()
        tile, clip = (torch.empty(1, 16, *size, dtype=torch.bfloat16) for size in ((5, 32, 32), (9, 48, 48)))
    model.enable_tiling()
    frames_bytes, edges_bytes = 33 * 384 * 384 * 3 * 2, 4 * 64 * 256 * 17 * 3 * 2
    tile_bytes = peak_bytes(partial(model.decode, tile), [tile, *model.parameters()])
    clip_bytes = peak_bytes(partial(model.decode, clip), [clip, *model.parameters()])
    assert clip_bytes <= frames_bytes + tile_bytes + edges_bytes
    # The input of the first layers of full size (256 channels), in which their results find room, what it was made of, and
    # two parts of the frames.
    assert tile_bytes <= (17 * 256 + 9 * 64 + 8 * 256) * 256 * 256 * 2
