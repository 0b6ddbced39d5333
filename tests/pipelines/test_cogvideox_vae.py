"""The CogVideoX autoencoder against diffusers'."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX as Oracle
from live_bytes import peak_bytes
from torch import nn

from vramkit.errors import ConfigError
from vramkit.pipelines.cogvideox import vae_layers
from vramkit.pipelines.cogvideox.vae import AutoencoderKLCogVideoX, AutoencoderKLCogVideoXConfig

TINY: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_height": 96,
    "sample_width": 80,
}


def build_pair(**config: Any) -> tuple[AutoencoderKLCogVideoX, Any]:
    """Ours and the oracle's, tiny, with the same random weights."""
    config = TINY | config
    torch.manual_seed(0)
    oracle = Oracle(**config).eval().requires_grad_(False)
    for parameter in oracle.parameters():
        if parameter.ndim > 1:  # the default initialization is nearly linear
            nn.init.normal_(parameter, std=0.15)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = AutoencoderKLCogVideoX.from_config(config).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(vae: Any, x: torch.Tensor) -> torch.Tensor:
    parameters: torch.Tensor = vae.encode(x).latent_dist.parameters
    return parameters


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLCogVideoX, Any]:
    return build_pair()


@pytest.fixture
def tiled_pair() -> tuple[AutoencoderKLCogVideoX, Any]:
    ours, oracle = build_pair()
    for vae in (ours, oracle):
        vae.enable_tiling()
    return ours, oracle


@pytest.mark.parametrize("published", [{}, {"invert_scale_latents": True, "scaling_factor": 0.7}])
def test_published_config_has_the_oracles_names_and_shapes(published: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, oracle = AutoencoderKLCogVideoX.from_config(published), Oracle.from_config(published)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in oracle.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 215_583_907


def test_config_has_the_oracles_keys_and_defaults() -> None:
    oracle = {key: value for key, value in Oracle.from_config({}).config.items() if not key.startswith("_")}
    assert asdict(AutoencoderKLCogVideoXConfig()) == oracle


def test_keys_of_older_files_are_read_over() -> None:
    with torch.device("meta"):
        config = AutoencoderKLCogVideoX.from_config(TINY | {"sample_size": 256}).config
    assert config == AutoencoderKLCogVideoXConfig(**TINY)
    assert "sample_size" not in asdict(config)


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5])
def test_decode_equals_the_oracle(pair: Any, latent_frames: int) -> None:
    ours, oracle = pair
    z = random(1, 4, latent_frames, 6, 5)
    frames = 4 * latent_frames - 3 * (latent_frames % 2)
    result = ours.decode(z).sample
    assert result.shape == (1, 3, frames, 48, 40)
    assert error(result, oracle.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 9, 12, 17])
def test_encode_equals_the_oracle(pair: Any, frames: int) -> None:
    ours, oracle = pair
    x = random(1, 3, frames, 40, 45)
    assert encoded(ours, x).shape == (1, 8, (frames + 3) // 4, 5, 5)
    assert error(encoded(ours, x), encoded(oracle, x)) <= 1e-5


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
    ours, oracle = build_pair(**config)
    x, z = random(1, 3, 9, 24, 32), random(1, 4, 3, 3, 4)
    assert error(encoded(ours, x), encoded(oracle, x)) <= 1e-5
    assert error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


def test_frames_are_split_where_pictures_are_large(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair
    x, z = random(1, 3, 17, 32, 32), random(1, 4, 5, 4, 4)
    expected = encoded(ours, x), ours.decode(z).sample
    for numel in (1, 3 * 8 * 32 * 32):
        monkeypatch.setattr(vae_layers, "_PART_NUMEL", numel)
        assert error(encoded(ours, x), expected[0]) <= 1e-5
        assert error(ours.decode(z).sample, expected[1]) <= 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(13, 9), (6, 6), (7, 3)])
@pytest.mark.parametrize("latent_frames", [1, 3])
def test_tiled_decode_equals_the_oracle(tiled_pair: Any, rows: int, columns: int, latent_frames: int) -> None:
    ours, oracle = tiled_pair
    z = random(1, 4, latent_frames, rows, columns)
    result = ours.decode(z).sample
    assert error(result, oracle.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    assert error(result, ours.decode(z).sample) > 1e-4  # it was tiled


@pytest.mark.parametrize(("height", "width"), [(104, 72), (64, 44)])
def test_tiled_encode_equals_the_oracle(tiled_pair: Any, height: int, width: int) -> None:
    ours, oracle = tiled_pair
    x = random(1, 3, 9, height, width)
    assert error(encoded(ours, x), encoded(oracle, x)) <= 1e-5


def test_given_tiles_equal_the_oracle_and_are_kept() -> None:
    ours, oracle = build_pair()
    z = random(1, 4, 2, 8, 9)
    for sizes in (
        {"tile_sample_min_height": 32, "tile_sample_min_width": 64, "tile_overlap_factor_height": 0.5}
        | {"tile_overlap_factor_width": 0.25},
        {"tile_overlap_factor_width": 0.5},
    ):
        for vae in (ours, oracle):
            vae.enable_tiling(**sizes)
        assert error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


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


def test_slices_of_a_batch_equal_the_oracle(pair: Any) -> None:
    ours, oracle = pair
    x, z = random(2, 3, 5, 24, 16), random(2, 4, 2, 3, 2)
    together = encoded(ours, x), ours.decode(z).sample
    ours.enable_slicing()
    apart = encoded(ours, x), ours.decode(z).sample
    ours.disable_slicing()
    for result in (together, apart):
        assert error(result[0], encoded(oracle, x)) <= 1e-5
        assert error(result[1], oracle.decode(z).sample) <= 1e-5
    assert torch.equal(apart[1], torch.cat([ours.decode(item).sample for item in z.split(1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_to_float32_as_the_oracle(dtype: torch.dtype) -> None:
    ours, oracle = build_pair()
    x, z = random(1, 3, 9, 32, 24), random(1, 4, 2, 4, 3)
    exact = encoded(oracle, x), oracle.decode(z).sample
    ours, oracle = ours.to(dtype), oracle.to(dtype)
    result = encoded(ours, x.to(dtype)), ours.decode(z.to(dtype)).sample
    expected = encoded(oracle, x.to(dtype)), oracle.decode(z.to(dtype)).sample
    for a, b, c in zip(result, expected, exact, strict=True):
        assert a.dtype == dtype
        assert (a - c).norm() <= 1.25 * (b - c).norm()  # which roundings add up is chance


def test_channels_last_weights_give_the_same_numbers(pair: Any) -> None:
    ours, _ = build_pair()
    for parameter in ours.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    x, z = random(2, 3, 9, 32, 24), random(2, 4, 3, 4, 3)
    assert error(encoded(ours, x), encoded(pair[1], x)) <= 1e-5
    assert error(ours.decode(z).sample, pair[1].decode(z).sample) <= 1e-5


def test_forward_encodes_and_decodes_as_the_oracle(pair: Any) -> None:
    ours, oracle = pair
    x = random(1, 3, 5, 16, 24)
    assert error(ours(x).sample, oracle(x).sample) <= 1e-5
    sampled = [vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample for vae in pair]
    assert error(*sampled) <= 1e-5


def test_results_are_named_tuples_for_either_return_dict(pair: Any) -> None:
    ours, _ = pair
    z = random(1, 4, 1, 2, 2)
    (sample,) = ours.decode(z, return_dict=False)
    assert torch.equal(sample, ours.decode(z).sample)
    assert ours.encode(sample, return_dict=False)[0].mean.shape == z.shape


def test_decoding_twice_gives_the_same_bytes_and_leaves_the_input_alone(pair: Any) -> None:
    ours, _ = pair
    z, x = random(1, 4, 3, 4, 4), random(1, 3, 9, 32, 32)
    copies = z.clone(), x.clone()
    assert torch.equal(ours.decode(z).sample, ours.decode(z).sample)
    assert torch.equal(encoded(ours, x), encoded(ours, x))
    assert torch.equal(z, copies[0])
    assert torch.equal(x, copies[1])


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_decode_leaves_nothing_behind(failure: type[BaseException]) -> None:
    ours, _ = build_pair()
    z = random(1, 4, 5, 4, 4)
    expected = ours.decode(z).sample
    calls: list[None] = []

    def fail_in_the_second_batch(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise failure

    hook = ours.decoder.up_blocks[2].resnets[1].conv2.register_forward_pre_hook(fail_in_the_second_batch)
    with pytest.raises(failure):
        ours.decode(z)
    hook.remove()
    assert torch.equal(ours.decode(z).sample, expected)


def test_two_threads_decode_side_by_side(pair: Any) -> None:
    ours, _ = pair
    inputs = [random(1, 4, 3, 4, 4, seed=seed) for seed in (1, 2)]
    expected = [ours.decode(z).sample for z in inputs]
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait()
        results[index] = ours.decode(inputs[index]).sample

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in (0, 1))


def test_every_weight_is_read_by_its_own_module(pair: Any) -> None:
    """Streaming replaces parameters around a module's forward: weights taken away elsewhere must not be missed."""
    ours, _ = build_pair()
    z, x = random(1, 4, 2, 3, 3), random(1, 3, 9, 24, 24)
    expected = ours.decode(z).sample, encoded(ours, x)
    for module in ours.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.GroupNorm):
            weight, empty = module.weight, nn.Parameter(torch.empty(0), requires_grad=False)
            module.weight = empty

            def fetch(module: Any, args: Any, weight: Any = weight) -> None:
                module.weight = weight

            def drop(module: Any, args: Any, result: Any, empty: Any = empty) -> None:
                module.weight = empty

            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(drop)
    assert torch.equal(ours.decode(z).sample, expected[0])
    assert torch.equal(encoded(ours, x), expected[1])


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(offload_type: str) -> None:
    ours, _ = build_pair()
    z, x = random(1, 4, 3, 4, 3), random(1, 3, 9, 16, 16)
    expected = ours.decode(z).sample, encoded(ours, x)
    offload = ours.enable_group_offload("cpu", offload_type=offload_type)
    assert torch.equal(ours.decode(z).sample, expected[0])
    assert torch.equal(encoded(ours, x), expected[1])
    offload.remove()


def test_no_gradients_are_recorded() -> None:
    ours, _ = build_pair()
    ours.requires_grad_(True)
    assert not ours.decode(random(1, 4, 2, 2, 2)).sample.requires_grad
    assert not encoded(ours, random(1, 3, 1, 16, 16)).requires_grad


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


def test_inputs_of_another_shape_are_refused(pair: Any) -> None:
    ours, _ = pair
    with pytest.raises(ConfigError, match=r"z has shape \[4, 3, 2, 2\]; \[batch, 4, frames"):
        ours.decode(random(4, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"x has shape \[1, 4, 1, 8, 8\]; \[batch, 3, frames"):
        ours.encode(random(1, 4, 1, 8, 8))
    with pytest.raises(ConfigError, match="one frame and one pixel at least"):
        ours.decode(random(1, 4, 0, 2, 2))


@pytest.mark.parametrize(
    ("method", "shape", "tiled", "limit"),
    [
        ("decode", (1, 16, 3, 60, 90), False, 0.55),
        ("decode", (1, 16, 3, 60, 90), True, 0.65),
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


def test_a_published_clip_is_decoded_in_two_gib() -> None:
    """480 x 720 pixels in tiles, bf16: a quarter picture of two layers, and what the convolutions keep of it."""
    with torch.device("meta"):
        vae, z = AutoencoderKLCogVideoX.from_config({}).bfloat16().eval(), torch.empty(1, 16, 5, 60, 90).bfloat16()
    vae.enable_tiling()
    assert peak_bytes(lambda: vae.decode(z)) <= 2 * 2**30
