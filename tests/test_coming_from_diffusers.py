"""docs/coming-from-diffusers.md against both libraries: every row is true, and no public name of theirs is left out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import write_lora
from diffusers.loaders import lora_base, lora_pipeline
from documents import DOCS
from families import Stock, load
from safetensors.torch import load_file

import vramkit
from vramkit.errors import ConfigError
from vramkit.pipelines.loading.absent import Absent
from vramkit.pipelines.loading.registry import MODELS, PIPELINES, SCHEDULERS

PAGE = DOCS / "coming-from-diffusers.md"
CLASSES = {"Pipelines": PIPELINES, "Models": MODELS, "Schedulers": SCHEDULERS}
TAKEN, REFUSED, ABSENT = "Taken", "Refused", "Without a counterpart"
SINGLE_FILES = {"from_single_file"}  # of another page


def names(section: str, kind: str) -> list[str]:
    """The names in a part of the page: the first column of its table, or all of a list."""
    part = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    text = part.split(f"\n### {kind}\n")[1].split("\n### ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows or [text] for name in re.findall(r"`(\w+)`", row)]


def pairs(section: str) -> Iterator[tuple[type, type]]:
    """The classes of a section, theirs and ours."""
    for name in CLASSES[section]:
        if hasattr(diffusers, name) and hasattr(vramkit, name):
            yield getattr(diffusers, name), getattr(vramkit, name)


def public(kind: type, section: str) -> set[str]:
    """Public names of a class of diffusers; what a module of torch has, and the adapters' calls, are not in question."""
    found = {name for name in dir(kind) if not name.startswith("_")} - SINGLE_FILES
    if section == "Models":
        return found - {*dir(torch.nn.Module)}
    if section == "Pipelines":
        mixins = (value for module in (lora_base, lora_pipeline) for value in vars(module).values())
        found -= {name for each in mixins if inspect.isclass(each) and each in kind.__mro__ for name in vars(each)}
    return found


@pytest.mark.parametrize("section", CLASSES)
class TestNames:
    def test_every_public_name_is_on_the_page(self, section: str) -> None:
        listed = {name for kind in (TAKEN, REFUSED, ABSENT) for name in names(section, kind)}
        theirs = set().union(*(public(each, section) for each, _ in pairs(section)))
        assert theirs - listed == set()
        assert listed - theirs <= {name for _, ours in pairs(section) for name in dir(ours)}

    def test_taken_ones_are_there(self, section: str) -> None:
        for theirs, ours in pairs(section):
            for name in set(names(section, TAKEN)) & public(theirs, section):
                is_set_in_constructor = section != "Pipelines" and name == "config"
                assert is_set_in_constructor or hasattr(ours, name), (ours.__name__, name)
                assert name not in names(section, REFUSED)

    def test_absent_ones_are_not(self, section: str) -> None:
        for _, ours in pairs(section):
            assert not {name for name in names(section, ABSENT) if hasattr(ours, name)} - {*dir(torch.nn.Module)}


@pytest.mark.parametrize("family", ["Wan2.1"])
def test_refused_names_say_the_way(family: str, stock: Stock) -> None:
    pipeline = stock.pipeline(family)
    for section, objects in (
        ("Pipelines", [pipeline]),
        ("Models", [pipeline.transformer, pipeline.vae]),
        ("Schedulers", [pipeline.scheduler]),
    ):
        for name in names(section, REFUSED):
            for each in objects:
                with pytest.raises(ConfigError, match=rf"{type(each).__name__} has no {name}\(\): \w"):
                    getattr(each, name)()


@pytest.mark.parametrize("family", ["Wan2.1"])
def test_arguments_of_from_pretrained(family: str, stock: Stock) -> None:
    folder = stock.folder(family)
    taken, refused = names("Arguments of from_pretrained", TAKEN), names("Arguments of from_pretrained", REFUSED)
    source = inspect.getsource(diffusers.DiffusionPipeline.from_pretrained)
    assert {*re.findall(r'kwargs\.pop\("(\w+)"', source)} - {*taken, *refused} == set()
    without: dict[str, Any] = {"transformer": None, "text_encoder": None, "vae": None, "tokenizer": None}
    harmless = {"device_map": "cpu", "dtype": "auto", "torch_dtype": "auto", "use_safetensors": True}
    vramkit.WanPipeline.from_pretrained(folder, **without, **{name: harmless.get(name) for name in taken})
    for name in refused:
        with pytest.raises(ConfigError, match=f"{name}=1 is not taken; \\w"):
            vramkit.WanPipeline.from_pretrained(folder, **without, **{name: 1})


@pytest.mark.parametrize("family", ["Wan2.1"])
def test_the_thread_recipe_of_the_page(family: str, stock: Stock) -> None:
    pipe = stock.pipeline(family)
    recipe = re.search(r"`(from_pipe\(pipe, scheduler=.*?\))`:", PAGE.read_text())
    assert recipe is not None
    other = eval(f"type(pipe).{recipe[1]}", {"pipe": pipe})
    assert other.transformer is pipe.transformer
    assert other.scheduler is not pipe.scheduler


CALLS = (
    "from_pretrained",
    "from_single_file",
    "from_config",
    "load_config",
    "from_pipe",
    "save_pretrained",
    "download",
)
CALLS += ("load_lora_weights", "set_adapters", "delete_adapters", "fuse_lora", "unfuse_lora", "save_lora_weights")


@pytest.mark.parametrize("section", CLASSES)
def test_first_arguments_have_the_same_names(section: str) -> None:
    """Scripts give them by name too; the others are keywords of both."""
    compared = 0
    more = [(diffusers.AutoModel, vramkit.AutoModel)] if section == "Models" else []
    for theirs, ours in [*pairs(section), *more]:
        for call in CALLS:
            found = [getattr(kind, call, None) for kind in (theirs, ours)]
            if None in found or isinstance(inspect.getattr_static(ours, call), Absent):
                continue
            first = [next(name for name in inspect.signature(each).parameters if name != "self") for each in found]
            assert first[0] == first[1], (ours, call)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("given", [None, 3, {"a": torch.ones(1)}, ["a"]])
def test_what_is_no_path_is_named(given: Any, stock: Stock) -> None:
    kinds = rf"{type(given).__name__} was given, expected a"
    for read in (vramkit.WanPipeline.from_pretrained, vramkit.AutoencoderKLWan.from_pretrained):
        with pytest.raises(ConfigError, match=kinds):
            read(given)
    with pytest.raises(ConfigError, match=kinds):
        vramkit.AutoencoderKLWan.from_single_file(given)
    if not isinstance(given, dict):
        with pytest.raises(ConfigError, match=rf"the LoRA is {type(given).__name__}; expected a path"):
            stock.pipeline("Wan2.1").load_lora_weights(given)


def test_a_config_is_changed_on_the_way(stock: Stock) -> None:
    config = vramkit.WanTransformer3DModel.load_config(stock.folder("Wan2.1"), subfolder="transformer")
    for kind in (diffusers.WanTransformer3DModel, vramkit.WanTransformer3DModel):
        model = kind.from_config(config, num_layers=1)
        assert (len(model.blocks), model.config.num_layers) == (1, 1)
    assert vramkit.WanTransformer3DModel.from_config(model.config, num_layers=2).config.num_layers == 2


def test_adapters_are_saved_as_scripts_say_it(tmp_path: Path) -> None:
    layers = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(4, 2),
    }
    for kind in (diffusers.WanPipeline, vramkit.WanPipeline):
        kind.save_lora_weights(tmp_path / kind.__module__, layers, safe_serialization=True, save_function=None)
    saved = [load_file(path) for path in sorted(tmp_path.glob("*/*.safetensors"))]
    assert len(saved) == 2
    assert saved[0].keys() == saved[1].keys()
    with pytest.raises(ConfigError, match="only safetensors are written"):
        vramkit.WanPipeline.save_lora_weights(tmp_path, layers, safe_serialization=False)


def test_calls_of_adapters_that_there_are_not_say_the_way(stock: Stock) -> None:
    pipeline = stock.pipeline("Wan2.1")
    for name, way in {"set_lora_device": "delete_adapters", "lora_state_dict": "read_lora"}.items():
        assert hasattr(diffusers.WanPipeline, name)
        with pytest.raises(ConfigError, match=rf"has no {name}\(\): .*{way}"):
            getattr(pipeline, name)(["a"], "cpu")


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "set_adapters": ((None,), {}, "adapter names are None"),
    "delete_adapters": ((3,), {}, "adapter names are 3"),
    "load_lora_weights": (({}, 3), {}, "adapter_name=3 is no name"),
    "enable_lora_hotswap": (("x",), {}, "target_rank=x"),
    "save_lora_weights": ((None, {"a.lora_A.weight": torch.ones(1, 1)}), {}, "save_directory is NoneType"),
    "save_pretrained": ((None,), {}, "NoneType was given, expected the path of a folder"),
}


@pytest.mark.parametrize("call", WRONG)
def test_values_of_another_kind_are_named(call: str, stock: Stock) -> None:
    given, options, message = WRONG[call]
    with pytest.raises(ConfigError, match=message):
        getattr(stock.pipeline("Wan2.1"), call)(*given, **options)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "x", None])
def test_a_scale_that_would_spoil_weights_is_refused(scale: Any, stock: Stock, tmp_path: Path) -> None:
    pipeline = load("Wan2.1", stock.folder("Wan2.1"), text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(write_lora(pipeline.transformer, tmp_path), "a")
    before = {name: weight.clone() for name, weight in pipeline.transformer.named_parameters()}
    with pytest.raises(ConfigError, match="expected a finite number"):
        pipeline.fuse_lora(lora_scale=scale)
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.transformer.named_parameters())
    assert pipeline.num_fused_loras == 0
