"""Turn a module and a config into groups, residents and tables. The only code that sees all the nouns at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from vramkit import tensors
from vramkit.memory import tensor_bytes
from vramkit.offload.config import OffloadConfig
from vramkit.offload.group import ModuleGroup, TensorSlot
from vramkit.offload.inventory import Inventory, Item
from vramkit.offload.layout import BufferLayout
from vramkit.offload.partition import Unit, partition, slot_bytes_for
from vramkit.offload.resting import RestingPlace

__all__ = ["Assembly", "Resident", "assemble"]

_SMALL_LEAF_BYTES = 256 * 2**10  # a copy of this size takes as long as its set-up
_SMALL_LEAF_SHARE = 256  # of a unit: a leaf below this stays on the device ...
_SMALL_LEAVES_SHARE = 64  # ... and all of those together are at most this share of the unit


@dataclasses.dataclass(slots=True, eq=False)
class Resident:
    """A tensor that stays on the device until it is restored."""

    slot: TensorSlot
    on_device: torch.Tensor
    is_buffer: bool
    version: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        return tensor_bytes(self.on_device)

    def show(self) -> None:
        """Let owners have the tensor on the device."""
        self.slot.show(self.on_device)
        self.version = tensors.version(self.on_device)

    def replaced(self) -> str | None:
        """Return the name of an owner that does not hold the tensor on the device, or None."""
        return self.slot.replaced(self.on_device)

    def restore(self) -> int:
        """Let owners have the tensor at rest, with what was written on the device since; return the bytes copied back."""
        if self.is_buffer:
            return self._restore_buffer()
        self.slot.show(self.slot.rest)
        if self.on_device is self.slot.rest or tensors.version(self.on_device) == self.version:
            return 0
        return self._copy_back(self.on_device)

    def _restore_buffer(self) -> int:
        # A forward may write to a buffer or put another tensor in its place; what the module has now is what counts.
        module, name = self.slot.owners[0]
        current = module._buffers.get(name)  # noqa: SLF001
        if current is None or current is self.slot.rest:
            return 0
        if current.shape != self.slot.rest.shape or current.dtype != self.slot.rest.dtype:
            self.slot.show(current.to(self.slot.rest.device))
            return tensor_bytes(current)
        self.slot.show(self.slot.rest)
        return self._copy_back(current)

    def _copy_back(self, current: torch.Tensor) -> int:
        tensors.copy_values(self.slot.rest, current)
        return tensor_bytes(current)


@dataclasses.dataclass(slots=True)
class Assembly:
    """What the engine runs: groups in the order of definition, and everything that does not travel."""

    groups: list[ModuleGroup]
    residents: list[Resident]
    tables: list[tuple[nn.Embedding, TensorSlot]]
    slot_bytes: int


@dataclasses.dataclass(slots=True, eq=False)
class _Plan:
    """A unit that will stream: its tensors, each with the leaves that travel and those that are too small to."""

    unit: Unit
    items: list[tuple[Item, list[bool]]]  # travels, for each leaf

    def leaves(self) -> list[torch.Tensor]:
        return [
            leaf
            for item, travels in self.items
            for leaf, goes in zip(tensors.leaves(item.tensor), travels, strict=True)
            if goes
        ]


def assemble(module: nn.Module, config: OffloadConfig, place: RestingPlace) -> Assembly:
    """Partition `module`, bring its weights to where they rest, and put what stays on the device there.

    Raises:
        ConfigError, ConflictError, UnsupportedTensorError: before anything was changed.
    """
    inventory = Inventory(module)
    place.forget_changed(inventory)
    parts = partition(
        module,
        granularity=config.granularity,
        blocks_per_group=config.blocks_per_group,
        block_names=config.block_names,
        unit_bytes=config.unit_bytes,
        slots=config.slots,
    )
    plans = [plan for unit in parts.units if (plan := _plan(unit, inventory)).items]
    tables = [] if config.device.type == "cpu" else list(parts.tables)
    sizes = [BufferLayout.of(plan.leaves()).size_bytes for plan in plans]
    streams = _streaming(sizes, config)
    plans = [plan for plan, does in zip(plans, streams, strict=True) if does]
    sizes = [size for size, does in zip(sizes, streams, strict=True) if does]

    table_items = [item for table in tables for item in inventory.parameters_of([table])]  # tied tables share one
    place.check(leaf for plan in plans for leaf in plan.leaves())
    for items in [*([item for item, _ in plan.items] for plan in plans), *([item] for item in table_items)]:
        place.settle(items, inventory)
    place.tidy(inventory)
    place.lock(
        [*(plan.leaves() for plan in plans), [leaf for item in table_items for leaf in tensors.leaves(item.tensor)]]
    )

    copies: dict[int, torch.Tensor] = {}
    groups = [_group(plan, place, copies) for plan in plans]
    covered = {(id(m), name) for group in groups for m, name in group.owners()}
    covered |= {(id(table), "weight") for table in parts.tables}
    residents = [resident for item in inventory if (resident := _resident(item, covered, place))]
    return Assembly(
        groups,
        residents,
        [(table, item.slot_for({table})) for table, item in zip(tables, table_items, strict=True)],
        0 if config.granularity == "model_level" else slot_bytes_for(sizes, config.slots),
    )


def _plan(unit: Unit, inventory: Inventory) -> _Plan:
    """Tell the leaves that travel from those that are not worth a copy."""
    items = inventory.parameters_of(unit.holders)
    sizes = sorted(leaf.nbytes for item in items for leaf in tensors.leaves(item.tensor))
    total, kept, limit = sum(sizes), 0, 0
    for size in sizes:
        kept += size
        if size * _SMALL_LEAF_SHARE > total or size > _SMALL_LEAF_BYTES or kept * _SMALL_LEAVES_SHARE > total:
            break
        limit = size
    travels = [(item, [leaf.nbytes > limit for leaf in tensors.leaves(item.tensor)]) for item in items]
    return _Plan(unit, [(item, flags) for item, flags in travels if any(flags)])


def _streaming(sizes: Sequence[int], config: OffloadConfig) -> list[bool]:
    """Choose the units that stream; the others stay on the device, spread evenly so that the link works evenly.

    When the slots would hold every unit, all stay: streaming would only move them back and forth.
    """
    if config.granularity == "model_level":
        return [True] * len(sizes)
    if sum(sizes) <= max(config.resident_bytes, slot_bytes_for(sizes, config.slots) * config.slots):
        return [False] * len(sizes)
    share = config.resident_bytes / sum(sizes)
    streams, owed, spent = [], 0.0, 0
    for size in sizes:
        owed += size * share
        stays = owed >= size / 2 and spent + size <= config.resident_bytes
        if stays:
            owed -= size
            spent += size
        streams.append(not stays)
    return streams


def _group(plan: _Plan, place: RestingPlace, copies: dict[int, torch.Tensor]) -> ModuleGroup:
    leaves = plan.leaves()
    layout = BufferLayout.of(leaves)
    holders = set(plan.unit.holders)
    bindings = []
    for item, travels in plan.items:
        parts = zip(tensors.leaves(item.tensor), travels, strict=True)
        bindings.append(
            (item.slot_for(holders), [None if goes else _copied(leaf, place, copies) for leaf, goes in parts])
        )
    # Norms and the like, whose tensors stay on the device, do not enter the group: they may be called out of order.
    needing = {module for slot, _ in bindings for module, _ in slot.owners}
    entries = [entry for entry in plan.unit.entries if not needing.isdisjoint(entry.modules())]
    return ModuleGroup(plan.unit.name, entries, bindings, layout, place.stores(layout, leaves))


def _copied(leaf: torch.Tensor, place: RestingPlace, copies: dict[int, torch.Tensor]) -> torch.Tensor:
    if leaf.data_ptr() not in copies:
        copies[leaf.data_ptr()] = place.to_device(leaf)
    return copies[leaf.data_ptr()]


def _resident(item: Item, covered: set[tuple[int, str]], place: RestingPlace) -> Resident | None:
    owners = [(module, name) for module, name in item.owners if (id(module), name) not in covered]
    if not owners:
        return None
    leaves = tensors.leaves(item.tensor)
    moved = [place.to_device(leaf) for leaf in leaves]
    # A parameter that asks for gradients is shown frozen, as streamed ones are, also where it need not move.
    unmoved = not item.tensor.requires_grad and all(new is old for new, old in zip(moved, leaves, strict=True))
    on_device = item.tensor if unmoved else tensors.as_owned(tensors.rebuild(item.tensor, moved), like=item.tensor)
    return Resident(TensorSlot(item.tensor, owners), on_device, item.is_buffer)
