"""Acceptance 8: what a module is called with reaches it as it was given."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Block, BlockNet, mapped_copy, tokens
from torch import nn

from vramkit.errors import ConfigError
from vramkit.offload import apply_group_offloading
from vramkit.offload.arguments import any_requires_grad, moved, moved_call

CPU, META = torch.device("cpu"), torch.device("meta")
Pair = collections.namedtuple("Pair", "x y")


class Cache:
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []


class Curious(nn.Module):
    """Remembers what it was called with, and writes to the mutable ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen = [x, *args, kwargs]
        for block in self.blocks:
            x = block(x)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                value.steps.append(x)
            elif type(value) is list:
                value.append(x)
            elif type(value) is dict:
                value["last"] = x
        return x


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_arguments_are_the_very_objects_that_were_given(level: str, tmp_path: Path) -> None:
    module = mapped_copy(Curious().eval(), tmp_path)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    x, cache, history, state = tokens(48), Cache(), [tokens(48)], {"k": [tokens(48)]}
    pair, text = Pair(tokens(48), None), "text"
    with torch.no_grad():
        y = module(x, cache, history, pair, state=state, text=text, none=None)
    assert module.seen[0] is x
    assert module.seen[1] is cache
    assert module.seen[2] is history
    assert module.seen[3] is pair
    assert module.seen[4]["state"] is state
    assert module.seen[4]["text"] is text
    assert cache.steps[0] is y
    assert history[-1] is y
    assert state["last"] is y
    offload.remove()


def test_only_what_holds_a_moved_tensor_is_rebuilt() -> None:
    near, far = torch.ones(2), torch.ones(2, device="meta")
    stays, goes, cache = [near, {"a": (near,)}], [far, {"a": (near, far)}], Cache()
    assert moved(stays, CPU) is stays
    there = moved([stays, near], META)
    assert there[0][1]["a"][0].device == META
    args, kwargs = moved_call((far, goes, cache), {"keep": near, "move": (near, cache)}, META, {"keep"})
    assert args[0] is far
    assert args[1] is not goes
    assert args[1][0] is far
    assert args[2] is cache
    assert kwargs["keep"] is near
    assert kwargs["move"][0].device == META
    assert kwargs["move"][1] is cache
    assert goes[1]["a"][0] is near  # what was given is not written to


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_a_tensor_without_values_is_refused(level: str) -> None:
    module = Curious().eval()
    x = tokens(48)
    expected = module(x).detach()
    offload = apply_group_offloading(module, "cpu", offload_type=level, exclude_kwargs=["shape"])
    absent, part = x.to("meta"), module.blocks[1]
    calls: list[Callable[[], object]] = [
        lambda: module(absent),
        lambda: module(x, [{"deep": (x, absent)}]),
        lambda: module(x, state=absent),
        lambda: part(absent),
    ]
    module.seen.clear()
    with torch.no_grad():
        for call in calls:
            with pytest.raises(ConfigError, match=r"a tensor of \[2, 6, 48\], torch.float32, on the meta device"):
                call()
            assert not module.seen
            assert torch.equal(module(x), expected)
            module.seen.clear()
        assert torch.equal(module(x, shape=absent), expected)
    offload.remove()


def test_gradients_are_found_in_containers() -> None:
    asks = torch.ones(1, requires_grad=True)
    assert any_requires_grad(({"a": [asks]},))
    assert not any_requires_grad(({"a": [torch.ones(1)]}, "text", None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_type": "row_level"}, "offload_type='row_level'.*block_level"),
        ({"offload_device": "cuda"}, "offload_device='cuda'"),
        ({"onload_device": "nowhere"}, "'nowhere' is not a device"),
        ({"onload_device": "meta"}, "'meta'"),
        ({"num_blocks_per_group": 0}, "num_blocks_per_group=0"),
        ({"slots": 0}, "slots=0"),
        ({"slots": True}, "slots=True"),
        ({"resident": "plenty"}, "resident='plenty'.*6GiB"),
        ({"resident": -1}, "resident=-1"),
        ({"unit_bytes": 0}, "unit_bytes=0"),
        ({"unit_bytes": "some"}, "unit_bytes='some'.*6GiB"),
        ({"pin_budget": 1.5}, "pin_budget=1.5.*6GiB"),
        ({"use_stream": "yes"}, "use_stream='yes'; expected True or False"),
        ({"direct_io": 3}, "direct_io=3; expected True or False"),
        ({"mesh": 3}, r"mesh=3; expected .*connect\(\)"),
        ({"store": "tape"}, "store='tape'.*registered"),
        ({"store": "registered"}, "on 'cpu' use 'disk' or 'pageable'"),
        ({"store": "disk"}, "load_mapped, or give offload_to_disk_path"),
        ({"store": "pageable", "offload_to_disk_path": "x"}, "offload_to_disk_path goes with"),
        ({"offload_to_disk_path": __file__}, "is a file"),
        ({"offload_to_disk_path": 3}, "offload_to_disk_path=3; expected the path of a folder"),
        ({"offload_to_disk_path": ""}, "offload_to_disk_path=''; expected the path of a folder"),
        ({"exclude_kwargs": 3}, "exclude_kwargs=3; expected a list of names"),
        ({"entry_points": [len]}, "entry_points=.*; expected a list of names"),
        ({"block_modules": ["layers"]}, "'layers'.*it has: embed, blocks, head"),
        ({"block_modules": "blocks"}, r"expected a list.*\['blocks'\]"),
        ({"entry_points": ["sing"]}, "'sing'"),
    ],
)
def test_options_that_cannot_be_used_are_errors_before_anything_changes(options: dict[str, Any], message: str) -> None:
    from vramkit.errors import ConfigError

    module = BlockNet().eval()
    before = dict(module.named_parameters())
    with pytest.raises(ConfigError, match=message):
        apply_group_offloading(module, options.pop("onload_device", "cpu"), **options)
    assert all(module.get_parameter(name) is parameter for name, parameter in before.items())
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is missing")
def test_a_device_that_is_missing_is_an_error() -> None:
    from vramkit.errors import ConfigError

    with pytest.raises(ConfigError, match=r"'cuda'.*0 such devices"):
        apply_group_offloading(BlockNet(), "cuda")


def test_the_peers_options_are_accepted(tmp_path: Path) -> None:
    module = mapped_copy(BlockNet().eval(), tmp_path)
    offload = apply_group_offloading(
        module,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=2,
        non_blocking=True,
        use_stream=True,
        record_stream=True,
        low_cpu_mem_usage=True,
        block_modules=["blocks"],
        exclude_kwargs=["cache"],
    )
    assert offload.stats().slots == 2
    offload.remove()
    offload = apply_group_offloading(module, torch.device("cpu"), use_stream=False)
    assert offload.stats().slots == 1
    offload.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_device": "disk"}, "offload_to_disk_path"),
        ({"offload_device": None}, "offload_device='None'"),
        ({"onload_device": None}, "onload_device=None"),
        ({"exclude_kwargs": "abc"}, "expected a list of names"),
        ({"entry_points": "forward"}, "expected a list of names"),
    ],
)
def test_what_is_no_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_group_offloading(BlockNet().eval(), **{"onload_device": "cpu"} | options)


@pytest.mark.parametrize("given", [object(), [BlockNet()], BlockNet, None])
def test_what_is_no_module_is_refused_with_the_way_out(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module.*vramkit\.fit"):
        apply_group_offloading(given, "cpu")


@pytest.mark.parametrize("target", ["cuda", "meta"])
def test_moving_an_offloaded_module_is_answered_and_does_nothing(target: str) -> None:
    module = BlockNet().eval()
    offload = apply_group_offloading(module, "cpu", slots=1)
    with pytest.warns(RuntimeWarning, match="stay where they rest"):
        assert module.to(target) is module
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    offload.remove()
