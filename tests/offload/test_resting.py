"""Where weights come to rest and how they travel, loaded in every way, on a device whose driver refuses as the real one.

The bytes that arrive are compared with the module's; strangers beside the weights must stay as good to copy as before.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocations import fresh
from paper import DEVICE, PAGE, Backend, Driver
from safetensors.torch import load_file, save_file
from sweeps import sweep
from torch import nn

from vramkit import tensors
from vramkit.offload import assembly, load_mapped
from vramkit.offload.assembly import Assembly
from vramkit.offload.config import OffloadConfig
from vramkit.offload.disk import span_of
from vramkit.offload.memory_map import MemoryMap, range_of, written_pages
from vramkit.offload.pinning import own_pages
from vramkit.offload.resting import RestingPlace
from vramkit.offload.ring import Pieces

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where bytes lie")
WIDTH, BLOCKS = 512, 4  # 3 MiB in the largest weight: glibc may map it, or take it from the heap


class Net(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3 * width), nn.LayerNorm(3 * width), nn.Linear(3 * width, width))
            for _ in range(BLOCKS)
        )
        self.register_buffer("gain", torch.randn(width))


State = dict[str, torch.Tensor]
Found = tuple[State, list[torch.Tensor]]  # the weights, and tensors of others beside them
Loader = Callable[[State, Path], Found]


def constructed(state: State, folder: Path) -> Found:
    strangers, weights = [], {}
    for name, tensor in state.items():
        weights[name] = tensor.clone()
        strangers += [torch.randn(n) for n in (3, 900, 40_000)]
    return weights, strangers


def file_views(state: State, folder: Path) -> Found:
    extra = {f"extra.{name}": torch.randn(777) for name in state}
    save_file({**state, **extra}, folder / "m.safetensors")
    found = load_file(folder / "m.safetensors")
    return {name: found[name] for name in state}, [found[name] for name in extra]


def pickled_views(state: State, folder: Path) -> Found:
    extra = {f"extra.{name}": torch.randn(777) for name in state}
    torch.save({**extra, **state}, folder / "m.pt")
    found = torch.load(folder / "m.pt", mmap=True, weights_only=True)
    return {name: found[name] for name in state}, [found[name] for name in extra]


def written_views(state: State, folder: Path) -> Found:
    weights, strangers = file_views(state, folder)
    weights["blocks.1.0.weight"].data[5, 7] = 1.0
    strangers[3].zero_()
    state["blocks.1.0.weight"][5, 7] = 1.0
    return weights, strangers


def deleted_views(state: State, folder: Path) -> Found:
    found = file_views(state, folder)
    (folder / "m.safetensors").unlink()
    return found


def replaced_views(state: State, folder: Path) -> Found:
    found = file_views(state, folder)
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "other.safetensors")
    (folder / "other.safetensors").replace(folder / "m.safetensors")
    return found


def one_array(state: State, folder: Path) -> Found:
    """All weights are slices of one numpy array, strangers between them."""
    array = np.zeros(sum(tensor.nbytes + 3000 for tensor in state.values()) + 100, dtype=np.uint8)
    weights, strangers, at = {}, [], 100
    for name, tensor in state.items():
        weights[name] = torch.from_numpy(array[at : at + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
        weights[name].copy_(tensor)
        at += tensor.nbytes
        strangers.append(torch.from_numpy(array[at : at + 3000]))
        at += 3000
    return weights, strangers


def bytes_objects(state: State, folder: Path) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bytes cannot be written to
        return {
            name: torch.frombuffer(tensor.numpy().tobytes(), dtype=tensor.dtype).view(tensor.shape)
            for name, tensor in state.items()
        }, []


def shared_segments(state: State, folder: Path) -> Found:
    return {name: tensor.clone().share_memory_() for name, tensor in state.items()}, []


def one_segment(state: State, folder: Path) -> Found:
    """Weights of several processes in one segment, as servers pass them: never moved, and not its owner's alone."""
    segment = mmap.mmap(-1, sum(-(-tensor.nbytes // 64) * 64 for tensor in state.values()) + 8 * PAGE)
    weights, at = {}, 64
    for name, tensor in state.items():
        weights[name] = torch.frombuffer(segment, dtype=tensor.dtype, count=tensor.numel(), offset=at).view(
            tensor.shape
        )
        weights[name].copy_(tensor)
        at += -(-tensor.nbytes // 64) * 64
    return weights, [torch.frombuffer(segment, dtype=torch.uint8, offset=at)]


def lazy_bits(state: State, folder: Path) -> Found:
    weights = {name: torch._neg_view(-tensor) if tensor.ndim == 2 else tensor.clone() for name, tensor in state.items()}
    return weights, []


def with_holes(state: State, folder: Path) -> Found:
    return {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in state.items()}, []


LOADERS: dict[str, Loader] = {
    loader.__name__: loader
    for loader in (
        constructed,
        file_views,
        pickled_views,
        written_views,
        deleted_views,
        replaced_views,
        one_array,
        bytes_objects,
        shared_segments,
        one_segment,
        lazy_bits,
        with_holes,
    )
}


@pytest.fixture
def backend(driver: Driver) -> Iterator[Backend]:
    backend = Backend(driver)
    with backend.judged():
        yield backend


def placed(
    module: nn.Module, backend: Backend, *, store: Any = None, level: Any = "block_level", **options: Any
) -> tuple[Assembly, RestingPlace]:
    """Bring the weights of `module` to where they rest for the paper device."""
    config = OffloadConfig(device=DEVICE, granularity=level, store=store, **options)
    place = RestingPlace(config, backend)  # type: ignore[arg-type]
    return assembly.assemble(module, config, place), place


def arrived(parts: Assembly, backend: Backend) -> State:
    """Let every group travel, and return copies of what each module would be shown."""
    found: State = {}
    for group in parts.groups:
        slot = backend.memory(group.size_bytes)
        group.fill(Pieces(slot))
        for binding in group._bindings:
            found |= {f"{id(module)}.{name}": binding.placed_in(slot) for module, name in binding.slot.owners}
    for resident in parts.residents:
        found |= {f"{id(module)}.{name}": resident.on_device for module, name in resident.slot.owners}
    return found


def named(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, child in module.named_modules():
        for name in (*child._parameters, *child._buffers):
            yield (f"{prefix}.{name}" if prefix else name), child, name


def all_arrived(module: nn.Module, parts: Assembly, backend: Backend, state: State) -> bool:
    """Let every group travel, and tell whether each module is shown what `state` says."""
    found = arrived(parts, backend)
    return all(torch.equal(found[f"{id(child)}.{name}"], state[full]) for full, child, name in named(module))


def loaded(state: State, weights: State) -> nn.Module:
    with torch.device("meta"):
        module = Net().eval().requires_grad_(False)
    module.load_state_dict(weights, assign=True)
    assert module.state_dict().keys() == state.keys()
    return module


def fresh_state() -> State:
    return {name: tensor.detach().clone() for name, tensor in Net().state_dict().items()}


@sweep(
    "loader level store",
    product(LOADERS, ["block_level", "leaf_level", "model_level"], [None, "registered", "pageable"]),
)
def test_right_bytes_arrive_and_strangers_stay_good_to_copy(
    loader: str, level: str, store: Any, driver: Driver, backend: Backend, tmp_path: Path
) -> None:
    state = fresh_state()
    weights, strangers = LOADERS[loader](state, tmp_path)
    module = loaded(state, weights)
    del weights
    parts, place = placed(module, backend, store=store, level=level, slots=1)
    assert parts.groups
    found = arrived(parts, backend)
    for full, child, name in named(module):
        assert torch.equal(found[f"{id(child)}.{name}"], state[full]), full
    target = backend.memory(2**20)
    for stranger in strangers:
        target[: stranger.nbytes].copy_(tensors.byte_view(stranger))  # or the driver refuses
    kinds = {store.kind for group in parts.groups for _, _, store in group.stores}
    if store is None and loader in ("file_views", "pickled_views"):
        assert kinds == {"mapped"}
    elif store is None and loader == "written_views":
        assert kinds == {"mapped", "registered"}
    elif loader == "one_segment" or store == "pageable":
        assert kinds == {"pageable"}
    else:
        assert kinds == {"registered"}
    place.close()
    assert driver.locked == {}
    assert all(torch.equal(child.__getattr__(name), state[full]) for full, child, name in named(module))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_adapters_beside_layers_of_a_file_travel_as_one(
    level: str, driver: Driver, backend: Backend, tmp_path: Path
) -> None:
    """Each copy costs the host a start, and a 14B model has hundreds of layers with two small matrices each."""
    state = fresh_state()
    module = loaded(state, file_views(state, tmp_path)[0])
    for linear in [child for child in module.modules() if isinstance(child, nn.Linear)]:
        for name, shape in (("down", (96, linear.in_features)), ("up", (linear.out_features, 96))):
            linear.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parts, place = placed(module, backend, level=level, slots=1)
    kinds = [[store.kind for _, _, store in sorted(group.stores)] for group in parts.groups]
    assert all("registered" not in each[:-1] for each in kinds)  # behind the others, in one copy
    assert len([each for each in kinds if each[-1] == "registered"]) >= BLOCKS
    assert all_arrived(module, parts, backend, state)
    place.close()


@pytest.mark.parametrize("kind", ["mapped", "disk"])
def test_views_of_others_serve_stores_that_ask_for_files(
    kind: Any, driver: Driver, backend: Backend, tmp_path: Path
) -> None:
    state = fresh_state()
    module = loaded(state, file_views(state, tmp_path)[0])
    parts, place = placed(module, backend, store=kind)
    assert {store.kind for group in parts.groups for _, _, store in group.stores} == {kind}
    assert all_arrived(module, parts, backend, state)
    place.close()


@pytest.mark.parametrize("store", [None, "disk"])
def test_what_is_written_to_disk_is_locked_or_read_there(
    store: Any, driver: Driver, backend: Backend, tmp_path: Path
) -> None:
    module = Net().eval()  # its parameters count their initialisation
    state = copy.deepcopy(module.state_dict())
    parts, place = placed(module, backend, store=store, disk_folder=tmp_path / "spill")
    assert {s.kind for group in parts.groups for _, _, s in group.stores} == {store or "mapped"}
    assert all_arrived(module, parts, backend, state)
    place.close()
    assert not list((tmp_path / "spill").iterdir())


def test_shared_segments_stay_where_other_processes_see_them(driver: Driver, backend: Backend, tmp_path: Path) -> None:
    state = fresh_state()
    for make, options in ((shared_segments, {}), (one_segment, {}), (shared_segments, {"disk_folder": tmp_path / "x"})):
        weights = make(state, tmp_path)[0]
        module = loaded(state, weights)
        _, place = placed(module, backend, **options)
        for name, tensor in weights.items():
            if tensor.ndim == 2:
                assert module.get_parameter(name).data_ptr() == tensor.data_ptr()
        place.close()


def test_memory_of_which_others_locked_a_part_is_staged(driver: Driver, backend: Backend, tmp_path: Path) -> None:
    state = fresh_state()
    blocks = {name: own_pages(tensor.nbytes) for name, tensor in state.items()}
    weights = {}
    for name, tensor in state.items():
        weights[name] = blocks[name].view(tensor.dtype).view(tensor.shape)
        weights[name].copy_(tensor)
        size = blocks[name].nbytes if name.startswith("blocks.0") else PAGE
        assert driver.cudaHostRegister(blocks[name].data_ptr(), size, 0) == 0
    module = loaded(state, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that some could not be locked
        parts, place = placed(module, backend)
    assert {store.kind for _, _, store in parts.groups[0].stores} == {"registered"}
    assert {store.kind for _, _, store in parts.groups[1].stores} == {"pageable"}
    assert all_arrived(module, parts, backend, state)
    place.close()


def test_a_pinned_part_of_a_small_resident_does_not_break_its_copy(driver: Driver, backend: Backend) -> None:
    module = Net().eval()
    gain = own_pages(2 * PAGE)
    driver.cudaHostRegister(gain.data_ptr(), PAGE, 0)
    module.gain = gain[PAGE - 1024 : PAGE + 1024].view(torch.float32).fill_(3)
    parts, place = placed(module, backend)
    assert bool((arrived(parts, backend)[f"{id(module)}.gain"] == 3).all())
    place.close()


def test_large_constructed_weights_are_not_copied(driver: Driver, backend: Backend) -> None:
    module = nn.Sequential(*(nn.Linear(4096, 2560, bias=False, device="meta") for _ in range(4))).eval()
    for layer in module:
        layer.weight = nn.Parameter(fresh(lambda: torch.zeros(2560, 4096)))  # 40 MiB: glibc maps each
    before = [layer.weight.data_ptr() for layer in module]
    _, place = placed(module, backend, slots=1)
    assert [layer.weight.data_ptr() for layer in module] == before
    assert len(driver.locked) == 4
    place.close()


@pytest.mark.parametrize("is_deleted", [False, True])
def test_large_views_of_a_file_are_not_taken_for_allocations(
    is_deleted: bool, driver: Driver, backend: Backend, tmp_path: Path
) -> None:
    """Each is a storage of its own of 40 MiB, and shares its first and last page with its neighbours."""
    names = [f"{i}.weight" for i in range(3)]
    extra = {f"{i}.weight.next": torch.randn(500) for i in range(3)}
    save_file({**{name: torch.randn(2560, 4096) for name in names}, **extra}, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(4096, 2560, bias=False) for _ in names)).eval().requires_grad_(False)
    module.load_state_dict({name: found[name] for name in names}, assign=True)
    expected = [layer.weight.clone() for layer in module]
    if is_deleted:
        (tmp_path / "m.safetensors").unlink()
    parts, place = placed(module, backend, slots=1)
    kinds = {store.kind for group in parts.groups for _, _, store in group.stores}
    assert kinds == {"registered" if is_deleted else "mapped"}
    weights = arrived(parts, backend)
    assert all(torch.equal(weights[f"{id(layer)}.weight"], w) for layer, w in zip(module, expected, strict=True))
    target = backend.memory(2000)
    for name in extra:
        target.copy_(tensors.byte_view(found[name]))
    place.close()


def test_opening_a_view_copies_no_page(driver: Driver, backend: Backend, tmp_path: Path) -> None:
    state = fresh_state()
    module = loaded(state, file_views(state, tmp_path)[0])
    _, place = placed(module, backend)
    for parameter in module.parameters():
        assert span_of(parameter) is not None
        assert written_pages(range_of(parameter)) == []
    (mapping,) = {str(MemoryMap.of_process().classify(p).mapping) for p in module.parameters()}
    assert "m.safetensors" in mapping  # the one that the loader made
    assert [flags for _, flags in driver.locked.values()] == [8]  # of the whole file, read-only, once
    place.close()


def test_mapped_files_of_ours_serve_as_before(driver: Driver, backend: Backend, tmp_path: Path) -> None:
    state = fresh_state()
    save_file(state, tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = Net().eval()
    load_mapped(module, tmp_path / "m.safetensors")
    parts, place = placed(module, backend)
    assert {store.kind for group in parts.groups for _, _, store in group.stores} == {"mapped"}
    assert all_arrived(module, parts, backend, state)
    place.close()


def test_read_only_mappings_that_others_share_are_views_of_their_file(
    driver: Driver, backend: Backend, tmp_path: Path
) -> None:
    state = fresh_state()
    path = tmp_path / "m.bin"
    path.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in state.values()))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    weights, at = {}, 0
    for name, tensor in state.items():
        raw = (ctypes.c_ubyte * tensor.nbytes).from_address(start + at)
        weights[name] = torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
        at += tensor.nbytes
    module = loaded(state, weights)
    parts, place = placed(module, backend)
    assert {store.kind for group in parts.groups for _, _, store in group.stores} == {"mapped"}
    assert all_arrived(module, parts, backend, state)
    place.close()
