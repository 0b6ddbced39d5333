"""load_mapped: weights as views of files, whole or not at all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import BlockNet, StatefulNet, TiedNet, save, tokens
from safetensors.torch import save_file
from torch import nn

from vramkit.errors import CheckpointError
from vramkit.offload import apply_group_offloading, load_mapped
from vramkit.offload.disk import span_of


def on_meta(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind().eval()


def test_meta_module_gets_its_weights_without_copies(tmp_path: Path) -> None:
    model = BlockNet().eval()
    path = save(model, tmp_path / "x.safetensors")
    module = load_mapped(on_meta(BlockNet), path)
    assert all(span_of(parameter) is not None for parameter in module.parameters())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    x = tokens(8)
    with torch.no_grad():
        assert torch.equal(module(x), model(x))


def test_module_is_returned_and_its_tensors_are_the_files(tmp_path: Path) -> None:
    model = StatefulNet().eval()
    model.count.fill_(7)
    path = save(model, tmp_path / "x.safetensors")
    module = StatefulNet().eval()
    assert load_mapped(module, path) is module
    assert module.count == 7
    assert module.count.dtype == torch.int64
    assert "scratch" not in module.state_dict()


def test_sharded_index_and_list_of_files_are_one_checkpoint(tmp_path: Path) -> None:
    model = BlockNet().eval()
    state = model.state_dict()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    x = tokens(8)
    with torch.no_grad():
        for files in (index, str(index), [tmp_path / file for file in parts]):
            assert torch.equal(load_mapped(on_meta(BlockNet), files)(x), model(x))


@pytest.mark.parametrize("key_map", ["function", "mapping"])
def test_names_are_mapped(key_map: str, tmp_path: Path) -> None:
    model = BlockNet().eval()
    old = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({**old, "net.extra": torch.ones(1)}, tmp_path / "x.safetensors")

    def rename(name: str) -> str | None:
        return None if name == "net.extra" else name.removeprefix("net.")

    mapping: Any = rename if key_map == "function" else {name: name.removeprefix("net.") for name in old}
    if key_map == "mapping":
        with pytest.raises(CheckpointError, match=r"x\.safetensors.*net\.extra"):
            load_mapped(on_meta(BlockNet), tmp_path / "x.safetensors", key_map=mapping)
    module = load_mapped(on_meta(BlockNet), tmp_path / "x.safetensors", key_map=mapping, strict=key_map == "function")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_two_tensors_mapped_to_one_name_are_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    module = nn.Linear(4, 4, bias=False)
    with pytest.raises(CheckpointError, match="weight"):
        load_mapped(module, tmp_path / "x.safetensors", key_map=lambda _name: "weight")


def test_tied_weights_stay_tied_under_either_name(tmp_path: Path) -> None:
    model = TiedNet().eval()
    for kept in ("tokens.weight", "head.weight"):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state.pop({"tokens.weight": "head.weight", "head.weight": "tokens.weight"}[kept])
        save_file(state, tmp_path / f"{kept}.safetensors")
        module = load_mapped(on_meta(TiedNet), tmp_path / f"{kept}.safetensors")
        assert module.head.weight is module.tokens.weight
        assert torch.equal(module.head.weight, model.head.weight)
        assert module.gain is module.blocks[0].gain


def test_dtype_is_converted_once_and_exceptions_are_kept(tmp_path: Path) -> None:
    model = BlockNet().eval()
    path = save(model, tmp_path / "x.safetensors")
    module = load_mapped(on_meta(BlockNet), path, dtype=torch.bfloat16, keep_fp32=("norm", "head"))
    for name, parameter in module.named_parameters():
        kept = "norm" in name or "head" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(parameter, model.get_parameter(name).to(parameter.dtype))
        assert (span_of(parameter) is not None) == kept
    state = StatefulNet().eval()
    path = save(state, tmp_path / "y.safetensors")
    assert load_mapped(StatefulNet(), path, dtype=torch.float16).count.dtype == torch.int64


def test_writing_to_a_weight_never_changes_the_file(tmp_path: Path) -> None:
    path = save(BlockNet(), tmp_path / "x.safetensors")
    before = path.read_bytes()
    module = load_mapped(on_meta(BlockNet), path)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    offload = apply_group_offloading(module, "cpu")
    with offload.edit(), torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    offload.remove()
    assert all(bool((parameter == 1).all()) for parameter in module.parameters())
    assert path.read_bytes() == before
    again = load_mapped(on_meta(BlockNet), path)
    assert not bool((again.embed.weight == 0).any())


def bad_state(case: str) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in BlockNet().state_dict().items()}
    if case == "missing":
        del state["blocks.3.up.weight"]
    elif case == "unknown":
        state["blocks.9.up.weight"] = torch.ones(1)
    elif case == "shape":
        state["blocks.3.up.weight"] = state["blocks.3.up.weight"].t().contiguous()
    else:
        state["blocks.3.up.weight"] = state["blocks.3.up.weight"].int()
    return state


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"lacks tensors of the module: blocks\.3\.up\.weight"),
        ("unknown", r"does not have: blocks\.9\.up\.weight"),
        ("shape", r"'blocks\.3\.up\.weight' has shape \[48, 96\], the module expects \[96, 48\]"),
        ("dtype", r"'blocks\.3\.up\.weight' has dtype torch\.int32"),
    ],
)
@pytest.mark.parametrize("place", ["meta", "ram"])
def test_checkpoint_that_does_not_fit_is_an_error_and_changes_nothing(
    case: str, message: str, place: str, tmp_path: Path
) -> None:
    save_file(bad_state(case), tmp_path / "x.safetensors")
    module = on_meta(BlockNet) if place == "meta" else BlockNet()
    before = dict(module.named_parameters())
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{message}"):
        load_mapped(module, tmp_path / "x.safetensors")
    assert all(module.get_parameter(name) is parameter for name, parameter in before.items())


def test_unknown_tensors_are_passed_over_when_asked(tmp_path: Path) -> None:
    save_file(bad_state("unknown"), tmp_path / "x.safetensors")
    load_mapped(on_meta(BlockNet), tmp_path / "x.safetensors", strict=False)
    save_file(bad_state("missing"), tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="lacks"):
        load_mapped(on_meta(BlockNet), tmp_path / "y.safetensors", strict=False)


def test_a_copy_of_a_mapped_module_owns_its_weights(tmp_path: Path) -> None:
    module = load_mapped(on_meta(BlockNet), save(BlockNet(), tmp_path / "x.safetensors"))
    twin = copy.deepcopy(module)
    assert all(span_of(parameter) is None for parameter in twin.parameters())
    twin.embed.weight.data.zero_()
    assert bool(module.embed.weight.any())
