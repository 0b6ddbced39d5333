"""load_mapped: weights as views of files, whole or not at all."""

from __future__ import annotations

import copy
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import WIDTH, AttentionNet, BlockNet, StatefulNet, TiedNet, save, tokens
from safetensors.torch import save_file
from torch import nn

from vramkit.errors import CheckpointError, ConfigError
from vramkit.offload import apply_group_offloading, load_mapped, parameters_on_meta
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


@pytest.mark.parametrize("given", [5, None, b"x.safetensors", [5], {5}], ids=repr)
def test_what_is_no_path_is_refused_by_name(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"was given for a file; expected a path"):
        load_mapped(BlockNet(), given)


@pytest.mark.parametrize("key_map", [5, "x", lambda _: 5, {"head.weight": 5}], ids=["number", "name", "call", "value"])
def test_what_maps_no_names_is_refused_by_name(key_map: Any, tmp_path: Path) -> None:
    path = save(BlockNet(), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"key_map.*; expected a"):
        load_mapped(on_meta(BlockNet), path, key_map=key_map)


@pytest.mark.parametrize("weight_map", [{"x": "two.safetensors"}, None, [], {"x": 5}], ids=str)
def test_a_shard_that_is_given_alone_is_told_of_its_index(weight_map: Any, tmp_path: Path) -> None:
    state = BlockNet().state_dict()
    save_file({"head.weight": state["head.weight"]}, tmp_path / "one.safetensors")
    if isinstance(weight_map, dict):
        weight_map |= {"head.weight": "one.safetensors"}
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    is_told = isinstance(weight_map, dict) and "two.safetensors" in weight_map.values()
    said = re.escape(f"give all shards, or {index}, which lists them") if is_told else "belongs to another model"
    with pytest.raises(CheckpointError, match=f"lacks tensors of the module.*{said}"):
        load_mapped(on_meta(BlockNet), tmp_path / "one.safetensors")


def test_what_is_no_module_gets_no_weights(tmp_path: Path) -> None:
    path = save(BlockNet(), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"a type was given; expected a torch.nn.Module"):
        load_mapped(BlockNet, path)  # type: ignore[type-var]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "floating-point"),
        ({"dtype": "bf16"}, "floating-point"),
        ({"keep_fp32": "weight"}, "list"),
    ],
)
def test_options_that_would_spoil_weights_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_mapped(module, tmp_path / "m.safetensors", **options)
    for path, problem in ((tmp_path, "is a folder"), (tmp_path / "model", "does not exist")):
        with pytest.raises(CheckpointError, match=problem):
            load_mapped(module, path)


def test_a_module_that_has_all_its_values_takes_nothing(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    weight = module.weight
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    load_mapped(module, tmp_path / "m.safetensors", loaded=["weight", "bias"], strict=False)
    assert module.weight is weight


def test_a_copy_of_a_mapped_module_owns_its_weights(tmp_path: Path) -> None:
    module = load_mapped(on_meta(BlockNet), save(BlockNet(), tmp_path / "x.safetensors"))
    twin = copy.deepcopy(module)
    assert all(span_of(parameter) is None for parameter in twin.parameters())
    twin.embed.weight.data.zero_()
    assert bool(module.embed.weight.any())


class Leftovers(nn.Module):
    """Tensors that no file holds, in every place where modules keep some."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.rope = nn.Module()
        self.rope.register_buffer("inv_freq", 1.0 / 10 ** torch.arange(float(WIDTH)), persistent=False)
        self.freqs = torch.polar(torch.ones(WIDTH), torch.arange(float(WIDTH)))
        self.steps = [torch.arange(3), torch.linspace(0.5, 1.5, WIDTH)]
        self.tables = {"sin": torch.arange(float(WIDTH)).sin()}
        self.pair = (torch.ones(WIDTH), 1)
        self.stages = {3: [(torch.ones(WIDTH), None)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x) * self.rope.inv_freq * self.freqs.real * self.steps[1]
        return x + self.tables["sin"] * self.pair[0] * self.stages[3][0][0]


LEFT = [
    r"rope\.inv_freq \(buffer\)",
    r"freqs \(attribute\)",
    r"steps\[0\] \(attribute\)",
    r"steps\[1\] \(attribute\)",
    r"tables\['sin'\] \(attribute\)",
    r"pair\[0\] \(attribute\)",
    r"stages\[3\]\[0\]\[0\] \(attribute\)",
]


@pytest.mark.parametrize("name", LEFT)
def test_what_would_stay_without_values_is_named_and_nothing_changes(name: str, tmp_path: Path) -> None:
    path = save(Leftovers(), tmp_path / "x.safetensors")
    module = on_meta(Leftovers)
    names = [re.sub(r"\\(.)", r"\1", each).split(" ")[0] for each in LEFT]
    others = [each for each, pattern in zip(names, LEFT, strict=True) if pattern != name]
    weight = module.lin.weight
    with pytest.raises(CheckpointError, match=rf"{name}.*parameters_on_meta.*before load_mapped.*loaded="):
        load_mapped(module, path, loaded=others)
    assert module.lin.weight is weight
    assert weight.is_meta
    assert load_mapped(module, path, loaded=names).lin.weight.device.type == "cpu"


def test_a_module_built_inside_parameters_on_meta_runs(tmp_path: Path) -> None:
    model = Leftovers().eval()
    path = save(model, tmp_path / "x.safetensors")
    with parameters_on_meta():
        module = Leftovers().eval()
    apply_group_offloading(load_mapped(module, path), "cpu", offload_type="leaf_level")
    x = tokens(WIDTH)
    with torch.no_grad():
        assert torch.equal(module(x), model(x))


def test_values_assigned_before_count(tmp_path: Path) -> None:
    model = Leftovers()
    path, module = save(model, tmp_path / "x.safetensors"), on_meta(Leftovers)
    module.rope.inv_freq, module.freqs, module.steps = model.rope.inv_freq, model.freqs, model.steps
    module.tables, module.pair, module.stages = model.tables, model.pair, model.stages
    x = tokens(WIDTH)
    with torch.no_grad():
        assert torch.equal(load_mapped(module, path)(x), model(x))


def test_what_is_computed_from_a_parameter_is_named(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("norm", self.lin.weight.detach().norm(), persistent=False)

    path = save(Normed(), tmp_path / "x.safetensors")
    with parameters_on_meta():
        module = Normed()
    with pytest.raises(CheckpointError, match=r"norm \(buffer\)"):
        load_mapped(module, path)


def test_lists_of_parameters_are_given_the_same_tensors(tmp_path: Path) -> None:
    model = AttentionNet().eval()
    path = save(model, tmp_path / "x.safetensors")
    x = tokens(WIDTH)
    for build in (torch.device("meta"), parameters_on_meta()):
        with build:
            module = AttentionNet().eval()
        load_mapped(module, path)
        assert all(any(w is p for p in module.rnn.parameters()) for w in module.rnn._flat_weights)
        with torch.no_grad():
            assert torch.equal(module(x), model(x))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_what_a_hook_of_torch_computes_at_each_forward_is_not_missed(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(getattr(nn.utils, name)(nn.Linear(6, 6))).eval()

    model = build()
    path, x = save(model, tmp_path / "x.safetensors"), torch.randn(2, 6)
    with parameters_on_meta():
        module = build()
    with torch.no_grad():
        assert torch.equal(load_mapped(module, path)(x), model(x))


def test_class_and_attributes_of_parameters_are_kept(tmp_path: Path) -> None:
    class Marked(nn.Parameter):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Marked(torch.ones(3))
            self.weight.scale = 2.0

    path = save(Net(), tmp_path / "x.safetensors")
    with parameters_on_meta():
        module = Net()
    for dtype in (None, torch.bfloat16):
        load_mapped(module, path, dtype=dtype)
        assert (type(module.weight), module.weight.scale, module.weight.requires_grad) == (Marked, 2.0, False)
        assert module.weight.tolist() == [1.0] * 3
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint32, torch.complex64, torch.float8_e4m3fnuz])
def test_tensors_that_are_left_out_may_be_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    save_file({**net.state_dict(), "packed": torch.zeros(4).to(dtype)}, tmp_path / "x.safetensors")
    foreign(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    for file in ("x", "y"):
        path = tmp_path / f"{file}.safetensors"
        for options in ({"key_map": lambda name: None if name == "packed" else name}, {"strict": False}):
            assert torch.equal(load_mapped(nn.Linear(4, 4), path, **options).weight, net.weight)


def test_a_dtype_that_torch_lacks_is_an_error_where_it_is_wanted(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    net.register_buffer("packed", torch.zeros(4, dtype=torch.uint8))
    foreign(save(net, tmp_path / "x.safetensors"), tmp_path / "y.safetensors")
    weight = net.weight
    with pytest.raises(CheckpointError, match=r"y\.safetensors: tensor 'packed' has dtype 'F7'.*key_map"):
        load_mapped(net, tmp_path / "y.safetensors")
    assert net.weight is weight


def foreign(path: Path, new: Path) -> None:
    """Copy a checkpoint, and say of its tensor `packed` that it has a dtype of tomorrow."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["packed"]["dtype"] = "F7"
    text = json.dumps(header).encode()
    new.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
