"""The HunyuanVideo autoencoder against diffusers': numbers in every tiling, names and shapes, and bytes alive."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo as Oracle
from live_bytes import peak_bytes
from torch import nn

from vramkit.errors import ConfigError
from vramkit.pipelines.hunyuan_video import vae_layers
from vramkit.pipelines.hunyuan_video.vae import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideoConfig

# vae/config.json of hunyuanvideo-community/HunyuanVideo.
PUBLISHED = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "_diffusers_version": "0.32.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
}
TINY = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 24,
    "tile_sample_stride_height": 24,
    "tile_sample_stride_width": 16,
}


def build_pair(**config) -> tuple[AutoencoderKLHunyuanVideo, Oracle]:
    """Ours and the oracle's, tiny, with the same random weights."""
    config = TINY | config
    torch.manual_seed(0)
    oracle = Oracle(**config).eval()
    for parameter in oracle.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.1)
    ours = AutoencoderKLHunyuanVideo.from_config(config).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def encoded(vae, x):
    return vae.encode(x).latent_dist.parameters


@pytest.fixture(scope="module")
def pair():
    return build_pair()


@pytest.fixture
def tiled_pair():
    pair = build_pair()
    for vae in pair:
        vae.enable_tiling(**TILES)
    return pair


def test_published_config_has_the_oracles_names_and_shapes():
    with torch.device("meta"):
        ours, oracle = AutoencoderKLHunyuanVideo.from_config(PUBLISHED), Oracle.from_config(PUBLISHED)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in oracle.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 246_478_803


def test_config_has_the_oracles_keys_and_defaults():
    oracle = {key: value for key, value in Oracle.from_config({}).config.items() if not key.startswith("_")}
    assert asdict(AutoencoderKLHunyuanVideoConfig()) == oracle


# Up to four latent frames whole; above that in tiles of frames: with a full last tile, a short one, one of no new frame.
@pytest.mark.parametrize("latent_frames", [1, 2, 4, 5, 6, 7, 9])
def test_decode_equals_the_oracle(pair, latent_frames):
    ours, oracle = pair
    z = random(1, 4, latent_frames, 4, 5)
    result, expected = ours.decode(z).sample, oracle.decode(z).sample
    assert result.shape == (1, 3, 1 + 4 * (latent_frames - 1), 32, 40)
    assert relative_error(result, expected) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 8, 16, 17, 18, 25, 29])
def test_encode_equals_the_oracle(pair, frames):
    ours, oracle = pair
    x = random(1, 3, frames, 32, 40)
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
    ours, oracle = build_pair(**config)
    x, z = random(1, 3, 9, 24, 32), random(1, 4, 3, 3, 4)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("pixels", [1, 3 * 32 * 32])
def test_convolutions_in_parts_of_the_frames_give_the_same_numbers(pair, monkeypatch, pixels):
    ours, _ = pair
    x, z = random(1, 3, 9, 32, 32), random(1, 4, 3, 4, 4)
    expected = encoded(ours, x), ours.decode(z).sample
    monkeypatch.setattr(vae_layers, "_PART_PIXELS", pixels)
    assert relative_error(encoded(ours, x), expected[0]) <= 1e-5
    assert relative_error(ours.decode(z).sample, expected[1]) <= 1e-5


@pytest.mark.parametrize(("latent_frames", "rows", "columns"), [(1, 7, 5), (6, 4, 4), (7, 5, 2), (2, 4, 3)])
def test_tiled_decode_equals_the_oracle(tiled_pair, latent_frames, rows, columns):
    ours, oracle = tiled_pair
    z = random(1, 4, latent_frames, rows, columns)
    result = ours.decode(z).sample
    assert relative_error(result, oracle.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    tiled = max(rows, columns) > 4 or columns > 3
    assert (relative_error(result, ours.decode(z).sample) > 1e-4) == tiled


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 56, 40), (21, 40, 24), (30, 32, 48)])
def test_tiled_encode_equals_the_oracle(tiled_pair, frames, height, width):
    ours, oracle = tiled_pair
    x = random(1, 3, frames, height, width)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5


def test_tiles_of_frames_are_chosen_and_turned_off_as_in_the_oracle():
    ours, oracle = build_pair()
    z, x = random(1, 4, 7, 3, 3), random(1, 3, 25, 24, 24)
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
    ours, oracle = build_pair(layers_per_block=1, block_out_channels=[4, 4, 4, 4])
    z = random(1, 4, 1, 34, 3)
    whole = ours.decode(z).sample
    ours.enable_tiling()
    oracle.enable_tiling()
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5
    assert not torch.equal(ours.decode(z).sample, whole)


def test_slices_of_a_batch_equal_the_oracle(pair):
    ours, oracle = pair
    x, z = random(2, 3, 5, 24, 16), random(2, 4, 6, 3, 2)
    together = encoded(ours, x), ours.decode(z).sample
    ours.enable_slicing()
    try:
        apart = encoded(ours, x), ours.decode(z).sample
        singly = torch.cat([ours.decode(item).sample for item in z.split(1)])
    finally:
        ours.disable_slicing()
    for result in (together, apart):
        assert relative_error(result[0], encoded(oracle, x)) <= 1e-5
        assert relative_error(result[1], oracle.decode(z).sample) <= 1e-5
    assert torch.equal(apart[1], singly)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_to_float32_as_the_oracle(dtype):
    ours, oracle = build_pair()
    x, z = random(1, 3, 5, 32, 24), random(1, 4, 2, 4, 3)
    exact = oracle.encode(x).latent_dist.mean, oracle.decode(z).sample
    ours, oracle = ours.to(dtype), oracle.to(dtype)
    result = ours.encode(x.to(dtype)).latent_dist.mean, ours.decode(z.to(dtype)).sample
    expected = oracle.encode(x.to(dtype)).latent_dist.mean, oracle.decode(z.to(dtype)).sample
    for a, b, c in zip(result, expected, exact, strict=True):
        assert a.dtype == dtype
        assert (a - c).norm() <= 1.25 * (b - c).norm()  # which roundings add up is chance


def test_channels_last_weights_give_the_same_numbers():
    ours, oracle = build_pair()
    for parameter in ours.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    x, z = random(2, 3, 5, 32, 24), random(2, 4, 3, 4, 3)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


def test_forward_encodes_and_decodes_as_the_oracle(pair):
    ours, oracle = pair
    x = random(1, 3, 5, 16, 24)
    assert relative_error(ours(x).sample, oracle(x).sample) <= 1e-5
    sampled = [vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample for vae in pair]
    assert relative_error(*sampled) <= 1e-5


def test_inputs_are_left_alone_and_results_are_named_tuples(pair):
    ours, _ = pair
    z, x = random(1, 4, 6, 4, 4), random(1, 3, 5, 32, 32)
    copies = z.clone(), x.clone()
    (sample,) = ours.decode(z, return_dict=False)
    assert torch.equal(sample, ours.decode(z).sample)
    assert torch.equal(ours.encode(x, return_dict=False)[0].parameters, encoded(ours, x))
    assert torch.equal(z, copies[0])
    assert torch.equal(x, copies[1])


def test_every_weight_is_read_by_its_own_module():
    """Streaming replaces parameters around a module's forward: weights taken away elsewhere must not be missed."""
    ours, _ = build_pair()
    z, x = random(1, 4, 2, 3, 3), random(1, 3, 5, 24, 24)
    expected = ours.decode(z).sample, encoded(ours, x)
    for module in ours.modules():
        if isinstance(module, nn.Conv3d | nn.Linear | nn.GroupNorm):
            weight, empty = module.weight, nn.Parameter(torch.empty(0), requires_grad=False)
            module.weight = empty

            def fetch(module, args, weight=weight):
                module.weight = weight

            def drop(module, args, result, empty=empty):
                module.weight = empty

            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(drop)
    assert torch.equal(ours.decode(z).sample, expected[0])
    assert torch.equal(encoded(ours, x), expected[1])


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(offload_type):
    ours, _ = build_pair()
    z = random(1, 4, 6, 4, 3)
    expected = ours.decode(z).sample
    offload = ours.enable_group_offload("cpu", offload_type=offload_type)
    assert torch.equal(ours.decode(z).sample, expected)
    offload.remove()


def test_no_gradients_are_recorded():
    ours, _ = build_pair()
    ours.requires_grad_(True)
    assert not ours.decode(random(1, 4, 2, 2, 2)).sample.requires_grad
    assert not encoded(ours, random(1, 3, 1, 16, 16)).requires_grad


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
        AutoencoderKLHunyuanVideo.from_config(TINY | config)


def test_inputs_of_another_shape_are_refused(pair):
    ours, _ = pair
    with pytest.raises(ConfigError, match=r"z has shape \[4, 3, 2, 2\]; \[batch, 4, frames"):
        ours.decode(random(4, 3, 2, 2))
    with pytest.raises(ConfigError, match="one frame"):
        ours.decode(random(1, 4, 0, 2, 2))
    with pytest.raises(ConfigError, match="20 x 16 pixels; multiples of 8"):
        ours.encode(random(1, 3, 1, 20, 16))


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
            model, x = vae.from_config(PUBLISHED).eval(), torch.empty(shape)
        peaks.append(peak_bytes(partial(getattr(model, method), x), [x, *model.parameters()]))
    assert peaks[0] <= limit * peaks[1]


def test_a_long_large_clip_needs_the_result_and_one_tile():
    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo.from_config(PUBLISHED).bfloat16().eval()
        tile, clip = (torch.empty(1, 16, *size, dtype=torch.bfloat16) for size in ((5, 32, 32), (9, 48, 48)))
    model.enable_tiling()
    frames_bytes, edges_bytes = 33 * 384 * 384 * 3 * 2, 4 * 64 * 256 * 17 * 3 * 2
    tile_bytes = peak_bytes(partial(model.decode, tile), [tile, *model.parameters()])
    clip_bytes = peak_bytes(partial(model.decode, clip), [clip, *model.parameters()])
    assert clip_bytes <= frames_bytes + tile_bytes + edges_bytes
    # The input of the first layers of full size (256 channels), its result, and two parts of the frames.
    assert tile_bytes <= (17 * 384 + 4 * 256 + 4 * 256) * 256 * 256 * 2
