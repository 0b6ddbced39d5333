"""Turn a module and a config into groups, residents and tables. The only code that sees all the nouns at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from vramkit import tensors
from vramkit.memory import tensor_bytes
from vramkit.offload.config import OffloadConfig
from vramkit.offload.group import ModuleGroup
from vramkit.offload.inventory import Inventory, Item
from vramkit.offload.layout import BufferLayout
from vramkit.offload.partition import Partition, Unit, partition, slot_bytes_for
from vramkit.offload.residents import Resident, Residents
from vramkit.offload.resting import RestingPlace
from vramkit.offload.stores import Store
from vramkit.offload.tensor_slot import TensorSlot
from vramkit.offload.uses import Times

__all__ = ["Assembly", "Footprint", "assemble", "footprints", "partitioned", "streaming"]

_SMALL_LEAF_BYTES = 256 * 2**10  # a copy of this size takes as long as its set-up
_SMALL_LEAF_SHARE = 256  # of a unit: a leaf below this stays on the device ...
_SMALL_LEAVES_SHARE = 64  # ... and all of those together are at most this share of the unit


@dataclasses.dataclass(slots=True)
class Assembly:
    """What the engine runs: groups in the order of their units, and everything that does not travel."""

    groups: list[ModuleGroup]
    residents: Residents
    tables: list[tuple[nn.Embedding, TensorSlot]]
    table_groups: list[ModuleGroup]
    """The same tables, for whoever reads the whole weight."""
    slot_bytes: int
    units: tuple[Unit, ...]

    def resting_values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each tensor that owners have now with an ordinary one in host memory that has its values."""
        known: dict[int, torch.Tensor] = {}  # tied ones have several slots, some of which may stay on the device
        for resident in self.residents:
            shown, rest = resident.current(), resident.slot.rest
            if shown is not None:
                is_sparse = bool(tensors.sparse_parts(shown))
                known[id(rest)] = shown.cpu() if is_sparse else tensors.like_owned(rest, shown)
                yield shown, known[id(rest)]
        for group in (*self.groups, *self.table_groups):
            for slot in group.slots():
                if id(slot.rest) not in known:
                    known[id(slot.rest)] = tensors.like_owned(slot.rest, slot.rest)
                yield slot.rest, known[id(slot.rest)]
                placed = group.on_device(slot.rest)
                if placed is not None:
                    yield placed, known[id(slot.rest)]


@dataclasses.dataclass(slots=True, eq=False)
class _Plan:
    """A unit that will stream: its tensors, each with the leaves that travel and those that are too small to."""

    unit: Unit
    items: list[tuple[Item, list[bool]]]  # travels, for each leaf

    def leaves(self) -> list[torch.Tensor]:
        return [leaf for item, travels in self.items for leaf, goes in zip(item.leaves(), travels, strict=True) if goes]


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes of a module as it would be assembled; see `footprints`."""

    unit_bytes: tuple[int, ...]
    """Of each unit in a slot, in order."""
    fixed_bytes: int
    """What stays on the device although nothing was chosen to: small layers, norms, buffers."""
    table_bytes: int
    """Embeddings that are looked up where they rest."""
    whole_bytes: int
    """Everything but the tables, tied tensors once."""


def footprints(module: nn.Module, configs: Iterable[OffloadConfig]) -> Iterator[Footprint]:
    """Tell what `assemble` would make of `module`, which may be on the meta device, by each config. Nothing is changed.

    Raises:
        ConflictError, UnsupportedTensorError: as `assemble`.
    """
    inventory = Inventory(module, needs_values=False)
    total = sum(tensor_bytes(item.tensor) for item in inventory)
    for config in configs:
        parts = partitioned(module, config, None)
        plans = _without_staying([_plan(unit, inventory) for unit in parts.units], parts.tables)
        travelling = {  # tied ones may travel in two units
            id(item.tensor): sum(leaf.nbytes for leaf, goes in zip(item.leaves(), travels, strict=True) if goes)
            for plan in plans
            for item, travels in plan.items
        }
        tables = sum(tensor_bytes(item.tensor) for item in inventory.parameters_of(parts.tables))
        sizes = tuple(BufferLayout.of(plan.leaves()).size_bytes for plan in plans)
        yield Footprint(sizes, total - sum(travelling.values()) - tables, tables, total - tables)


def partitioned(module: nn.Module, config: OffloadConfig, times: Times | None) -> Partition:
    """Partition `module` as `config` says, by the `times` at which its parts are used if they are known."""
    return partition(
        module,
        granularity=config.granularity,
        blocks_per_group=config.blocks_per_group,
        block_names=config.block_names,
        unit_bytes=config.unit_bytes,
        slots=config.slots,
        times=times,
    )


def assemble(
    module: nn.Module,
    config: OffloadConfig,
    place: RestingPlace,
    times: Times | None = None,
    on_device: dict[int, torch.Tensor] | None = None,
) -> Assembly:
    """Partition `module`, bring its weights to where they rest, and put what stays on the device there.

    `on_device` are tensors that are there already, by the id of the tensor at rest; it is emptied.

    Raises:
        ConfigError, ConflictError, UnsupportedTensorError: before anything was changed.
    """
    inventory = Inventory(module)
    place.survey(inventory)
    parts = partitioned(module, config, times)
    tables = list(parts.tables)
    plans = _without_staying([_plan(unit, inventory) for unit in parts.units], tables)
    sizes = [BufferLayout.of(plan.leaves()).size_bytes for plan in plans]
    streams = streaming(sizes, config)
    plans = _without_staying([plan for plan, does in zip(plans, streams, strict=True) if does], tables)
    sizes = [BufferLayout.of(plan.leaves()).size_bytes for plan in plans]

    table_items = [item for table in tables for item in inventory.parameters_of([table])]  # tied tables share one
    place.check(leaf for plan in plans for leaf in plan.leaves())
    place.settle([*([item for item, _ in plan.items] for plan in plans), *([item] for item in table_items)], inventory)
    place.tidy(inventory)
    place.lock([*(plan.leaves() for plan in plans), [leaf for item in table_items for leaf in item.leaves()]])

    copies: dict[int, torch.Tensor] = {}
    groups = [_group(plan, place, copies) for plan in plans]
    covered = {(id(m), name) for group in groups for m, name in group.owners()}
    covered |= {(id(table), "weight") for table in tables}
    residents = Residents([resident for item in inventory if (resident := _resident(item, covered))], place)
    residents.load(on_device or {})
    return Assembly(
        groups,
        residents,
        [(table, item.slot_for({table})) for table, item in zip(tables, table_items, strict=True)],
        [_group(_whole(table, item), place, copies) for table, item in zip(tables, table_items, strict=True)],
        0 if config.granularity == "model_level" else slot_bytes_for(sizes, config.slots),
        parts.units,
    )


def _plan(unit: Unit, inventory: Inventory) -> _Plan:
    """Tell the leaves that travel from those that are not worth a copy."""
    items = inventory.parameters_of(unit.holders)
    sizes = sorted(leaf.nbytes for item in items for leaf in item.leaves())
    total, kept, limit = sum(sizes), 0, 0
    for size in sizes:
        kept += size
        if size * _SMALL_LEAF_SHARE > total or size > _SMALL_LEAF_BYTES or kept * _SMALL_LEAVES_SHARE > total:
            break
        limit = size
    travels = [(item, [leaf.nbytes > limit for leaf in item.leaves()]) for item in items]
    for item, flags in travels:
        if tensors.materializes(item.tensor):  # in the slot, in its first leaf
            flags[0] = any(flags)
    return _Plan(unit, [(item, flags) for item, flags in travels if any(flags)])


def _without_staying(plans: Sequence[_Plan], tables: Sequence[nn.Embedding]) -> list[_Plan]:
    """Return the plans that move something, without tied tensors that stay on the device for one of their owners.

    There they are for all: they need not travel as well, and owners go on having one tensor in common.
    """
    covered = {(id(table), "weight") for table in tables}
    for plan in plans:
        holders = set(plan.unit.holders)
        covered |= {(id(owner), name) for item, _ in plan.items for owner, name in item.owners if owner in holders}
    travelling = [
        (plan.unit, [each for each in plan.items if covered.issuperset((id(o), name) for o, name in each[0].owners)])
        for plan in plans
    ]
    return [_Plan(unit, items) for unit, items in travelling if items]


def _whole(table: nn.Embedding, item: Item) -> _Plan:
    """Plan to move a table as a whole: not for its own lookups, so nothing enters the group."""
    return _Plan(Unit(item.name, (), (table,)), [(item, [True] * len(tensors.leaves(item.tensor)))])


def streaming(sizes: Sequence[int], config: OffloadConfig) -> list[bool]:
    """Choose the units that stream; the others stay on the device, spread evenly so that the link works evenly.

    Units that are wider than a slot stay first, because nothing loads beside them. The first one of the others streams and
    the last ones stay, by half a unit: what a pass begins with is loaded by then, and while its last units compute, what the
    next one begins with loads (`tests/offload/test_residency.py` simulates it). When the slots would hold every unit, all
    stay: streaming would only move them back and forth.
    """
    if config.granularity == "model_level":
        return [True] * len(sizes)
    total, slot_bytes = sum(sizes), slot_bytes_for(sizes, config.slots)
    if total <= max(config.resident_bytes, slot_bytes * config.slots):
        return [False] * len(sizes)
    left = config.resident_bytes
    streams = [True] * len(sizes)
    for at, size in enumerate(sizes):
        if slot_bytes < size <= left:
            streams[at] = False
            left -= size
    rest = [size * does for size, does in zip(sizes, streams, strict=True)]
    whole, wanted, streamed, passed = sum(rest), sum(rest) - left, 0, 0
    ahead = wanted + max(rest) / 2
    for at, size in enumerate(rest):
        passed += size
        streams[at] = size > 0 and streamed < min(wanted, passed * ahead / whole)
        streamed += size * streams[at]
    left -= whole - streamed
    for at in reversed(range(len(sizes))):
        if streams[at] and sizes[at] <= left:
            streams[at] = False
            left -= sizes[at]
    return streams


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Home:
    """Where the tensors of one plan rest."""

    plan: _Plan
    layout: BufferLayout
    place: RestingPlace

    def stores(self, changed: Sequence[torch.Tensor]) -> Sequence[tuple[int, int, Store]]:
        self.place.forget(changed)
        return self.place.stores(self.plan.unit.name, self.layout, self.plan.leaves())

    def is_changed(self, rest: torch.Tensor) -> bool:
        return any(map(self.place.is_changed, tensors.leaves(rest)))


def _group(plan: _Plan, place: RestingPlace, copies: dict[int, torch.Tensor]) -> ModuleGroup:
    layout = BufferLayout.of(plan.leaves(), place.apart_from_files(plan.leaves()))
    holders = set(plan.unit.holders)
    bindings = []
    for item, travels in plan.items:
        parts = zip(item.leaves(), travels, strict=True)
        bindings.append(
            (item.slot_for(holders), [None if goes else _copied(leaf, place, copies) for leaf, goes in parts])
        )
    # Norms and the like, whose tensors stay on the device, do not enter the group: they may be called out of order.
    needing = {module for slot, _ in bindings for module, _ in slot.owners}
    entries = [entry for entry in plan.unit.entries if not needing.isdisjoint(entry.modules())]
    return ModuleGroup(plan.unit.name, entries, bindings, layout, _Home(plan, layout, place))


def _copied(leaf: torch.Tensor, place: RestingPlace, copies: dict[int, torch.Tensor]) -> torch.Tensor:
    if leaf.data_ptr() not in copies:
        copies[leaf.data_ptr()] = place.to_device(leaf)
    return copies[leaf.data_ptr()]


def _resident(item: Item, covered: set[tuple[int, str]]) -> Resident | None:
    owners = [(module, name) for module, name in item.owners if (id(module), name) not in covered]
    return Resident.at_rest(TensorSlot(item.tensor, owners), is_buffer=item.is_buffer) if owners else None
