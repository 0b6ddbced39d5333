"""Pipelines within a budget on the CPU tier: the same bytes, what was predicted, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from allocated_bytes import AllocatedBytes, is_planned_well
from families import FAMILIES, Stock, models_of, seeded
from foreign_pipelines import part
from torch import nn

import vramkit
from vramkit import Plan, PlanInfeasible, apply_group_offloading, fit, offload_of, plan
from vramkit.errors import ConcurrentUseError, ConfigError, ConflictError
from vramkit.memory import GIB, MIB, module_bytes
from vramkit.planning.calls import arguments_of

RANDOM_STATES = 2 * 5056  # bytes of the states of two generators, which no rehearsal makes
TINY_WAN = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16}


def call_of(family: str) -> dict[str, Any]:
    return {"prompt": "a cat on a log", "output_type": "pt", "num_inference_steps": 2, **FAMILIES[family].clip}


def clip(pipeline: Any, **call: Any) -> torch.Tensor:
    torch.manual_seed(5)
    frames: torch.Tensor = pipeline(**call, generator=seeded()).frames
    return frames


def floor_of(pipeline: Any, **call: Any) -> int:
    with pytest.raises(PlanInfeasible) as refused:
        fit(pipeline, 1000, device="cpu", **call)
    return refused.value.nearest_bytes


@pytest.mark.filterwarnings("ignore:a whole decode does not fit")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_within_its_budget(family: str, stock: Stock) -> None:
    pipeline, call = stock.pipeline(family), call_of(family)
    with AllocatedBytes() as count:
        expected = clip(pipeline, **call)
    with fit(pipeline, GIB, device="cpu", **call) as fitted:
        predicted = max(phase.activation_bytes for phase in fitted.plan.phases)
        assert is_planned_well(predicted, count.peak_bytes - RANDOM_STATES, least=1, most=2)
        assert is_planned_well(predicted, count.peak_bytes, least=0, most=1.05)
        assert all(each.granularity == "resident" for each in fitted.plan.components)
        assert torch.equal(clip(pipeline, **call), expected)
        budget = fitted.plan.floor_bytes + 20_000
    with fit(pipeline, budget, device="cpu", **call) as fitted:
        found, stats = clip(pipeline, **call), fitted.stats()
        for planned in fitted.plan.components:  # what is on the device is what was planned, and never more
            real = stats[planned.name]
            on_device = real.resident_bytes + real.slots * real.slot_bytes
            assert on_device <= planned.device_bytes
            assert on_device >= planned.device_bytes - max(planned.slot_bytes, planned.device_bytes // 20)
        assert all(
            stats[each.name].loaded_bytes > 0 for each in fitted.plan.components if each.granularity != "resident"
        )
        assert fitted.plan.peak_bytes <= budget
        assert fitted.plan == Plan.from_json(fitted.plan.to_json())
        if str(fitted.plan.decode) == "whole":
            assert torch.equal(found, expected)
        elif str(fitted.plan.decode) != "tiles":  # stripes round as kernels of their size do
            assert torch.allclose(found, expected, atol=1e-5)
    assert all(offload_of(part) is None for part in models_of(pipeline).values())
    assert torch.equal(clip(pipeline, **call), expected)


def test_a_larger_call_is_planned_for_before_it_begins(stock: Stock) -> None:
    pipeline, call = stock.pipeline("Wan2.1"), call_of("Wan2.1")
    large = call | {"num_frames": 9, "width": 64}
    expected = clip(pipeline, **large)
    room = floor_of(pipeline, **large)
    with fit(pipeline, room + 20_000, device="cpu", **call) as fitted:
        small = fitted.plan
        assert torch.equal(clip(pipeline, **large), expected)
        assert fitted.plan.call["num_frames"] == 9
        assert max(small.peak_bytes, fitted.plan.peak_bytes) <= room + 20_000
        before = fitted.plan
        clip(pipeline, **call)
        clip(pipeline, **{**call, "prompt": "cat", "num_inference_steps": 3})
        assert fitted.plan is before  # smaller calls are within it
        with pytest.raises(PlanInfeasible, match="nearest budget"):
            clip(pipeline, **{**large, "num_frames": 33})
        assert torch.equal(clip(pipeline, **large), expected)  # nothing was changed


def test_what_a_pipeline_is_stays(stock: Stock) -> None:
    pipeline = stock.pipeline("Wan2.1")
    kind = type(pipeline)
    fitted = fit(pipeline, GIB, device="cpu", **call_of("Wan2.1"))
    assert isinstance(pipeline, kind)
    assert type(pipeline).__name__ == kind.__name__
    fitted.remove()
    fitted.remove()
    assert type(pipeline) is kind
    assert not fitted.offloads


class Net(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.mark.parametrize("way", ["tuple", "keywords", "one", "none"])
def test_a_plain_module(way: str) -> None:
    net, x = Net().eval(), torch.randn(4, 64)
    expected = net(x)
    example = {"tuple": (x,), "keywords": {"x": x}, "one": x, "none": None}[way]
    with fit(net, 60_000, device="cpu", example=example) as fitted, torch.no_grad():
        assert torch.equal(net(x), expected)
        assert fitted.stats()["Net"].loads > 0
        assert fitted.plan.component("Net").streamed_bytes > 0
        if way == "none":  # the first call was planned for when it came
            assert not any("not known yet" in note for note in fitted.plan.notes)
        larger = torch.randn(8, 64)
        assert torch.equal(net(larger), torch.tanh(net.blocks[5](_through(net, larger))))
        with pytest.raises(PlanInfeasible):
            net(torch.randn(400, 64))
    assert torch.equal(net(x), expected)


@dataclasses.dataclass
class Batch:
    x: Any
    more: Any = None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"x": x},
        lambda x: [None, {"x": (x,)}],
        lambda x: Batch(x, more=None),
        lambda x: {"inner": Batch(x)},
        lambda x: x.numpy(),
        lambda x: np.int64(len(x)),
        lambda x: {x},
        lambda x: frozenset({(x,)}),
        lambda x: deque([x]),
        lambda x: functools.partial(torch.mul, x, other=1),
        lambda x: lambda: x,
        lambda x: [lambda given=x: given],
    ],
    ids=[
        "mapping",
        "nested",
        "dataclass",
        "both",
        "array",
        "number",
        "set",
        "frozen set",
        "deque",
        "partial",
        "closure",
        "default",
    ],
)
def test_a_larger_argument_is_seen_wherever_it_lies(wrap: Any) -> None:
    class Taking(Net):
        def forward(self, given: Any) -> torch.Tensor:
            return super().forward(_first_tensor(given))

    net, x, small = Taking().eval(), torch.ones(400, 64), torch.ones(4, 64)
    with fit(net, 60_000, device="cpu", example=(wrap(small),)), torch.no_grad():
        within = net(wrap(small))
        net(wrap(small[:2]))
        with pytest.raises(PlanInfeasible, match="activations"):
            net(wrap(x))
    with torch.no_grad():
        assert torch.equal(net(wrap(small)), within)


def _first_tensor(given: Any) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        return given
    if isinstance(given, np.ndarray):
        return torch.from_numpy(given)
    if isinstance(given, np.integer):
        return torch.ones(int(given), 64)
    if callable(given):
        return _first_tensor(given())
    if isinstance(given, Batch):
        return _first_tensor(given.x)
    return _first_tensor(
        next(each for each in (given.values() if isinstance(given, dict) else given) if each is not None)
    )


def _through(net: Net, x: torch.Tensor) -> torch.Tensor:
    for block in list(net.blocks)[:5]:
        x = torch.tanh(block(x))
    return x


def test_a_copy_is_an_ordinary_module() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    with fit(net, 60_000, device="cpu", example=x):
        copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    assert all(type(each) is Net and torch.equal(each(x), net(x)) for each in copies)


def test_modules_by_name_and_what_they_share() -> None:
    one, two, x = Net().eval(), Net().eval(), torch.randn(2, 64)
    expected = one(x), two(x)
    with fit({"one": one, "two": two}, 90_000, device="cpu", example={"one": x, "two": (x,)}) as fitted:
        with torch.no_grad():
            assert torch.equal(one(x), expected[0])
            assert torch.equal(two(x), expected[1])
        assert [each.name for each in fitted.plan.components] == ["one", "two"]
        assert fitted.plan.order == ("one", "two")


@pytest.mark.parametrize(
    ("vram", "options", "match"),
    [
        ("lots", {}, "vram='lots'"),
        (0, {}, "more than nothing"),
        (-5, {}, "vram=-5"),
        (True, {}, "vram=True"),
        ("1GiB", {"ram": "none"}, "ram='none'"),
        ("1GiB", {"allow": "most"}, "'exact', 'bounded', 'any'"),
        ("1GiB", {"device": "abacus"}, "device='abacus'"),
        ("1GiB", {"device": "cuda:99"}, r"device='cuda:99', but this machine has \d+ such devices; 'cpu' always works"),
        ("1GiB", {"device": "mps"}, "device='mps': streaming knows 'cuda', 'xpu' and 'cpu'"),
        ("1GiB", {"hieght": 32}, "takes no 'hieght'"),
        ("1GiB", {"example": (1,)}, "example= is for modules"),
        ("1GiB", {"height": 33}, "height is 33"),
    ],
)
def test_nonsense_is_refused_before_anything_changes(
    stock: Stock, vram: Any, options: dict[str, Any], match: str
) -> None:
    pipeline = stock.pipeline("Wan2.1")
    with pytest.raises(ConfigError, match=match):
        fit(pipeline, vram, **{"device": "cpu", **options})
    assert all(offload_of(part) is None for part in models_of(pipeline).values())


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a int was given; expected a pipeline"):
        fit(3, "1GiB", device="cpu")
    with pytest.raises(ConfigError, match=r"a str was given; .* load it first: plan\(\) alone takes names and folders"):
        fit("wan2.1-14b", "1GiB", device="cpu")
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Module in it"):
        fit({"scheduler": object()}, "1GiB", device="cpu")
    with pytest.raises(ConfigError, match="modules take example="):
        fit(Net(), "1GiB", device="cpu", height=3)
    with pytest.raises(ConfigError, match="example= has 'three'; expected a mapping with arguments for some of one"):
        fit({"one": Net()}, "1GiB", device="cpu", example={"three": 1})


def test_a_refused_call_does_not_count_for_others() -> None:
    one, two, x = Net().eval(), Net().eval(), torch.randn(2, 64)
    expected = two(x[:1]), two(torch.cat([x, x]))
    with fit({"one": one, "two": two}, 90_000, device="cpu", example={"one": x}), torch.no_grad():
        with pytest.raises(PlanInfeasible):
            one(torch.randn(400, 64))
        assert torch.equal(two(x[:1]), expected[0])
        assert torch.equal(two(torch.cat([x, x])), expected[1])


def test_a_larger_call_from_another_thread_does_not_stop_what_runs() -> None:
    net, x, running, done = Net().eval(), torch.randn(2, 64), threading.Event(), threading.Event()
    larger, expected, found = torch.randn(30, 64), net(x), []

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():  # where calls are rehearsed, hooks and all
            running.set()
            assert done.wait(10)

    def run() -> None:
        with torch.no_grad():
            found.append(net(x))

    hook = net.blocks[3].register_forward_hook(wait)
    with fit(net, 70_000, device="cpu", example=x) as fitted, torch.no_grad():
        before = fitted.plan
        thread = threading.Thread(target=run)
        thread.start()
        assert running.wait(10)
        with pytest.raises(ConcurrentUseError, match="more than was planned for, and Net is running"):
            net(larger)
        done.set()
        thread.join()
        hook.remove()
        assert torch.equal(found[0], expected)
        assert fitted.plan is before
        net(larger)
        assert fitted.plan is not before


def test_what_components_share() -> None:
    one, two, x = Net().eval(), Net().eval(), torch.randn(2, 64)
    two.blocks[2].weight = one.blocks[2].weight  # type: ignore[union-attr]
    expected = one(x), two(x)
    with fit({"one": one, "two": two}, 90_000, device="cpu", example={"one": x, "two": x}) as fitted, torch.no_grad():
        for _ in range(2):
            assert torch.equal(one(x), expected[0])
            assert torch.equal(two(x), expected[1])
        assert fitted.plan.notes == ("two shares weights with one",)
    assert two.blocks[2].weight is one.blocks[2].weight
    with pytest.raises(ConflictError, match=r"part is one\.blocks\.1, one module"):
        fit({"one": one, "part": one.blocks[1]}, "1GiB", device="cpu")
    two.blocks[1] = one.blocks[1]
    with pytest.raises(ConflictError, match=r"two\.blocks\.1 is one\.blocks\.1"):
        fit({"one": one, "two": two}, "1GiB", device="cpu", example={"one": x})


class Stubborn(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:
            raise NotImplementedError("no such operator without memory")
        return super().forward(x)


def test_a_call_that_cannot_be_rehearsed_leaves_room_for_it() -> None:
    net, x = Stubborn(256, 12).eval(), torch.randn(300, 256)
    expected = net(x)
    with fit(net, "2MiB", device="cpu", example=x) as fitted, torch.no_grad():
        assert any("cannot be rehearsed (no such operator" in note for note in fitted.plan.notes)
        assert fitted.plan.component("Stubborn").device_bytes <= MIB
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_nearest_budget_for_a_call_that_nobody_knows_fits(is_known: bool) -> None:
    net, x = Stubborn(256, 12).eval(), torch.randn(3, 256)
    example = x if is_known else None
    with pytest.raises(PlanInfeasible) as refused:
        fit(net, 1000, device="cpu", example=example)
    nearest = refused.value.nearest_bytes
    with pytest.raises(PlanInfeasible) as refused:
        fit(net, nearest - 2, device="cpu", example=example)
    assert refused.value.nearest_bytes == nearest
    with fit(net, nearest, device="cpu", example=example) as fitted:
        assert fitted.plan.peak_bytes <= nearest


def test_smaller_chunks_where_nothing_else_fits(stock: Stock) -> None:
    pipeline = stock.pipeline("Wan2.1")
    call = {**call_of("Wan2.1"), "height": 256, "width": 512, "num_frames": 9, "output_type": "latent"}
    with pytest.raises(PlanInfeasible) as refused:
        plan(pipeline, 1000, device="cpu", **call)
    small = plan(pipeline, refused.value.nearest_bytes, device="cpu", **call)
    assert small.chunk_tokens in {512, 1024}
    assert any("tokens at a time" in note for note in small.notes)
    assert pipeline.transformer._ops.chunk_tokens is None


def test_what_is_offloaded_already_is_refused() -> None:
    net = Net().eval()
    offload = apply_group_offloading(net, "cpu")
    with pytest.raises(ConflictError, match="is offloaded already"):
        fit(net, "1GiB", device="cpu", example=torch.randn(1, 64))
    offload.remove()
    with fit(net, "1GiB", device="cpu", example=torch.randn(1, 64)), pytest.raises(ConflictError, match="already"):
        vramkit.fit(net, "1GiB", device="cpu")


def test_idle_components_leave_room_for_what_others_compute() -> None:
    modules, x = {"one": Net(256, 12).eval(), "two": Net(256, 12).eval()}, torch.randn(1000, 256)
    expected = {name: module(x) for name, module in modules.items()}
    # Room for the weights of both, or for some of those of one and what it computes.
    budget = sum(p.nbytes for module in modules.values() for p in module.parameters())
    with fit(modules, budget, device="cpu", example=dict.fromkeys(modules, x)) as fitted, torch.no_grad():
        for name in ("one", "two", "one"):
            assert torch.equal(modules[name](x), expected[name])
            held = sum(offload.held_bytes for offload in fitted.offloads.values())
            assert 0 < held <= budget - fitted.plan.component(name).activation_bytes


def test_an_error_while_applying_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, x = Net().eval(), Net().eval(), torch.randn(2, 64)
    real = vramkit.planning.apply.apply_group_offloading

    def failing(module: nn.Module, *args: Any, **options: Any) -> Any:
        if module is two:
            raise ConfigError("no room")
        return real(module, *args, **options)

    monkeypatch.setattr("vramkit.planning.apply.apply_group_offloading", failing)
    with pytest.raises(ConfigError, match="no room"):
        fit({"one": one, "two": two}, "1GiB", device="cpu", example={"one": x})
    assert offload_of(one) is None
    assert type(one) is Net


def test_weights_beyond_the_ram_are_on_disk(tmp_path: Any) -> None:
    net, x = Net(256, 12).eval(), torch.randn(4, 256)
    expected = net(x)
    with fit(net, 900_000, ram=1000, device="cpu", example=x, disk_folder=tmp_path) as fitted, torch.no_grad():
        assert fitted.plan.component("Net").store == "disk"
        assert set(fitted.stats()["Net"].stores) == {"disk"}
        assert torch.equal(net(x), expected)
        assert "disk" in fitted.explain()
    assert not list(tmp_path.iterdir())
    assert torch.equal(net(x), expected)


class Writer(Net):
    """Writes to what it is given, and draws."""

    def forward(self, x: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
        x.mul_(2)
        return super().forward(x) + torch.rand(1, 64) + torch.rand(1, 64, generator=noise)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_rehearsal_leaves_arguments_and_random_numbers_alone(is_known: bool) -> None:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        given = x.clone(), seeded()
        return net(*given), given[0], torch.rand(1), torch.rand(1, generator=given[1])

    net, x, example = Writer().eval(), torch.randn(2, 64), (torch.ones(2, 64), seeded())
    expected = call(x)
    state = torch.get_rng_state()
    with fit(net, 60_000, device="cpu", example=example if is_known else None), torch.no_grad():
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(example[0], torch.ones(2, 64))
        assert all(map(torch.equal, call(x), expected))


def test_what_cannot_be_copied_is_refused() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    assert arguments_of(x.to_sparse())[0][0].is_sparse
    with pytest.raises(ConfigError, match="an argument of the call cannot be copied"):
        fit(net, 60_000, device="cpu", example={"x": x, "lock": threading.Lock()})
    assert type(net) is Net


def test_text_is_generated_as_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part("LlamaForCausalLM").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    with fit(model, module_bytes(model), device="cpu") as fitted:  # the cache that a pass fills is not filled before
        assert torch.equal(model.generate(ids, **options), expected)
        assert fitted.stats()["LlamaForCausalLM"].loads > 0


def test_weights_that_came_later_are_planned_for() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    with fit(net, 60_000, device="cpu", example=x) as fitted, torch.no_grad():
        before = fitted.plan.component("Net").weight_bytes
        net.blocks[2] = nn.Sequential(net.blocks[2], nn.Linear(64, 16), nn.Linear(16, 64))
        net(x)
        planned, real = fitted.plan.component("Net"), fitted.stats()["Net"]
        assert planned.weight_bytes == module_bytes(net) > before
        assert real.resident_bytes + real.slots * real.slot_bytes <= planned.device_bytes
        plan = fitted.plan
        net(x)
        assert fitted.plan is plan
        net.blocks[3] = nn.Linear(64, 64 * 1024)
        with pytest.raises(PlanInfeasible):
            net(x)
        assert fitted.plan is plan


class Pair:
    """A pipeline."""

    def __init__(self, **components: nn.Module) -> None:
        vars(self).update(components)

    @property
    def components(self) -> dict[str, Any]:
        return dict(vars(self))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.two(self.one(x))  # type: ignore[attr-defined]
        return found


def test_a_component_that_is_replaced_is_planned_for() -> None:
    pair, x = Pair(one=Net().eval(), two=Net().eval()), torch.randn(2, 64)
    expected, first = pair(x), vars(pair)["two"]
    with fit(pair, 90_000, device="cpu", x=x) as fitted:
        vars(pair)["two"] = copy.deepcopy(first)
        assert torch.equal(pair(x), expected)
        assert offload_of(pair.components["two"]) is fitted.offloads["two"]
        assert offload_of(first) is None
    assert offload_of(pair.components["two"]) is None


def test_a_module_that_is_taken_out_of_a_mapping_runs_by_itself() -> None:
    one, two, x = Net().eval(), Net().eval(), torch.randn(2, 64)
    expected, kinds = (one(x), two(x)), {"one": one, "two": two}
    with fit(kinds, 90_000, device="cpu", example={"one": x, "two": x}) as fitted, torch.no_grad():
        del kinds["two"]
        assert torch.equal(one(x), expected[0])
        assert list(fitted.offloads) == ["one"]
        assert offload_of(two) is None
        kinds["two"] = two
        assert torch.equal(one(x), expected[0])  # sees that it is there again
        assert torch.equal(two(x), expected[1])
        assert list(fitted.offloads) == ["one", "two"]
        del kinds["one"]
        assert torch.equal(one(x), expected[0])  # is the first to see that it is gone
        assert list(fitted.offloads) == ["two"]
    assert type(one) is type(two) is Net


def test_a_handle_that_was_dropped_leaves_nothing_once_all_is_taken_off_by_hand() -> None:
    pair, x = Pair(one=Net().eval(), two=Net().eval()), torch.randn(2, 64)
    expected = pair(x)
    fit(pair, 90_000, device="cpu", x=x)
    parts = [offload_of(module) for module in pair.components.values()]
    assert None not in parts
    parts[0].remove()  # type: ignore[union-attr]
    with pytest.raises(ConflictError, match=r"Net is part of what fit runs already, with two; call remove\(\)"):
        fit(pair.components["one"], 90_000, device="cpu", example=x)
    parts[1].remove()  # type: ignore[union-attr]
    pair(torch.randn(64, 64))  # asks for more, and is no call of a plan
    assert not any(map(offload_of, pair.components.values()))
    with fit(pair, 90_000, device="cpu", x=x):
        assert torch.equal(pair(x), expected)
    assert type(pair) is Pair
    assert all(type(module) is Net for module in pair.components.values())


def test_a_call_while_a_module_is_open_for_changes_is_not_planned_for() -> None:
    net, x = Net().eval(), torch.randn(2, 64)
    with fit(net, 90_000, device="cpu", example=x) as fitted, torch.no_grad():
        offload = fitted.offloads["Net"]
        with offload.edit():
            net.blocks.append(nn.Linear(64, 64))
            expected = net(x)
            net(torch.randn(64, 64))  # asks for more than the budget, and all is in host memory
            assert offload_of(net) is None
        assert offload_of(net) is offload
        assert torch.equal(net(x), expected)  # is planned for now, with what was added
        assert fitted.plan.component("Net").weight_bytes == module_bytes(net)
    assert offload_of(net) is None


class Held:
    """A pipeline that reads its modules from the mapping that names them, and one by another name as well."""

    def __init__(self, **components: nn.Module) -> None:
        self.components = components
        self.last = components["two"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.components["two"](self.components["one"](x)))
        return found


def test_modules_are_twins_wherever_a_pipeline_has_them() -> None:
    pipeline = Held(one=Net().eval(), two=Net().eval())
    found = plan(pipeline, GIB, device="cpu", x=torch.randn(2, 64))
    assert max(phase.activation_bytes for phase in found.phases) < 4096  # no weight among them
    assert sorted(found.order) == ["one", "two"]


class Embedded:
    """A pipeline that is given embeddings and joins them."""

    def __init__(self) -> None:
        self.net = nn.Linear(512, 8).eval().requires_grad_(False)
        self.components = {"net": self.net}

    def __call__(self, embeds: torch.Tensor, negative_embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([negative_embeds, embeds]) * mask
        mask += 1
        return self.net(seen)  # type: ignore[no-any-return]


def test_what_a_caller_gives_a_pipeline_counts_as_long_as_the_call() -> None:
    given = {name: torch.randn(256, 512) for name in ("embeds", "negative_embeds")}
    given["mask"] = torch.ones(512, 1)
    pipeline = Embedded()
    size = 6 * given["embeds"].nbytes  # both, joined, and as much again without what the mask hides
    found = plan(pipeline, GIB, device="cpu", **given)
    assert size <= found.phases[0].activation_bytes <= size * 1.1
    assert size <= found.before_bytes <= size * 1.1
    assert torch.equal(given["mask"], torch.ones(512, 1))  # a rehearsal writes to nothing
    expected = pipeline(**given)
    given["mask"].fill_(1)
    with fit(pipeline, GIB, device="cpu", **given):
        assert torch.equal(pipeline(**given), expected)
    with pytest.raises(PlanInfeasible, match="MiB of activations"):
        fit(pipeline, size * 9 // 10, device="cpu", **given)
