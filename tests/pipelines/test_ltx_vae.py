"""The LTX-Video autoencoders against diffusers': numbers of each version and tiling, names and shapes, bytes alive."""

from __future__ import annotations

import autoencoders
import pytest
import torch
from autoencoders import AUTOENCODERS, decoded, encoded
from diffusers import AutoencoderKLLTXVideo as Oracle
from families import normal, relative_error
from live_bytes import peak_bytes

from vramkit.errors import ConfigError
from vramkit.pipelines.ltx import vae_convolution
from vramkit.pipelines.ltx.vae import AutoencoderKLLTXVideo

VERSIONS = ["0.9.0", "0.9.1", "0.9.5"]
TILES = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 96,
    "tile_sample_stride_height": 32,
    "tile_sample_stride_width": 64,
}


def build_pair(version="0.9.0", **config):
    return autoencoders.build_pair(f"LTX-Video {version}", **config)


def published(version):
    return AUTOENCODERS[f"LTX-Video {version}"].published


@pytest.fixture(scope="module")
def pairs():
    return {version: build_pair(version) for version in VERSIONS}


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_decode_equals_the_oracle(pairs, version, latent_frames):
    ours, oracle = pairs[version]
    z = normal(1, 4, latent_frames, 2, 3)
    result = decoded(ours, z)
    assert result.shape == (1, 3, 1 + 8 * (latent_frames - 1), 64, 96)
    assert relative_error(result, decoded(oracle, z)) <= 1e-5


@pytest.mark.parametrize("frames", [1, 9, 25])
@pytest.mark.parametrize("version", VERSIONS)
def test_encode_equals_the_oracle(pairs, version, frames):
    ours, oracle = pairs[version]
    x = normal(1, 3, frames, 64, 96)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist
    assert result.mean.shape == (1, 4, 1 + frames // 8, 2, 3)
    assert relative_error(result.mean, expected.mean) <= 1e-5
    assert relative_error(result.logvar, expected.logvar) <= 1e-5


@pytest.mark.parametrize(
    ("version", "config"),
    [
        ("0.9.0", {"encoder_causal": False, "decoder_causal": True}),
        ("0.9.1", {"encoder_causal": False, "decoder_causal": True, "upsample_residual": [False, True, False]}),
        ("0.9.5", {"encoder_causal": False, "decoder_causal": True, "resnet_norm_eps": 1e-3}),
        ("0.9.0", {"resnet_norm_eps": 1e-2, "patch_size": 2, "decoder_inject_noise": [False] * 4 + [True]}),
        ("0.9.5", {"downsample_type": ["conv", "temporal", "spatial", "spatiotemporal"], "temporal_compression_ratio": 8,
                   "block_out_channels": [4, 4, 8, 16, 16]}),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_equals_the_oracle(version, config):
    if config.get("patch_size") == 2:
        config = config | {"spatial_compression_ratio": 16}
    ours, oracle = build_pair(version, **config)
    x, z = normal(1, 3, 17, 64, 64), normal(1, 4, 3, 2, 2)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(decoded(ours, z), decoded(oracle, z)) <= 1e-5


def test_the_timestep_changes_what_is_decoded(pairs):
    ours, oracle = pairs["0.9.5"]
    z, timesteps = normal(2, 4, 2, 2, 2), torch.tensor([0.0, 0.3])
    result = ours.decode(z, timesteps).sample
    assert relative_error(result, oracle.decode(z, timesteps).sample) <= 1e-5
    assert relative_error(ours.decode(z, torch.tensor([0.0])).sample[0], result[0]) <= 1e-5
    assert relative_error(ours.decode(z, torch.tensor([0.0])).sample[1], result[1]) > 1e-3
    with pytest.raises(ConfigError, match="pass temb"):
        ours.decode(z)
    with pytest.raises(ConfigError, match=r"temb has shape \[3\]; one timestep was expected, or 2"):
        ours.decode(z, torch.zeros(3))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_convolutions_in_parts_of_the_frames_give_the_same_numbers(monkeypatch, version, causal):
    ours, _ = build_pair(version, encoder_causal=not causal, decoder_causal=causal)
    x, z = normal(1, 3, 17, 64, 64), normal(1, 4, 3, 2, 2)
    expected = encoded(ours, x), decoded(ours, z)
    for numbers in (1, 5 * 4 * 16 * 16):
        monkeypatch.setattr(vae_convolution, "_PART_NUMBERS", numbers)
        assert relative_error(encoded(ours, x), expected[0]) <= 1e-5
        assert relative_error(decoded(ours, z), expected[1]) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("in_space", "in_time", "size"),
    [(True, False, (2, 3, 4)), (False, True, (6, 2, 2)), (True, True, (4, 2, 4)), (True, True, (2, 2, 3))],
)
def test_tiles_equal_the_oracles(version, in_space, in_time, size):
    ours, oracle = build_pair(version)
    z, x = normal(1, 4, *size), normal(1, 3, 1 + 8 * (size[0] - 1), *(32 * side for side in size[1:]))
    whole = decoded(ours, z)
    for vae in (ours, oracle):
        vae.enable_tiling(**TILES)
        vae.use_tiling, vae.use_framewise_decoding = in_space, in_time
    assert relative_error(decoded(ours, z), decoded(oracle, z)) <= 1e-5
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert (relative_error(decoded(ours, z), whole) > 1e-4) == (size != (2, 2, 3))


def test_tiles_keep_the_oracles_default_sizes():
    ours, oracle = build_pair(layers_per_block=[0] * 5, decoder_layers_per_block=[0] * 5)
    z, x = normal(1, 4, 4, 17, 1), normal(1, 3, 25, 32, 32)
    for vae in (ours, oracle):
        vae.enable_tiling()
        vae.use_framewise_decoding = True
    tiled = decoded(ours, z)
    assert relative_error(tiled, decoded(oracle, z)) <= 1e-5
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    ours.use_framewise_decoding, ours.use_framewise_encoding = False, True
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    ours.disable_tiling()
    assert relative_error(decoded(ours, z), tiled) > 1e-4


@pytest.mark.parametrize(
    ("version", "config", "message"),
    [
        ("0.9.0", {"patch_size_t": 2}, "patch_size_t=2; 1 was expected"),
        ("0.9.0", {"down_block_types": ["DownBlock3D"] * 4}, "down_block_types"),
        ("0.9.0", {"upsample_factor": [1, 1]}, r"upsample_factor=\[1, 1\]; 4 entries"),
        ("0.9.0", {"block_out_channels": []}, "is empty; one width"),
        ("0.9.5", {"downsample_type": ["spatial", "time", "conv", "conv"]}, r"downsample_type has \['time'\]"),
        ("0.9.5", {"downsample_type": ["conv"] * 4}, "Block 0 of the encoder has to make 8 channels of 4"),
        (
            "0.9.0",
            {"temporal_compression_ratio": 4},
            r"come to \(4, 32\), but the blocks of the encoder make \(8, 32\)",
        ),
        ("0.9.0", {"decoder_spatio_temporal_scaling": [True] * 4}, r"blocks of the decoder make \(16, 64\)"),
        ("0.9.0", {"upsample_factor": [1, 1, 2, 2]}, "needs decoder_spatio_temporal_scaling"),
        ("0.9.1", {"decoder_block_out_channels": [4, 8, 16]}, "has 4 channels; a multiple of 8"),
        ("0.9.0", {"timestep_conditioning": True}, "cannot be combined with timestep_conditioning"),
    ],
)
def test_options_that_contradict_each_other_are_refused(version, config, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLLTXVideo.from_config(AUTOENCODERS[f"LTX-Video {version}"].tiny | config)


def test_sizes_between_latents_are_refused(pairs):
    ours, _ = pairs["0.9.0"]
    with pytest.raises(ConfigError, match=r"1 frames of 48 x 32 pixels; 8 \* k \+ 1 frames and multiples of 32"):
        ours.encode(normal(1, 3, 1, 48, 32))
    with pytest.raises(ConfigError, match="8 frames"):
        ours.encode(normal(1, 3, 8, 32, 32))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tile_sample_min_height": 100, "tile_sample_stride_height": 96}, "height 100 is no multiple of 32"),
        ({"tile_sample_stride_num_frames": 24}, "16 frames at a distance of 24"),
        ({"tile_sample_min_num_frames": 12}, "frames 12 is no multiple of 8"),
    ],
)
def test_impossible_tiles_are_refused_and_change_nothing(pairs, sizes, message):
    ours, _ = pairs["0.9.0"]
    with pytest.raises(ConfigError, match=message):
        ours.enable_tiling(**sizes)
    assert not ours.use_tiling
    assert (ours.tiling.height, ours.frame_tiling.frames, ours.frame_tiling.stride) == (512, 16, 8)


def peak(vae, method: str, x: torch.Tensor) -> int:
    timestep = (x.new_empty(1),) if method == "decode" else ()
    return peak_bytes(lambda: getattr(vae, method)(x, *timestep), [x, *vae.parameters()])


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
def test_fewer_bytes_are_alive_than_in_the_oracle(version):
    with torch.device("meta"):
        z = torch.empty(1, 128, 7, 16, 24, dtype=torch.bfloat16)
        x = torch.empty(1, 3, 49, 512, 768, dtype=torch.bfloat16)
        ours, oracle = (
            vae.from_config(published(version)).bfloat16().eval() for vae in (AutoencoderKLLTXVideo, Oracle)
        )
        decode, encode = peak(ours, "decode", z), peak(ours, "encode", x)
        assert decode <= 0.34 * peak(oracle, "decode", z)
        assert encode <= 0.27 * peak(oracle, "encode", x)
    # The widest clip, the one that it is made of, the video, and the parts of a convolution.
    clip, video, part = 128 * 49 * 128 * 192 * 2, x.numel() * 2, 2 * 2**24
    assert decode <= clip + clip / 4 + video + 3 * part
    assert encode <= clip + video + 4 * part


def test_tiles_of_a_long_clip_need_the_result_and_one_tile():
    with torch.device("meta"):
        model = AutoencoderKLLTXVideo.from_config(published("0.9.5")).bfloat16().eval()
        clip, tile = (torch.empty(1, 128, *size, dtype=torch.bfloat16) for size in ((5, 16, 18), (3, 16, 16)))
        model.enable_tiling()
        model.use_framewise_decoding = True
        result_bytes, edges_bytes = 3 * 33 * 512 * 576 * 2, 3 * 17 * 4 * 64 * 512 * 2
        assert peak(model, "decode", clip) <= result_bytes + edges_bytes + peak(model, "decode", tile)
