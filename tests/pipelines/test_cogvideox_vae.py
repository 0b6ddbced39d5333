"""The CogVideoX autoencoder against diffusers'."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from autoencoders import AUTOENCODERS, build_pair, encoded
from diffusers import AutoencoderKLCogVideoX as Oracle
from families import normal, relative_error
from live_bytes import peak_bytes
from torch import nn

from vramkit.errors import ConfigError
from vramkit.pipelines.cogvideox.vae import AutoencoderKLCogVideoX, AutoencoderKLCogVideoXConfig

TINY = AUTOENCODERS["CogVideoX"].tiny


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLCogVideoX, Any]:
    return build_pair("CogVideoX")


@pytest.fixture
def tiled_pair() -> tuple[AutoencoderKLCogVideoX, Any]:
    ours, oracle = build_pair("CogVideoX")
    for vae in (ours, oracle):
        vae.enable_tiling()
    return ours, oracle


def test_keys_of_older_files_are_read_over() -> None:
    with torch.device("meta"):
        config = AutoencoderKLCogVideoX.from_config(TINY | {"sample_size": 256}).config
    assert config == AutoencoderKLCogVideoXConfig(**TINY)
    assert "sample_size" not in asdict(config)


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5])
def test_decode_equals_the_oracle(pair: Any, latent_frames: int) -> None:
    ours, oracle = pair
    z = normal(1, 4, latent_frames, 6, 5)
    frames = 4 * latent_frames - 3 * (latent_frames % 2)
    result = ours.decode(z).sample
    assert result.shape == (1, 3, frames, 48, 40)
    assert relative_error(result, oracle.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 9, 12, 17])
def test_encode_equals_the_oracle(pair: Any, frames: int) -> None:
    ours, oracle = pair
    x = normal(1, 3, frames, 40, 45)
    assert encoded(ours, x).shape == (1, 8, (frames + 3) // 4, 5, 5)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 2, "norm_eps": 1e-2},
        {"temporal_compression_ratio": 2},
        {"temporal_compression_ratio": 8},
        {"block_out_channels": (8, 16, 8), "down_block_types": ["CogVideoXDownBlock3D"] * 3}
        | {"up_block_types": ["CogVideoXUpBlock3D"] * 3},
    ],
)
def test_every_option_equals_the_oracle(config: dict[str, Any]) -> None:
    ours, oracle = build_pair("CogVideoX", **config)
    x, z = normal(1, 3, 9, 24, 32), normal(1, 4, 3, 3, 4)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(13, 9), (6, 6), (7, 3)])
@pytest.mark.parametrize("latent_frames", [1, 3])
def test_tiled_decode_equals_the_oracle(tiled_pair: Any, rows: int, columns: int, latent_frames: int) -> None:
    ours, oracle = tiled_pair
    z = normal(1, 4, latent_frames, rows, columns)
    result = ours.decode(z).sample
    assert relative_error(result, oracle.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    assert relative_error(result, ours.decode(z).sample) > 1e-4  # it was tiled


@pytest.mark.parametrize(("height", "width"), [(104, 72), (64, 44)])
def test_tiled_encode_equals_the_oracle(tiled_pair: Any, height: int, width: int) -> None:
    ours, oracle = tiled_pair
    x = normal(1, 3, 9, height, width)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5


def test_given_tiles_equal_the_oracle_and_are_kept() -> None:
    ours, oracle = build_pair("CogVideoX")
    z = normal(1, 4, 2, 8, 9)
    for sizes in (
        {"tile_sample_min_height": 32, "tile_sample_min_width": 64, "tile_overlap_factor_height": 0.5}
        | {"tile_overlap_factor_width": 0.25},
        {"tile_overlap_factor_width": 0.5},
    ):
        for vae in (ours, oracle):
            vae.enable_tiling(**sizes)
        assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


def test_tiles_of_the_published_config() -> None:
    with torch.device("meta"):
        tiling = AutoencoderKLCogVideoX.from_config({}).tiling
    assert (tiling.height, tiling.width, tiling.stride_height, tiling.stride_width) == (240, 360, 200, 288)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tile_sample_min_height": 100}, "height 100 is no multiple of 8"),
        ({"tile_overlap_factor_width": 0.3}, "stride_width 28 is no multiple of 8"),
        ({"tile_overlap_factor_height": 1.0}, "leave gaps"),
        ({"tile_overlap_factor_height": -0.5}, "leave gaps"),
    ],
)
def test_impossible_tiles_are_refused_and_change_nothing(pair: Any, sizes: dict[str, Any], message: str) -> None:
    ours, _ = pair
    before = ours.tiling
    with pytest.raises(ConfigError, match=message):
        ours.enable_tiling(**sizes)
    assert not ours.use_tiling
    assert ours.tiling == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ["DownBlock3D"] * 4}, "down_block_types"),
        ({"up_block_types": ["CogVideoXUpBlock3D"] * 3}, "each of the 4 levels"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"use_quant_conv": True}, "use_quant_conv=True"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio is 3"),
        ({"temporal_compression_ratio": 16}, "up to 8"),
    ],
)
def test_options_of_other_autoencoders_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLCogVideoX.from_config(TINY | config)


@pytest.mark.parametrize(
    ("method", "shape", "tiled", "limit"),
    [
        ("decode", (1, 16, 3, 60, 90), False, 0.5),
        ("decode", (1, 16, 3, 60, 90), True, 0.6),
        ("encode", (1, 3, 9, 480, 720), False, 0.78),
    ],
)
def test_fewer_bytes_are_alive_than_in_the_oracle(method: str, shape: Any, tiled: bool, limit: float) -> None:
    peaks_bytes = []
    for library in (AutoencoderKLCogVideoX, Oracle):
        with torch.device("meta"):
            vae, x = library.from_config({}).eval(), torch.empty(shape)
        vae, x = nn.Module.to(vae, torch.bfloat16), x.bfloat16()
        if tiled:
            vae.enable_tiling()
        peaks_bytes.append(peak_bytes(lambda vae=vae, x=x: getattr(vae, method)(x)))
    assert peaks_bytes[0] <= limit * peaks_bytes[1]


def test_a_published_clip_is_decoded_in_a_gib_and_a_half() -> None:
    """480 x 720 pixels in tiles, bf16: a quarter picture of two layers, and what the convolutions keep of it."""
    with torch.device("meta"):
        vae, z = AutoencoderKLCogVideoX.from_config({}).bfloat16().eval(), torch.empty(1, 16, 5, 60, 90).bfloat16()
    vae.enable_tiling()
    assert peak_bytes(lambda: vae.decode(z)) <= 1.5 * 2**30
