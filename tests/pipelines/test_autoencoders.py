"""What the autoencoders of all families have in common, against diffusers' with the same random weights."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import pytest
import torch
from autoencoders import AUTOENCODERS, build_pair, classes, decoded, encoded, told
from families import normal, relative_error, seeded
from torch import nn

from vramkit.errors import ConfigError

_pairs: dict[str, tuple[Any, Any]] = {}


@pytest.fixture(params=AUTOENCODERS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def pair(name: str) -> tuple[Any, Any]:
    """Built once, to be used and not changed."""
    if name not in _pairs:
        _pairs[name] = build_pair(name)
    return _pairs[name]


@pytest.fixture
def x(name: str) -> torch.Tensor:
    return AUTOENCODERS[name].random_clip()


@pytest.fixture
def z(name: str) -> torch.Tensor:
    return AUTOENCODERS[name].random_latents()


def both(vae: Any, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return encoded(vae, x), decoded(vae, z)


def errors(ours: Any, theirs: Any) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_published_configs_have_diffusers_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, oracle = (each.from_config(AUTOENCODERS[name].published) for each in classes(name))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in oracle.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == AUTOENCODERS[name].parameters


@pytest.mark.parametrize("name", ["Wan2.1", "HunyuanVideo", "LTX-Video 0.9.0", "CogVideoX"])
def test_config_has_diffusers_keys_and_defaults(name: str) -> None:
    def listed(config: Any) -> dict[str, Any]:
        items = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        return {key: value for key, value in items.items() if not key.startswith("_")}

    with torch.device("meta"):
        ours, oracle = (each.from_config({}).config for each in classes(name))
    assert listed(asdict(ours)) == listed(oracle)


def test_convolutions_in_parts_of_the_frames_give_the_same_numbers(
    name: str, pair: Any, x: torch.Tensor, z: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = both(pair[0], x, z)
    bound, value = AUTOENCODERS[name].part
    for size in (1, value):
        monkeypatch.setattr(bound, size)
        assert errors(both(pair[0], x, z), expected) <= 1e-5


def test_slices_of_a_batch_equal_diffusers(name: str, pair: Any) -> None:
    ours, oracle = pair
    x, z = AUTOENCODERS[name].random_clip(2), AUTOENCODERS[name].random_latents(2)
    together = both(ours, x, z)
    ours.enable_slicing()
    try:
        apart = both(ours, x, z)
        ours.disable_slicing()
        singly = [decoded(ours, item) for item in z.split(1)]
    finally:
        ours.disable_slicing()
    if name == "LTX-Video 0.9.1":  # which draws the noise of a slice anew
        assert relative_error(apart[0], together[0]) <= 1e-5
        return
    expected = both(oracle, x, z)
    assert errors(together, expected) <= 1e-5
    assert errors(apart, expected) <= 1e-5
    assert torch.equal(apart[1], torch.cat(singly))


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, each in AUTOENCODERS.items() for dtype in each.narrow]
)
def test_lower_precision_is_as_near_to_float32_as_diffusers(
    name: str, dtype: torch.dtype, x: torch.Tensor, z: torch.Tensor
) -> None:
    ours, oracle = build_pair(name)
    exact = both(oracle, x, z)
    results, expected = (both(vae.to(dtype), x.to(dtype), z.to(dtype)) for vae in (ours, oracle))
    for a, b, c in zip(results, expected, exact, strict=True):
        assert a.dtype == dtype
        assert (a - c).norm() <= 1.25 * (b - c).norm()  # which roundings add up is chance


def test_channels_last_weights_give_the_same_numbers(name: str, pair: Any, x: torch.Tensor, z: torch.Tensor) -> None:
    ours, _ = build_pair(name)
    for parameter in ours.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    assert errors(both(ours, x, z), both(pair[1], x, z)) <= 1e-5


def test_forward_encodes_and_decodes_as_diffusers(pair: Any, x: torch.Tensor) -> None:
    results = []
    for vae in pair:
        torch.manual_seed(2)
        exact = vae(x, *told(vae, x)).sample
        results.append((exact, vae(x, *told(vae, x), sample_posterior=True, generator=seeded(3)).sample))
    assert errors(*results) <= 1e-5


def test_inputs_are_left_alone_and_results_are_named_tuples(pair: Any, x: torch.Tensor, z: torch.Tensor) -> None:
    ours, _ = pair
    copies, first = (x.clone(), z.clone()), both(ours, x, z)
    torch.manual_seed(2)
    (sample,) = ours.decode(z, *told(ours, z), return_dict=False)
    assert equal((ours.encode(x, return_dict=False)[0].parameters, sample), first)
    torch.manual_seed(2)
    assert torch.equal(ours.decode(z, *told(ours, z))[0], sample)
    assert equal((x, z), copies)


def test_weights_taken_away_between_forwards_are_not_missed(name: str, x: torch.Tensor, z: torch.Tensor) -> None:
    """Streaming replaces parameters around a module's forward: each has to be read by the module that owns it."""
    ours, _ = build_pair(name)
    expected = both(ours, x, z)
    for module in ours.modules():
        own = dict(module.named_parameters(recurse=False))

        def fetch(module: Any, args: Any, own: Any = own) -> None:
            for key, parameter in own.items():
                setattr(module, key, parameter)

        def drop(module: Any, args: Any, result: Any, own: Any = own) -> None:
            for key in own:
                setattr(module, key, nn.Parameter(torch.empty(0)))

        drop(module, (), None)
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)
    assert equal(both(ours, x, z), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(name: str, offload_type: str, x: torch.Tensor, z: torch.Tensor) -> None:
    ours, _ = build_pair(name)
    expected = both(ours, x, z)
    offload = ours.enable_group_offload("cpu", offload_type=offload_type)
    assert equal(both(ours, x, z), expected)
    offload.remove()


def test_no_gradients_are_recorded(name: str, x: torch.Tensor, z: torch.Tensor) -> None:
    ours, _ = build_pair(name)
    ours.requires_grad_(True)
    assert not any(result.requires_grad for result in both(ours, x, z))


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_decode_leaves_nothing_behind(
    name: str, failure: type[BaseException], pair: Any, z: torch.Tensor
) -> None:
    ours, _ = pair
    state = {key: vars(module).keys() for key, module in ours.named_modules()}
    calls: list[nn.Module] = []
    hooks = [each.register_forward_pre_hook(lambda module, args: calls.append(module)) for each in ours.modules()]
    expected = decoded(ours, z)
    repeated = [module for module in dict.fromkeys(calls) if calls.count(module) > 1 and not list(module.children())]
    middle = (repeated or calls)[len(repeated or calls) // 2]
    calls.clear()

    def fail_the_second_time(*_: Any) -> None:
        if calls.count(middle) == (2 if repeated else 1):
            raise failure

    hooks.append(middle.register_forward_pre_hook(fail_the_second_time))
    with pytest.raises(failure):
        decoded(ours, z)
    for hook in hooks:
        hook.remove()
    for key, module in ours.named_modules():
        assert vars(module).keys() == state[key]
        assert not [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert torch.equal(decoded(ours, z), expected)


@pytest.mark.parametrize("name", sorted(AUTOENCODERS.keys() - {"LTX-Video 0.9.1"}))  # noise of a common generator
def test_two_threads_decode_side_by_side(name: str, pair: Any) -> None:
    ours, _ = pair
    inputs = [AUTOENCODERS[name].random_latents(seed=seed) for seed in (1, 2)]
    expected = [decoded(ours, z) for z in inputs]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait()
        results[index].extend(decoded(ours, inputs[index]) for _ in range(2))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(results[index]) == 2
        assert all(torch.equal(result, expected[index]) for result in results[index])


def test_inputs_of_another_shape_are_refused(pair: Any) -> None:
    ours, _ = pair
    with pytest.raises(ConfigError, match=r"z has shape \[4, 3, 2, 2\]; \[batch, 4, frames"):
        ours.decode(normal(4, 3, 2, 2))
    with pytest.raises(ConfigError, match=r"x has shape \[1, 4, 1, 64, 64\]; \[batch, 3, frames"):
        ours.encode(normal(1, 4, 1, 64, 64))
    with pytest.raises(ConfigError, match="one frame"):
        ours.decode(normal(1, 4, 0, 2, 2))
