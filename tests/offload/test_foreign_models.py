"""README's recipe on models that others wrote: saved by their library, built without weights, mapped, streamed, the same."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from foreign_models import MODELS
from safetensors.torch import save_model
from sweeps import sweep
from torch import nn

from vramkit.errors import CheckpointError
from vramkit.offload import apply_group_offloading, load_mapped, parameters_on_meta


def saved(model: nn.Module, folder: Path, *, as_it_is: bool) -> list[Path]:
    if as_it_is:
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
    return sorted(folder.glob("*.safetensors"))


@sweep("name level", product(MODELS, ["block_level", "leaf_level"]), together=1)
def test_the_recipe_gives_the_same_bytes(name: str, level: str, tmp_path: Path) -> None:
    foreign = MODELS[name]
    model = foreign.make()
    expected = foreign.call(model)
    assert expected
    files = saved(model, tmp_path, as_it_is=foreign.saves_as_it_is)
    with parameters_on_meta():
        twin = foreign.make()
    assert all(parameter.is_meta for parameter in twin.parameters())
    load_mapped(twin, files)
    offload = apply_group_offloading(twin, "cpu", offload_type=level)
    for _ in range(2):
        got = foreign.call(twin)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    offload.remove()


def test_parameters_that_a_library_does_not_save_are_named(tmp_path: Path) -> None:
    foreign = MODELS["MarianMTModel"]
    files = saved(foreign.make(), tmp_path, as_it_is=True)
    with parameters_on_meta():
        twin = foreign.make()
    with pytest.raises(CheckpointError, match=r"lacks tensors of the module: model\.encoder\.embed_positions\.weight"):
        load_mapped(twin, files)


@sweep("name level", product(MODELS, ["block_level", "leaf_level", "model_level"]), together=1)
def test_ordinary_models_read_nothing_at_rest_and_keep_nothing(name: str, level: str, strict: None) -> None:
    foreign = MODELS[name]
    model = foreign.make()
    expected = foreign.call(model)
    offload = apply_group_offloading(model, "cpu", offload_type=level)
    for _ in range(3):
        foreign.call(model)
    before = offload.stats()
    got = foreign.call(model)
    after = offload.stats()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    assert after.kept_bytes == 0
    if level != "model_level":  # where everything is loaded when a call begins
        assert after.demand_loads == before.demand_loads
    offload.remove()
