"""What the transformers of all families have in common, against diffusers' with the same random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, build_pair, classes, other_text
from families import relative_error
from live_bytes import peak_bytes
from torch.utils._pytree import tree_map_only

from vramkit.casting import NarrowTensor
from vramkit.errors import ConfigError
from vramkit.pipelines.networks.layers import FeedForward


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


@pytest.mark.parametrize(("name", "told"), [("Wan2.1", 72), ("LTX-Video", 1)])  # how many may stand for all tokens
def test_a_timestep_for_each_token_equals_diffusers(name: str, told: int, pair: Any, given: dict[str, Any]) -> None:
    model, reference = pair
    model.set_chunk_size(10)
    first = torch.where(torch.arange(72) < 24, 0.0, 700.0)
    for timestep in (torch.stack([first, first / 2]), torch.rand(2, 72).mul(1000), torch.full((2, told), 7.0)):
        with torch.no_grad():
            expected = reference(**given | {"timestep": timestep}).sample
        assert relative_error(model(**given | {"timestep": timestep}).sample, expected) <= 1e-5
    each = model(**given | {"timestep": torch.stack([first, first])}).sample
    runs = model(**given | {"timestep": torch.tensor([[0.0, 700.0]])}, timestep_tokens=(24, 48)).sample
    assert torch.equal(runs, each)


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


class TestOtherTexts:
    def test_pass_as_alone(self, name: str, pair: Any, given: dict[str, Any]) -> None:
        model, others = pair[0], [other_text(name), other_text(name, seed=8)]
        model.set_chunk_size(10)
        expected = [model(**given | told).sample for told in ({}, *others)]
        made = model(**given, others=others)
        assert len(made.others) == 2
        assert not torch.equal(made.sample, made.others[0])
        assert all(torch.equal(*each) for each in zip((made.sample, *made.others), expected, strict=True))
        assert all(map(torch.equal, model(**given, others=others, return_dict=False), expected))

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_halve_the_bytes_that_travel(self, offload_type: str, name: str) -> None:
        layers = {key: 5 for key in DENOISERS[name].tiny if key in {"num_layers", "num_single_layers"}}
        model, _ = build_pair(name, **layers)
        given, other = DENOISERS[name].inputs(**DENOISERS[name].two), other_text(name)
        expected = [model(**given | told).sample for told in ({}, other)]
        offload = model.enable_group_offload("cpu", offload_type=offload_type)
        moved = []
        for call in (
            lambda: [model(**given | told)[0] for told in ({}, other)],
            lambda: model(**given, others=[other]),
        ):
            call()
            before = offload.stats().loaded_bytes
            for _ in range(2):
                made = call()
            moved.append(offload.stats().loaded_bytes - before)
        assert torch.equal(made[0], expected[0])
        assert torch.equal(made.others[0], expected[1])
        assert moved[0] == 2 * moved[1]

    def test_take_the_memory_of_their_tokens(self, name: str) -> None:
        given, other = DENOISERS[name].inputs(**DENOISERS[name].two, height=16, width=16), other_text(name)
        model, _ = build_pair(name)
        model.set_chunk_size(16)
        model(**given)
        kept = [tensor for told in (given, other) for tensor in told.values() if isinstance(tensor, torch.Tensor)]
        existing = [*model.parameters(), *kept, *([model._rotary[1]] if model._rotary else [])]
        alone, paired = (peak_bytes(partial(model, **given, others=others), existing) for others in ([], [other]))
        streams: list[int] = []
        for layer in (each for each in model.modules() if isinstance(each, FeedForward)):
            layer.register_forward_pre_hook(lambda _, args: streams.extend(each.tokens.nbytes for each in args))
        sample = model(**given, others=[other]).sample
        text_bytes = 8 * 1024
        assert max(streams) < paired - alone <= max(streams) + sample.nbytes + text_bytes

    def test_are_told_as_the_first_is(self, name: str, pair: Any, given: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"others\[1\]: got \['colour', .*expected \['encoder_"):
            pair[0](**given, others=[other_text(name), other_text(name) | {"colour": 1}])


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


def test_a_stored_weight_is_widened_once_for_all_chunks(
    pair: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair
    model.enable_layerwise_casting()
    widened, dequantize = [], NarrowTensor.dequantize
    monkeypatch.setattr(NarrowTensor, "dequantize", lambda weight: widened.append(weight) or dequantize(weight))
    counts = []
    for chunk in (8192, 10):
        widened.clear()
        model.set_chunk_size(chunk)
        in_chunks = model(**given).sample
        counts.append(len(widened))
    assert 0 < counts[1] <= counts[0]
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, NarrowTensor):
                setattr(module, name, torch.nn.Parameter(dequantize(weight), requires_grad=False))
    assert torch.equal(in_chunks, model(**given).sample)


@pytest.mark.parametrize("texts", [1, 3])
def test_each_unit_is_called_once(texts: int, name: str, pair: Any, given: dict[str, Any]) -> None:
    model, _ = pair
    given |= {"others": [other_text(name)] * (texts - 1)}
    model.set_chunk_size(10)
    units = streamed_units(model)
    calls: list[torch.nn.Module] = []
    for unit in units:
        unit.register_forward_hook(lambda module, args, output: calls.append(module))
    model(**given)
    assert calls == units
    assert [type(unit).__name__ for unit in units] == DENOISERS[name].units
