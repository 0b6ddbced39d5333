"""The LTX-Video autoencoders against diffusers': numbers of each version and tiling, names and shapes, bytes alive."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo as Oracle
from live_bytes import peak_bytes
from torch import nn

from vramkit.errors import ConfigError
from vramkit.pipelines.ltx import vae_layers
from vramkit.pipelines.ltx.vae import AutoencoderKLLTXVideo
from vramkit.pipelines.ltx.vae_config import AutoencoderKLLTXVideoConfig

# vae/config.json of Lightricks/LTX-Video where it differs from the defaults, by version.
NOISY = {
    "decoder_block_out_channels": [256, 512, 1024],
    "decoder_spatio_temporal_scaling": [True] * 3,
    "decoder_layers_per_block": [5, 6, 7, 8],
    "decoder_inject_noise": [True, True, True, False],
    "upsample_residual": [True] * 3,
    "upsample_factor": [2] * 3,
    "timestep_conditioning": True,
}
FOLDED = NOISY | {
    "block_out_channels": [128, 256, 512, 1024, 2048],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": [True] * 4,
    "decoder_inject_noise": [False] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
PUBLISHED = {"0.9.0": {}, "0.9.1": NOISY, "0.9.5": FOLDED}
PARAMETERS = {"0.9.0": 419_193_649, "0.9.1": 934_976_434, "0.9.5": 1_246_913_522}

TINY = {
    "0.9.0": {
        "block_out_channels": [4, 8, 8, 12],
        "decoder_block_out_channels": [4, 8, 8, 12],
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 5,
    },
    "0.9.1": {
        "block_out_channels": [4, 4, 8, 8],
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1, 2, 1, 1],
    },
    "0.9.5": {
        "block_out_channels": [4, 8, 16, 32, 16],
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1, 2, 1, 1],
    },
}
TINY = {version: PUBLISHED[version] | sizes | {"latent_channels": 4} for version, sizes in TINY.items()}
VERSIONS = list(TINY)
TILES = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 96,
    "tile_sample_stride_height": 32,
    "tile_sample_stride_width": 64,
}


def build_pair(version: str = "0.9.0", **config) -> tuple[AutoencoderKLLTXVideo, Oracle]:
    """Ours and the oracle's, tiny, with the same random weights."""
    config = TINY[version] | config
    torch.manual_seed(0)
    oracle = Oracle(**config).eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if name != "decoder.timestep_scale_multiplier":
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = AutoencoderKLLTXVideo.from_config(config).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def encoded(vae, x):
    return vae.encode(x).latent_dist.parameters


def decoded(vae, z, timestep=0.05):
    """The decoder of 0.9.1 draws from the global generator."""
    torch.manual_seed(2)
    needs_one = vae.config.timestep_conditioning
    return vae.decode(z, torch.full((z.shape[0],), timestep, dtype=z.dtype) if needs_one else None).sample


@pytest.fixture(scope="module")
def pairs():
    return {version: build_pair(version) for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_published_configs_have_the_oracles_names_and_shapes(version):
    with torch.device("meta"):
        ours = AutoencoderKLLTXVideo.from_config(PUBLISHED[version])
        oracle = Oracle.from_config(PUBLISHED[version])
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in oracle.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[version]
    assert (ours.spatial_compression_ratio, ours.temporal_compression_ratio) == (32, 8)


def test_config_has_the_oracles_keys_and_defaults():
    oracle = {key: value for key, value in Oracle.from_config({}).config.items() if not key.startswith("_")}
    assert asdict(AutoencoderKLLTXVideoConfig()) == oracle


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_decode_equals_the_oracle(pairs, version, latent_frames):
    ours, oracle = pairs[version]
    z = random(1, 4, latent_frames, 2, 3)
    result = decoded(ours, z)
    assert result.shape == (1, 3, 1 + 8 * (latent_frames - 1), 64, 96)
    assert relative_error(result, decoded(oracle, z)) <= 1e-5


@pytest.mark.parametrize("frames", [1, 9, 25])
@pytest.mark.parametrize("version", VERSIONS)
def test_encode_equals_the_oracle(pairs, version, frames):
    ours, oracle = pairs[version]
    x = random(1, 3, frames, 64, 96)
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
    x, z = random(1, 3, 17, 64, 64), random(1, 4, 3, 2, 2)
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert relative_error(decoded(ours, z), decoded(oracle, z)) <= 1e-5


def test_the_timestep_changes_what_is_decoded(pairs):
    ours, oracle = pairs["0.9.5"]
    z, timesteps = random(2, 4, 2, 2, 2), torch.tensor([0.0, 0.3])
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
    x, z = random(1, 3, 17, 64, 64), random(1, 4, 3, 2, 2)
    expected = encoded(ours, x), decoded(ours, z)
    for numbers in (1, 5 * 4 * 16 * 16):
        monkeypatch.setattr(vae_layers, "_PART_NUMBERS", numbers)
        assert relative_error(encoded(ours, x), expected[0]) <= 1e-5
        assert relative_error(decoded(ours, z), expected[1]) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("in_space", "in_time", "size"),
    [(True, False, (2, 3, 4)), (False, True, (6, 2, 2)), (True, True, (4, 2, 4)), (True, True, (2, 2, 3))],
)
def test_tiles_equal_the_oracles(version, in_space, in_time, size):
    ours, oracle = build_pair(version)
    z, x = random(1, 4, *size), random(1, 3, 1 + 8 * (size[0] - 1), *(32 * side for side in size[1:]))
    whole = decoded(ours, z)
    for vae in (ours, oracle):
        vae.enable_tiling(**TILES)
        vae.use_tiling, vae.use_framewise_decoding = in_space, in_time
    assert relative_error(decoded(ours, z), decoded(oracle, z)) <= 1e-5
    assert relative_error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert (relative_error(decoded(ours, z), whole) > 1e-4) == (size != (2, 2, 3))


def test_tiles_keep_the_oracles_default_sizes():
    ours, oracle = build_pair(layers_per_block=[0] * 5, decoder_layers_per_block=[0] * 5)
    z, x = random(1, 4, 4, 17, 1), random(1, 3, 25, 32, 32)
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


def test_slices_of_a_batch_give_the_same_numbers(pairs):
    ours, _ = pairs["0.9.5"]
    x, z, timesteps = random(2, 3, 9, 32, 64), random(2, 4, 2, 1, 2), torch.tensor([0.1, 0.4])
    together = encoded(ours, x), ours.decode(z, timesteps).sample
    ours.enable_slicing()
    try:
        apart = encoded(ours, x), ours.decode(z, timesteps).sample
    finally:
        ours.disable_slicing()
    singly = [ours.decode(item, one).sample for item, one in zip(z.split(1), timesteps.split(1), strict=True)]
    assert torch.equal(apart[1], torch.cat(singly))
    for a, b in zip(apart, together, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])  # the noise of 0.9.1 is another in another dtype
def test_bfloat16_is_as_near_to_float32_as_the_oracle(version):
    ours, oracle = build_pair(version)
    x, z = random(1, 3, 9, 64, 32), random(1, 4, 2, 2, 3)
    exact = encoded(oracle, x), decoded(oracle, z)
    ours, oracle, x, z = ours.bfloat16(), oracle.bfloat16(), x.bfloat16(), z.bfloat16()
    for a, b, c in zip(
        (encoded(ours, x), decoded(ours, z)), (encoded(oracle, x), decoded(oracle, z)), exact, strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert (a - c).norm() <= 1.25 * (b - c).norm()  # which roundings add up is chance


def test_forward_encodes_and_decodes_as_the_oracle(pairs):
    pair = pairs["0.9.5"]
    x, timestep = random(1, 3, 9, 32, 64), torch.tensor([0.1])
    assert relative_error(*(vae(x, timestep).sample for vae in pair)) <= 1e-5
    sampled = [vae(x, timestep, True, generator=torch.Generator().manual_seed(3)).sample for vae in pair]
    assert relative_error(*sampled) <= 1e-5


def test_inputs_are_left_alone_and_results_are_named_tuples(pairs):
    ours, _ = pairs["0.9.0"]
    z, x = random(1, 4, 2, 2, 2), random(1, 3, 9, 32, 32)
    copies = z.clone(), x.clone()
    (sample,) = ours.decode(z, return_dict=False)
    assert torch.equal(sample, ours.decode(z).sample)
    assert torch.equal(ours.encode(x, return_dict=False)[0].parameters, encoded(ours, x))
    assert torch.equal(z, copies[0])
    assert torch.equal(x, copies[1])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(version, offload_type):
    ours, _ = build_pair(version)
    z, x = random(1, 4, 2, 2, 3), random(1, 3, 9, 32, 64)
    expected = decoded(ours, z), encoded(ours, x)
    offload = ours.enable_group_offload("cpu", offload_type=offload_type)
    assert torch.equal(decoded(ours, z), expected[0])
    assert torch.equal(encoded(ours, x), expected[1])
    offload.remove()


def test_weights_taken_away_between_forwards_are_not_missed():
    """Streaming replaces parameters around a module's forward: each has to be read by the module that owns it."""
    ours, _ = build_pair("0.9.1")
    z = random(1, 4, 2, 2, 2)
    expected = decoded(ours, z)
    for module in ours.modules():
        own = dict(module.named_parameters(recurse=False))

        def fetch(module, args, own=own):
            for name, parameter in own.items():
                setattr(module, name, parameter)

        def drop(module, args, result, own=own):
            for name in own:
                setattr(module, name, nn.Parameter(torch.empty(0)))

        drop(module, (), None)
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)
    assert torch.equal(decoded(ours, z), expected)


def test_no_gradients_are_recorded(pairs):
    ours, _ = build_pair()
    ours.requires_grad_(True)
    assert not decoded(ours, random(1, 4, 2, 1, 1)).requires_grad
    assert not encoded(ours, random(1, 3, 1, 32, 32)).requires_grad


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
        AutoencoderKLLTXVideo.from_config(TINY[version] | config)


def test_inputs_of_another_shape_are_refused(pairs):
    ours, _ = pairs["0.9.0"]
    with pytest.raises(ConfigError, match=r"z has shape \[4, 3, 2, 2\]; \[batch, 4, frames"):
        ours.decode(random(4, 3, 2, 2))
    with pytest.raises(ConfigError, match="one frame"):
        ours.decode(random(1, 4, 0, 2, 2))
    with pytest.raises(ConfigError, match=r"1 frames of 48 x 32 pixels; 8 \* k \+ 1 frames and multiples of 32"):
        ours.encode(random(1, 3, 1, 48, 32))
    with pytest.raises(ConfigError, match="8 frames"):
        ours.encode(random(1, 3, 8, 32, 32))


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
            vae.from_config(PUBLISHED[version]).bfloat16().eval() for vae in (AutoencoderKLLTXVideo, Oracle)
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
        model = AutoencoderKLLTXVideo.from_config(PUBLISHED["0.9.5"]).bfloat16().eval()
        clip, tile = (torch.empty(1, 128, *size, dtype=torch.bfloat16) for size in ((5, 16, 18), (3, 16, 16)))
        model.enable_tiling()
        model.use_framewise_decoding = True
        result_bytes, edges_bytes = 3 * 33 * 512 * 576 * 2, 3 * 17 * 4 * 64 * 512 * 2
        assert peak(model, "decode", clip) <= result_bytes + edges_bytes + peak(model, "decode", tile)
