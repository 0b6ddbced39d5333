from __future__ import annotations

import threading
from dataclasses import asdict
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan as Oracle
from live_bytes import peak_bytes
from torch import nn

from vramkit.errors import ConfigError
from vramkit.pipelines.wan.vae import AutoencoderKLWan, AutoencoderKLWanConfig

PUBLISHED = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(AutoencoderKLWanConfig().latents_mean),
    "latents_std": list(AutoencoderKLWanConfig().latents_std),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}


def build_pair(seed: int = 0, **config) -> tuple[AutoencoderKLWan, Oracle]:
    """Ours and the oracle's, tiny, with the same random weights."""
    config = {"base_dim": 8, "z_dim": 4, **config}
    torch.manual_seed(seed)
    oracle = Oracle(**config).eval()
    for parameter in oracle.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1 and parameter.shape[0] > 1:  # the default initialization is nearly linear
            nn.init.normal_(parameter, std=0.15)
    ours = AutoencoderKLWan.from_config(config).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def pair():
    return build_pair()


@pytest.fixture
def tiled_pair():
    ours, oracle = build_pair()
    sizes = {
        "tile_sample_min_height": 32,
        "tile_sample_min_width": 24,
        "tile_sample_stride_height": 24,
        "tile_sample_stride_width": 16,
    }
    ours.enable_tiling(**sizes)
    oracle.enable_tiling(**sizes)
    return ours, oracle


def test_published_config_has_the_oracles_names_and_shapes():
    with torch.device("meta"):
        ours, oracle = AutoencoderKLWan.from_config(PUBLISHED), Oracle.from_config(PUBLISHED)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in oracle.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 126_892_531


def test_config_has_the_oracles_keys_and_defaults():
    oracle = {key: value for key, value in Oracle.from_config({}).config.items() if not key.startswith("_")}
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in oracle.items()}
    ours = asdict(AutoencoderKLWanConfig())
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()} == lists


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5])
def test_decode_equals_the_oracle(pair, latent_frames):
    ours, oracle = pair
    z = random(1, 4, latent_frames, 6, 5)
    result, expected = ours.decode(z).sample, oracle.decode(z).sample
    assert result.shape == (1, 3, 1 + 4 * (latent_frames - 1), 48, 40)
    assert expected.abs().lt(1).float().mean() > 0.5  # not all of it is clamped
    assert relative_error(result, expected) <= 1e-5


@pytest.mark.parametrize("frames", [1, 3, 5, 8, 9, 17])
def test_encode_equals_the_oracle(pair, frames):
    ours, oracle = pair
    x = random(1, 3, frames, 40, 48)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist
    assert result.mean.shape == (1, 4, 1 + (frames - 1) // 4, 5, 6)
    assert relative_error(result.mean, expected.mean) <= 1e-5
    assert relative_error(result.logvar, expected.logvar) <= 1e-5


def test_sizes_that_are_no_multiples_of_eight_encode_as_in_the_oracle(pair):
    ours, oracle = pair
    x = random(1, 3, 5, 45, 34)
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
    ours, oracle = build_pair(**config)
    x, z = random(1, 3, 9, 24, 32), random(1, 4, 3, 3, 4)
    assert relative_error(ours.encode(x).latent_dist.parameters, oracle.encode(x).latent_dist.parameters) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


def test_frames_are_split_where_pictures_are_large(pair, monkeypatch):
    ours, _ = pair
    x, z = random(1, 3, 9, 32, 32), random(1, 4, 3, 4, 4)
    encoded, decoded = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    for pixels in (1, 2 * 32 * 32):
        monkeypatch.setattr("vramkit.pipelines.wan.vae._PART_PIXELS", pixels)
        assert relative_error(ours.encode(x).latent_dist.parameters, encoded) <= 1e-5
        assert relative_error(ours.decode(z).sample, decoded) <= 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (4, 4), (5, 2)])
@pytest.mark.parametrize("latent_frames", [1, 2])
def test_tiled_decode_equals_the_oracle(tiled_pair, rows, columns, latent_frames):
    ours, oracle = tiled_pair
    z = random(1, 4, latent_frames, rows, columns)
    whole = build_pair()[0].decode(z).sample
    result, expected = ours.decode(z).sample, oracle.decode(z).sample
    assert relative_error(result, expected) <= 1e-5
    assert relative_error(result, whole) > 1e-4  # it was tiled


@pytest.mark.parametrize(("height", "width"), [(56, 40), (44, 26), (32, 43)])
def test_tiled_encode_equals_the_oracle(tiled_pair, height, width):
    ours, oracle = tiled_pair
    x = random(1, 3, 5, height, width)
    result, expected = ours.encode(x).latent_dist, oracle.encode(x).latent_dist
    assert relative_error(result.parameters, expected.parameters) <= 1e-5


def test_tiling_keeps_the_oracles_defaults_and_is_turned_off():
    ours, oracle = build_pair()
    z = random(1, 4, 1, 34, 3)
    whole = ours.decode(z).sample
    ours.enable_tiling()
    oracle.enable_tiling()
    tiled = ours.decode(z).sample
    assert relative_error(tiled, oracle.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    assert torch.equal(ours.decode(z).sample, whole)
    assert not torch.equal(tiled, whole)


def test_slices_of_a_batch_equal_the_oracle(pair):
    ours, oracle = pair
    x, z = random(2, 3, 5, 24, 16), random(2, 4, 2, 3, 2)
    together = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    ours.enable_slicing()
    try:
        apart = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
        singly = torch.cat([ours.decode(item).sample for item in z.split(1)])
    finally:
        ours.disable_slicing()
    for result in (together, apart):
        assert relative_error(result[0], oracle.encode(x).latent_dist.parameters) <= 1e-5
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
        assert relative_error(a, c) <= 1.25 * relative_error(b, c)  # which roundings add up is chance


def test_channels_last_weights_give_the_same_numbers(pair):
    ours, oracle = build_pair()
    for parameter in ours.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    x, z = random(2, 3, 5, 32, 24), random(2, 4, 3, 4, 3)
    assert relative_error(ours.encode(x).latent_dist.mean, oracle.encode(x).latent_dist.mean) <= 1e-5
    assert relative_error(ours.decode(z).sample, oracle.decode(z).sample) <= 1e-5


def test_samples_equal_the_oracles(pair):
    ours, oracle = pair
    x = random(2, 3, 5, 16, 16)
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


def test_forward_encodes_and_decodes_as_the_oracle(pair):
    ours, oracle = pair
    x = random(1, 3, 5, 16, 24)
    assert relative_error(ours(x).sample, oracle(x).sample) <= 1e-5
    sampled = [vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample for vae in pair]
    assert relative_error(*sampled) <= 1e-5


def test_results_are_named_tuples_for_either_return_dict(pair):
    ours, _ = pair
    z = random(1, 4, 1, 2, 2)
    (sample,) = ours.decode(z, return_dict=False)
    assert torch.equal(sample, ours.decode(z)[0])
    assert torch.equal(sample, ours.decode(z).sample)
    assert ours.encode(sample, return_dict=False)[0].mean.shape == z.shape


def test_decoding_twice_gives_the_same_bytes_and_leaves_the_input_alone(pair):
    ours, _ = pair
    z, x = random(1, 4, 3, 4, 4), random(1, 3, 5, 32, 32)
    copies = z.clone(), x.clone()
    assert torch.equal(ours.decode(z).sample, ours.decode(z).sample)
    assert torch.equal(ours.encode(x).latent_dist.parameters, ours.encode(x).latent_dist.parameters)
    assert torch.equal(z, copies[0])
    assert torch.equal(x, copies[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_decode_leaves_nothing_behind(error):
    ours, _ = build_pair()
    z = random(1, 4, 3, 4, 4)
    expected = ours.decode(z).sample
    state = {name: dict(vars(module)) for name, module in ours.named_modules()}
    calls = []

    def fail_in_the_second_chunk(*_):
        calls.append(None)
        if len(calls) == 2:
            raise error

    hook = ours.decoder.up_blocks[2].resnets[1].conv2.register_forward_pre_hook(fail_in_the_second_chunk)
    with pytest.raises(error):
        ours.decode(z)
    hook.remove()
    for name, module in ours.named_modules():
        assert vars(module).keys() == state[name].keys()
        assert not [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert torch.equal(ours.decode(z).sample, expected)


def test_a_decode_inside_a_decode_does_not_disturb_it(pair):
    ours, _ = pair
    z, other = random(1, 4, 3, 4, 4), random(1, 4, 2, 4, 4, seed=5)
    expected, expected_other = ours.decode(z).sample, ours.decode(other).sample
    inner = []

    def decode_other(*_):
        hook.remove()
        inner.append(ours.decode(other).sample)

    hook = ours.decoder.up_blocks[1].resnets[1].conv1.register_forward_pre_hook(decode_other)
    assert torch.equal(ours.decode(z).sample, expected)
    assert torch.equal(inner[0], expected_other)


def test_two_threads_decode_side_by_side(pair):
    ours, _ = pair
    inputs = [random(1, 4, 3, 4, 4, seed=seed) for seed in (1, 2)]
    expected = [ours.decode(z).sample for z in inputs]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(index):
        barrier.wait()
        results[index].extend(ours.decode(inputs[index]).sample for _ in range(3))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(results[index]) == 3
        assert all(torch.equal(result, expected[index]) for result in results[index])


def test_every_weight_is_read_by_its_own_module(pair):
    """Streaming replaces parameters around a module's forward: weights taken away elsewhere must not be missed."""
    ours, _ = build_pair()
    z, x = random(1, 4, 2, 3, 3), random(1, 3, 5, 24, 24)
    expected = ours.decode(z).sample, ours.encode(x).latent_dist.parameters
    for module in ours.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight, empty = module.weight, nn.Parameter(torch.empty(0), requires_grad=False)
            module.weight = empty

            def fetch(module, args, weight=weight):
                module.weight = weight

            def drop(module, args, result, empty=empty):
                module.weight = empty

            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(drop)
    assert torch.equal(ours.decode(z).sample, expected[0])
    assert torch.equal(ours.encode(x).latent_dist.parameters, expected[1])


def test_no_gradients_are_recorded():
    ours, _ = build_pair()
    ours.requires_grad_(True)
    assert not ours.decode(random(1, 4, 2, 2, 2)).sample.requires_grad
    assert not ours.encode(random(1, 3, 1, 16, 16)).latent_dist.mean.requires_grad


@pytest.mark.parametrize(
    ("config", "message"),
    [({"is_residual": True}, "Wan2.2 5B"), ({"patch_size": 2}, "Wan2.2 5B"), ({"attn_scales": [0.5]}, "attn_scales")],
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


def test_inputs_of_another_shape_are_refused(pair):
    ours, _ = pair
    with pytest.raises(ConfigError, match=r"z has shape \[4, 3, 2, 2\]; \[batch, 4, frames"):
        ours.decode(random(4, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"x has shape \[1, 4, 1, 8, 8\]; \[batch, 3, frames"):
        ours.encode(random(1, 4, 1, 8, 8))
    with pytest.raises(ConfigError, match="one frame and one pixel at least"):
        ours.decode(random(1, 4, 0, 2, 2))


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
            model, x = vae.from_config(PUBLISHED).eval(), torch.empty(shape)
        if tiled:
            model.enable_tiling()
        peaks_bytes.append(peak_bytes(partial(getattr(model, method), x)))
    assert peaks_bytes[0] <= limit * peaks_bytes[1]
