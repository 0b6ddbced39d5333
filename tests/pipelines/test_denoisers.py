"""What the transformers of all families have in common, against diffusers' with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import DENOISERS, build_pair, classes
from families import relative_error
from torch.utils._pytree import tree_map_only


@pytest.fixture(params=DENOISERS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def pair(name: str) -> tuple[Any, Any]:
    return build_pair(name)


@pytest.fixture
def given(name: str) -> dict[str, Any]:
    """Arguments of a call for two clips of 72 tokens."""
    return DENOISERS[name].inputs(**DENOISERS[name].two)


def streamed_units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that are streamed as one, without those that travel inside another."""
    units = [module for module in model.modules() if getattr(module, "offload_unit", False)]
    inner = {each for unit in units for each in unit.modules() if each is not unit}
    return [unit for unit in units if unit not in inner]


@pytest.mark.parametrize("chunk", [1, 7, 24, 36, 71, 72, 8192])
def test_chunk_size_changes_rounding_only(chunk: int, pair: Any, given: dict[str, Any]) -> None:
    model, _ = pair
    whole = model(**given).sample
    model.set_chunk_size(chunk)
    assert relative_error(model(**given).sample, whole) <= 1e-6


def test_bfloat16_is_as_near_to_float32_as_diffusers(name: str, pair: Any, given: dict[str, Any]) -> None:
    model, oracle = pair
    exact = oracle(**given).sample
    wide = type(oracle)._keep_in_fp32_modules or ()
    for module in pair:
        for key, parameter in module.named_parameters():
            if not any(fragment in key for fragment in wide):
                parameter.data = parameter.data.bfloat16()
    given = DENOISERS[name].inputs(**DENOISERS[name].two, dtype=torch.bfloat16)
    got, expected = model(**given).sample, oracle(**given).sample
    assert got.dtype == model.dtype == torch.bfloat16
    assert (got - expected).norm() <= 0.03 * expected.norm()
    assert (got - exact).norm() <= 1.2 * (expected - exact).norm()


def test_inputs_are_left_alone_and_calls_repeat(name: str, pair: Any, given: dict[str, Any]) -> None:
    model, _ = pair
    copies = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    first, again = model(**given).sample, model(**given, return_dict=False)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(given[key], copy) for key, copy in copies.items())
    model(**DENOISERS[name].inputs(frames=1))  # another size in between has other positions
    assert torch.equal(first, model(**given)[0])


def test_one_timestep_serves_a_batch(pair: Any, given: dict[str, Any]) -> None:
    one, each = (pair[0](**given | {"timestep": torch.tensor(times)}).sample for times in ([7], [7, 7]))
    assert torch.equal(one, each)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in DENOISERS for size in DENOISERS[name].published])
def test_published_checkpoints_have_these_keys_and_shapes(name: str, size: str) -> None:
    config, count = DENOISERS[name].published[size]
    with torch.device("meta"):
        model, oracle = (each.from_config(config) for each in classes(name))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in oracle.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())


def test_config_keys_defaults_and_exact_parts_are_diffusers(name: str) -> None:
    empty = {key: 0 for key in DENOISERS[name].tiny if key.startswith("num_") and key.endswith("layers")}
    with torch.device("meta"):
        ours, theirs = (each.from_config(empty) for each in classes(name))
    assert {key: getattr(ours.config, key) for key in ours.config.__slots__} == {
        key: value for key, value in theirs.config.items() if not key.startswith("_")
    }
    assert set(ours._keep_in_fp32) == {*(theirs._keep_in_fp32_modules or ())} - {"rope"}  # no module here
    assert list(ours.skip_layerwise_casting) == theirs._skip_layerwise_casting_patterns


def test_units_may_be_given_copies_of_the_tokens(pair: Any, given: dict[str, Any]) -> None:
    """A hook that moves the inputs breaks the aliasing, so the results have to travel through the return values."""
    model, _ = pair
    expected = model(**given).sample
    for unit in streamed_units(model):
        unit.register_forward_pre_hook(lambda module, args: tree_map_only(torch.Tensor, torch.clone, args))
    assert torch.equal(model(**given).sample, expected)


@pytest.mark.parametrize("casting", [False, True])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_streamed_weights_give_the_same_bytes(
    offload_type: str, casting: bool, pair: Any, given: dict[str, Any]
) -> None:
    model, _ = pair
    exact = model(**given).sample
    if casting:
        model.enable_layerwise_casting()
    expected = model(**given).sample
    assert (1e-4 < relative_error(expected, exact) < 0.2) if casting else torch.equal(expected, exact)
    offload = model.enable_group_offload("cpu", offload_type=offload_type)
    assert all(torch.equal(model(**given).sample, expected) for _ in range(2))
    offload.remove()
    assert torch.equal(model(**given).sample, expected)


def test_each_unit_is_called_once(name: str, pair: Any, given: dict[str, Any]) -> None:
    model, _ = pair
    model.set_chunk_size(10)
    units = streamed_units(model)
    calls: list[torch.nn.Module] = []
    for unit in units:
        unit.register_forward_hook(lambda module, args, output: calls.append(module))
    model(**given)
    assert calls == units
    assert [type(unit).__name__ for unit in units] == DENOISERS[name].units
