"""Acceptance 26 and 27: whoever reads a weight gets the right one, and nothing is read where it rests."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sweeps import sweep
from torch import nn
from torch.nn import functional as F

from vramkit import hooks
from vramkit.errors import ConflictError
from vramkit.offload import apply_group_offloading, apply_model_offload
from vramkit.offload.tables import TableHook
from vramkit.offload.tensor_slot import TensorSlot

WIDTH = 32
LEVELS = ["block_level", "leaf_level", "model_level"]
WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "block_1": {"slots": 1},
    "two_blocks": {"num_blocks_per_group": 2, "slots": 1},
    "some_resident": {"resident": "40KiB", "slots": 1},
    "leaf": {"offload_type": "leaf_level"},
    "leaf_small": {"offload_type": "leaf_level", "unit_bytes": 5000},
    "model": {"offload_type": "model_level"},
}


WRITING_WAYS = ["block", "block_1", "two_blocks", "model"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)


def tokens() -> torch.Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(5))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.qkv(x).chunk(3, -1)[0])


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = FeedForward()
        self.gain = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.attn(x)) @ self.gain


class PastTheParent(Block):
    """As in Flux and Open-Sora: children of the attention are called, the attention never is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attn.qkv(x).chunk(3, -1)
        return x + self.mlp(self.attn.proj(F.scaled_dot_product_attention(query, key, value)))


class ForwardOfAChild(Block):
    """As in Step-Video's text encoder."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp.forward(self.attn.forward(x))


class OwnCall(Block):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) * 2


class OwnSequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.own


class CalledList(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x)) @ self.own


class Yields(Block):
    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:  # type: ignore[override]
        yield self.attn(x)
        yield x @ self.gain


class KeepsAList(Block):
    """A plain list of weights, made before the module was offloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.gain, self.attn.proj.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ torch.stack(self.weights).sum(0)


class AsksForPlaces(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.mlp.up.weight.device == x.device
        assert self.mlp.up.weight.dtype == x.dtype
        assert next(self.parameters()).shape == self.gain.shape
        return super().forward(x.to(self.mlp.up.weight.device))


class OwnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight


class OtherWays(Block):
    """Through lists, keywords, operators and functions of autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.attn.proj.weight, self.gain], dim=0)[:WIDTH]
        x = torch.addmm(input=x[0], mat1=x[0], mat2=self.gain)[None] + x
        x = torch.einsum("bsc,dc->bsd", x, joined) + torch.ops.aten.mm(x[0], self.attn.proj.weight)
        return OwnProduct.apply(x, self.mlp.down.weight[:, :WIDTH]) + self.mlp.up.weight.T[0, :WIDTH]


class Trunk(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module], run: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(5))
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


class Probes(Trunk):
    """TeaCache: a part of the first block is called before the blocks run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probe = self.blocks[0].attn.qkv(x).mean()
        return super().forward(x) + probe


class Tied(Trunk):
    """A head that multiplies by the weight of the embedder."""

    def __init__(self) -> None:
        super().__init__(Block, lambda block, x: block(x))
        self.embed = nn.Linear(WIDTH, 4 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(self.embed(x)[..., :WIDTH])
        return x @ self.embed.weight.T


def plainly(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = block(x)
    return y


NETS: dict[str, Callable[[], nn.Module]] = {
    "children past their parent": lambda: Trunk(PastTheParent, plainly),
    "forward of a child": lambda: Trunk(ForwardOfAChild, plainly),
    "block.forward": lambda: Trunk(Block, lambda block, x: block.forward(x)),
    "type(block).forward": lambda: Trunk(Block, lambda block, x: type(block).forward(block, x)),
    "own __call__": lambda: Trunk(OwnCall, plainly),
    "own Sequential": lambda: Trunk(OwnSequential, plainly),
    "called ModuleList": lambda: Trunk(CalledList, plainly),
    "generators": lambda: Trunk(Yields, lambda block, x: sum(block(x))),
    "parts called by the trunk": lambda: Trunk(Block, lambda block, x: x + block.mlp(block.attn(x)) @ block.gain),
    "probe of the first block": lambda: Probes(Block, plainly),
    "tied by hand": Tied,
    "a plain list": lambda: Trunk(KeepsAList, plainly),
    "places asked for": lambda: Trunk(AsksForPlaces, plainly),
    "other ways": lambda: Trunk(OtherWays, plainly),
}


def same(module: nn.Module, reference: nn.Module, calls: int = 3) -> None:
    with torch.no_grad():
        for _ in range(calls):
            assert_equal(module(tokens()), on(reference, reference(on(reference, tokens()))))


def assert_restored(module: nn.Module, reference: nn.Module) -> None:
    """What remove() leaves: ordinary parameters in host memory, with the values that they had."""
    for parameter, expected in zip(module.parameters(), reference.parameters(), strict=True):
        assert type(parameter).__module__ in ("torch.nn.parameter", __name__)
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, expected.cpu())
    if next(reference.parameters()).device.type == "cpu":
        same(module, reference, calls=1)


def on(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.to(next(module.parameters()).device)


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.device == expected.device
    assert torch.equal(got, expected)


def pair(make: Callable[[], nn.Module], device: str = "cpu") -> tuple[Any, Any]:
    """The same module twice: to offload, and resident on the device."""
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        both.append(make().eval().requires_grad_(False))
    return both[0], both[1].to(device)


@on_devices
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", NETS)
def test_weights_are_read_on_the_device(device: str, net: str, way: str, strict: None) -> None:
    module, reference = pair(NETS[net], device)
    offload = apply_group_offloading(module, device, **WAYS[way])
    same(module, reference)
    offload.remove()
    assert_restored(module, reference)


@pytest.mark.parametrize("net", ["children past their parent", "parts called by the trunk", "forward of a child"])
def test_what_was_read_once_travels_ahead_from_then_on(net: str) -> None:
    module, _ = pair(NETS[net])
    offload = apply_group_offloading(module, "cpu", offload_type="leaf_level", unit_bytes=5000)
    with torch.no_grad():
        module(tokens())
        module(tokens())
        before = offload.stats()
        module(tokens())
    after = offload.stats()
    assert after.demand_loads == before.demand_loads
    assert after.loads - before.loads >= after.groups
    offload.remove()


# --- one module in several places


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) * self.gain


class SharingBlock(nn.Module):
    def __init__(self, shared: nn.Module, inner: list[nn.Module]) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.shared = shared
        self.inner = tuple(inner)  # not a child: called, and listed elsewhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(self.a(x))
        for block in self.inner:
            y = block(y)
        return x + self.b(self.shared(y))


def sharing(*, nested: bool) -> nn.Module:
    shared = Shared()
    blocks: list[nn.Module] = []
    for _ in range(4):
        blocks.insert(0, SharingBlock(shared, blocks[:1] if nested else []))
    trunk = Trunk(Block, plainly)
    trunk.blocks = nn.ModuleList(blocks)
    if nested:
        trunk.run = lambda block, x: block(x) if block is trunk.blocks[0] else x
    return trunk


@on_devices
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_module_in_several_blocks_is_right_in_all_of_them(device: str, nested: bool, way: str, strict: None) -> None:
    module, reference = pair(lambda: sharing(nested=nested), device)
    offload = apply_group_offloading(module, device, **WAYS[way])
    same(module, reference)
    offload.remove()
    assert_restored(module, reference)


# --- calls that nobody named


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = FeedForward()
        self.text = nn.Sequential(nn.Linear(WIDTH, WIDTH), FeedForward())
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)

    def text_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.text[1](self.text[0](x)) @ self.projection.weight

    def steps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
            yield x @ self.projection.weight

    def weight_norm(self) -> torch.Tensor:
        return torch.stack([parameter.norm() for parameter in self.parameters()]).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.steps(self.visual(x)), start=self.text_features(x))


CALLS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "forward": lambda clip, x: clip(x),
    ".forward": lambda clip, x: clip.forward(x),
    "a part": lambda clip, x: clip.visual(x),
    "a layer": lambda clip, x: clip.layers[1](x),
    "a method": lambda clip, x: clip.text_features(x),
    "a generator": lambda clip, x: torch.stack(list(clip.steps(x))),
    "a generator between calls": lambda clip, x: torch.stack([step + clip(x) for step in clip.steps(x)]),
    "a generator that is left": lambda clip, x: next(clip.steps(x)),
    "a sum over weights": lambda clip, x: clip.weight_norm(),
}


@on_devices
@sweep("call way", itertools.product(CALLS, WAYS), together=1)
def test_whatever_is_called_finds_its_weights(device: str, call: str, way: str, strict: None) -> None:
    module, reference = pair(Clip, device)
    offload = apply_group_offloading(module, device, **WAYS[way])
    with torch.no_grad():
        for _ in range(2):
            assert_equal(CALLS[call](module, tokens()), CALLS[call](reference, on(reference, tokens())))
    same(module, reference, calls=1)
    offload.remove()
    assert vars(module).keys() == vars(reference).keys()


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_a_generator_goes_on_with_the_units_that_were_formed_since_it_began(level: str, strict: None) -> None:
    module, reference = pair(Clip, "cpu")
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    with torch.no_grad():
        steps, expected = module.steps(tokens()), list(reference.steps(tokens()))
        assert_equal(next(steps), expected[0])
        with offload.edit():
            pass
        assert_equal(next(steps), expected[1])
        offload.remove()
        assert_equal(next(steps), expected[2])
        assert not list(steps)


@on_devices
@pytest.mark.parametrize("call", ["a part", "a layer", "a method", "a generator"])
def test_components_that_take_turns_are_loaded_by_any_call(device: str, call: str, strict: None) -> None:
    module, reference = pair(Clip, device)
    other = FeedForward().eval()
    handles = apply_model_offload({"clip": module, "other": other}, device)
    with torch.no_grad():
        for _ in range(2):
            loads = handles.offloads["clip"].stats().loads
            assert_equal(CALLS[call](module, tokens()), CALLS[call](reference, on(reference, tokens())))
            assert handles.offloads["clip"].stats().loads == loads + 1
            other(tokens())
    handles.remove()


def test_a_state_dict_taken_inside_a_method_is_of_what_rests() -> None:
    class Saves(Trunk):
        def saved(self) -> dict[str, torch.Tensor]:
            return self.state_dict()

    module, reference = pair(lambda: Saves(Block, plainly))
    offload = apply_group_offloading(module, "cpu")
    held = module.saved()
    assert offload.stats().demand_loads == 0
    same(module, reference)
    assert all(torch.equal(held[name], tensor) for name, tensor in reference.state_dict().items())
    offload.remove()


def test_a_submodule_named_as_an_entry_point_stays_one() -> None:
    class Codec(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
            self.decode = FeedForward()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.encode:
                x = layer(x)
            return self.decode(x) + self.decode.down.bias.mean()

    for level in LEVELS:
        module, reference = pair(Codec)
        offload = apply_group_offloading(module, "cpu", offload_type=level, slots=1)
        assert isinstance(module.encode, nn.Sequential)
        same(module, reference)
        offload.remove()


# --- what leaves a module


class Positions(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 64, WIDTH))
        self.form = form

    def forward(self, count: int) -> Any:
        table = self.table
        if self.form == "whole":
            return table
        if self.form == "view":
            return table[:, :count].expand(2, -1, -1)
        return {"nested": (table[:, :count], count)} if self.form == "nested" else lambda: table[:, :count]


class ReturnsItsWeight(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.positions = Positions(form)
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.positions(x.shape[1])
        for block in self.blocks:
            table = given["nested"][0] if isinstance(given, dict) else given() if callable(given) else given
            x = torch.tanh(block(x + table[:, : x.shape[1]]))
        return x


@on_devices
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["whole", "view", "nested", "closure"])
def test_a_weight_that_is_returned_is_right_until_the_end(device: str, form: str, way: str, strict: None) -> None:
    module, reference = pair(lambda: ReturnsItsWeight(form), device)
    offload = apply_group_offloading(module, device, **WAYS[way])
    same(module, reference)
    loads = offload.stats().loads
    same(module, reference)
    assert offload.stats().loads - loads <= 3 * offload.stats().groups  # nothing is loaded twice for it
    offload.remove()
    assert_restored(module, reference)


class KeepsAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if not self.kept:
            self.kept.append(self.lin.weight.t())
        return y @ self.kept[0]


@on_devices
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_a_view_that_a_module_keeps_stays_right(device: str, level: str, slots: int) -> None:
    module, reference = pair(lambda: nn.Sequential(*(KeepsAView() for _ in range(8))), device)
    offload = apply_group_offloading(module, device, offload_type=level, slots=slots)
    same(module, reference, calls=4)
    assert offload.stats().kept_bytes > 0
    offload.remove()


@on_devices
def test_a_weight_that_the_user_keeps_stays_right(device: str) -> None:
    class Returns(Trunk):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.blocks[0].gain

    module, reference = pair(lambda: Returns(Block, plainly), device)
    offload = apply_group_offloading(module, device, slots=1)
    with torch.no_grad():
        kept = [module(tokens())[1] for _ in range(3)]
    for _ in range(2):
        assert all(torch.equal(weight, reference.blocks[0].gain) for weight in kept)
        offload.remove()


def test_nothing_stays_for_a_view_that_is_gone_before_the_pass_ends() -> None:
    module, _ = pair(lambda: ReturnsItsWeight("view"))
    offload = apply_group_offloading(module, "cpu")
    with torch.no_grad():
        module(tokens())
    assert offload.stats().kept_bytes == 0
    offload.remove()


# --- what a forward writes


class ActNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.eye(WIDTH), requires_grad=False)
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("ready", torch.tensor(0))

    def write(self, factor: torch.Tensor) -> None:
        self.scale.div_(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        if not self.ready:
            self.write(x.std())
            self.ready.fill_(1)
        return x @ self.scale


class WritesThroughData(ActNorm):
    def write(self, factor: torch.Tensor) -> None:
        self.scale.data.div_(factor)


class AssignsData(ActNorm):
    def write(self, factor: torch.Tensor) -> None:
        self.scale.data = self.scale.data / factor


class AssignsDataTwice(AssignsData):
    def write(self, factor: torch.Tensor) -> None:
        super().write(factor)
        super().write(factor)


class KeepsWhatItAssignsOver(AssignsData):
    """Its views are of memory that the parameter has left."""

    def write(self, factor: torch.Tensor) -> None:
        self.views = [self.scale[:4], self.scale.t()]
        super().write(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.views[0].sum() + self.views[1].sum()


class AssignsMemory(ActNorm):
    def write(self, factor: torch.Tensor) -> None:
        self.scale.set_(self.scale / factor)


class Swaps(ActNorm):
    def write(self, factor: torch.Tensor) -> None:
        torch.utils.swap_tensors(self.scale, nn.Parameter(self.scale / factor, requires_grad=False))


class AddsToData(ActNorm):
    def write(self, factor: torch.Tensor) -> None:
        self.scale.data += factor


class Replaces(ActNorm):
    def write(self, factor: torch.Tensor) -> None:
        self.scale = nn.Parameter(self.scale / factor, requires_grad=False)


class WritesToAnother(ActNorm):
    def __init__(self) -> None:
        super().__init__()
        self.other: tuple[nn.Module, ...] = ()

    def write(self, factor: torch.Tensor) -> None:
        for other in self.other:
            other.scale.div_(factor)


WRITING = [
    *(ActNorm, WritesThroughData, AssignsData, AssignsDataTwice),
    *(KeepsWhatItAssignsOver, AssignsMemory, Swaps, AddsToData),
]


def writing(kind: type[ActNorm]) -> nn.Module:
    blocks = [kind() for _ in range(4)]
    for block, following in itertools.pairwise(blocks):
        if isinstance(block, WritesToAnother):
            block.other = (following,)
    return nn.Sequential(*blocks)


@on_devices
@sweep("kind way", itertools.product([*WRITING, Replaces, WritesToAnother], WRITING_WAYS), together=1)
def test_what_a_forward_writes_to_a_weight_is_kept(device: str, kind: type[ActNorm], way: str) -> None:
    module, reference = pair(lambda: writing(kind), device)
    offload = apply_group_offloading(module, device, **WAYS[way])
    same(module, reference)
    held, expected = module.state_dict(), reference.state_dict()
    offload.remove()
    for state in (held, module.state_dict()):
        assert all(torch.equal(state[name].cpu(), tensor.cpu()) for name, tensor in expected.items())


# --- tables


@pytest.mark.parametrize("kind", WRITING)
def test_what_a_forward_writes_to_a_weight_that_stays_is_kept(kind: type[ActNorm], strict: None) -> None:
    module, reference = pair(lambda: writing(kind))
    offload = apply_group_offloading(module, "cpu", offload_type="leaf_level")  # where blocks' own weights stay
    for change in (lambda: offload.adapt(slots=2), offload.rest, offload.remove):
        for block in (*module, *reference):
            block.ready.zero_()
        same(module, reference)
        change()
        same(module, reference, calls=1)
    for name, weight in reference.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)


class CallsWithOthers(nn.Module):
    """Puts other tensors in the place of a block's weights, for one call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            halves = {name: weight * 0.5 for name, weight in block.named_parameters()}
            x = torch.func.functional_call(block, halves, (x,)) + block(x)
        return x


@pytest.mark.parametrize("way", ["block", "block_1", "leaf_small"])
def test_tensors_of_a_functional_call_are_never_taken_for_the_weights(way: str, strict: None) -> None:
    module, _ = pair(CallsWithOthers)
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    with torch.no_grad(), pytest.raises(ConflictError, match="functional_call"):
        module(tokens())
    offload.remove()
    assert all(torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())


class GivesAway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + self.down(torch.tanh(self.up(self.norm(x)))), self.up.weight, self.down.weight[:3]


class Collects(nn.Module):
    """Gives the weights of its last block away; units are formed anew after the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GivesAway() for _ in range(5))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        weights: list[torch.Tensor] = []
        for block in self.blocks:
            x, *weights = block(x)
            weights[0].mul_(0.9)
        return [x, *weights]


@pytest.mark.parametrize("way", WAYS)
def test_writes_to_weights_that_were_given_away_are_kept(way: str) -> None:
    module, reference = pair(Collects)
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    with torch.no_grad():
        for _ in range(3):
            (got, *weights), (expected, *others) = module(tokens()), reference(tokens())
            assert_equal(got, expected)
            for weight in (*weights, *others):
                weight.mul_(0.9)
    offload.remove()
    assert_equal(module(tokens())[0], reference(tokens())[0])


class TiedInside(nn.Module):
    """A weight of a layer that the block has too: it stays for the one and travels for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.shift = self.up.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) @ self.scale + self.shift.sum()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_writes_to_a_tied_weight_reach_all_that_have_it(way: str, through_data: bool, strict: None) -> None:
    module, reference = pair(lambda: nn.Sequential(*(TiedInside() for _ in range(4))))
    offload = apply_group_offloading(module, "cpu", **WAYS[way])
    same(module, reference)
    for net in (module, reference):
        (net[1].shift.data if through_data else net[1].shift).mul_(3)
    same(module, reference)
    offload.remove()
    same(module, reference, calls=1)


def tied_ends() -> nn.Module:
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    net[5].weight = net[0].weight
    return net


@pytest.mark.parametrize("resident", range(5_000, 25_000, 5_000))
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_tied_weights_stay_one_tensor_where_one_of_them_stays_on_the_device(level: str, resident: int) -> None:
    module, reference = pair(tied_ends)
    offload = apply_group_offloading(module, "cpu", offload_type=level, slots=1, unit_bytes=5_000, resident=resident)
    for _ in range(2):
        assert module[0].weight is module[5].weight
        same(module, reference)
    assert list(dict(module.named_parameters())) == list(dict(reference.named_parameters()))
    stats = offload.stats()
    assert stats.resident_bytes > 0 < stats.streamed_bytes
    offload.remove()
    assert module[0].weight is module[5].weight


class ReplacesABlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, *self.blocks[:2]):
            x = block(x)
        torch.manual_seed(4)
        self.blocks[1] = FeedForward().eval().requires_grad_(False)
        return x


@pytest.mark.parametrize("level", ["block_level", "leaf_level", "model_level"])
def test_a_forward_may_replace_modules(level: str) -> None:
    module, reference = pair(ReplacesABlock)
    offload = apply_group_offloading(module, "cpu", offload_type=level)
    same(module, reference)
    offload.remove()


class Learned(nn.Embedding):
    """Learned positions: the argument is ids, only their number counts."""

    def forward(self, ids: torch.Tensor, past: int = 0) -> torch.Tensor:
        return super().forward(torch.arange(past, past + ids.shape[1], device=self.weight.device) + 2)


class Shaped(nn.Embedding):
    def forward(self, shape: torch.Size, past: int = 0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(torch.arange(past, past + shape[1]))


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(ids) * scale


class Centred(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) - self.weight.mean(0) + self.weight.sum(0).to(torch.float64).float()


IDS = torch.tensor([[3, 7, 3, 9], [0, 1, 7, 2]])
LOOKUPS: dict[str, tuple[Callable[[], nn.Embedding], Any, dict[str, Any]]] = {
    "plain": (lambda: nn.Embedding(64, WIDTH, padding_idx=3), IDS, {}),
    "learned": (lambda: Learned(64, WIDTH), IDS, {"past": 3}),
    "shaped": (lambda: Shaped(64, WIDTH), IDS.shape, {}),
    "scaled": (lambda: Scaled(64, WIDTH), IDS, {"scale": 2.0}),
    "centred": (lambda: Centred(64, WIDTH), IDS, {}),
}


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_tables_are_looked_up_whatever_their_forward_takes(lookup: str) -> None:
    make, given, options = LOOKUPS[lookup]
    table = make()
    weight = table.weight
    with torch.no_grad():
        expected = table(given, **options)
        attachment = hooks.attach(table, TableHook(TensorSlot(weight, [(table, "weight")]), None, torch.device("cpu")))
        assert torch.equal(table(given, **options), expected)
        attachment.remove()
    assert table.weight is weight


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2**16, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.inside = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + F.embedding(ids + 1, self.embed.weight)
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight[: 2**10].T


@on_devices
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_table_that_others_read_is_loaded_whole_for_them(
    device: str, level: str, gradients: bool, strict: None
) -> None:
    module, reference = pair(Language, device)
    reference.requires_grad_(False)
    offload = apply_group_offloading(module, device, offload_type=level)
    assert offload.stats().table_bytes == module.embed.weight.nbytes
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            assert_equal(module(IDS), reference(on(reference, IDS)))
        assert_equal(module.embed(IDS), reference.embed(on(reference, IDS)))
    offload.remove()


# --- what weights are to others


class Marked(nn.Parameter):
    """A class that marks a parameter and changes nothing."""


class UsesAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.lin.weight.scale = 2.0
        self.own = Marked(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.own, Marked)
        assert isinstance(self.lin.weight, nn.Parameter)
        return self.lin(x) @ self.own * self.lin.weight.scale


@on_devices
@pytest.mark.parametrize("way", WAYS)
def test_attributes_and_classes_of_parameters_are_theirs_on_the_device_too(device: str, way: str, strict: None) -> None:
    module, reference = pair(lambda: nn.Sequential(*(UsesAttributes() for _ in range(4))), device)
    offload = apply_group_offloading(module, device, **WAYS[way])
    same(module, reference)
    assert type(module[0].own).__name__ == "Marked"
    offload.remove()
    assert type(module[0].own) is Marked
    assert module[0].lin.weight.scale == 2.0


def test_parameters_at_rest_are_what_they_were_to_whoever_looks() -> None:
    module, reference = pair(lambda: Trunk(Block, plainly))
    offload = apply_group_offloading(module, "cpu", slots=1)
    for parameter, expected in zip(module.parameters(), reference.parameters(), strict=True):
        assert isinstance(parameter, nn.Parameter)
        assert repr(parameter).startswith("Parameter containing")
        assert torch.equal(parameter, expected)
        assert (parameter.device, parameter.dtype, parameter.shape) == (expected.device, expected.dtype, expected.shape)
        assert torch.equal(torch.from_numpy(parameter.detach().numpy()), expected)
        assert type(parameter.detach()) is type(parameter + 0) is torch.Tensor
        assert type(copy.deepcopy(parameter)) is nn.Parameter
    offload.remove()
