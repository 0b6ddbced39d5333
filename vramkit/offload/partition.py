"""Cut a module into units that travel together: by blocks, by bytes, or not at all. Nothing is touched here.

A unit is entered through modules whose forward is really called. Containers (``ModuleList``, ``Sequential``) and modules
without a forward of their own are not: whoever iterates over them never triggers their hooks, so their children stand in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from torch import nn

from vramkit.memory import tensor_bytes

__all__ = ["Granularity", "Partition", "Unit", "partition", "slot_bytes_for"]

Granularity = Literal["block_level", "leaf_level", "model_level"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_WHOLE = (nn.MultiheadAttention, nn.RNNBase)  # their forward reads parameters of children, or keeps lists of them
_SMALL_BYTES = 16 * 2**20  # below this a copy does not reach the speed of the link
_SMALL_SHARE = 32  # what stays on the device outside the blocks is at most total / 32
_WIDE_SHARE = 20  # units wider than a slot may carry at most total / 20 of the bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """What travels together: on entering any of `entries`, the parameters of all `holders` must be on the device."""

    name: str
    entries: tuple[nn.Module, ...]
    holders: tuple[nn.Module, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """Units in the order of definition, and embedding tables whose rows are looked up where they rest.

    Whatever is in neither stays on the device.
    """

    units: tuple[Unit, ...]
    tables: tuple[nn.Embedding, ...]


def partition(
    root: nn.Module,
    *,
    granularity: Granularity,
    blocks_per_group: int = 1,
    block_names: Sequence[str] | None = None,
    unit_bytes: int | None = None,
    slots: int = 2,
) -> Partition:
    """Cut `root` into units.

    Args:
        root: any module, also on the meta device.
        granularity: block_level makes a unit of every block of every block list, at any depth; leaf_level makes units as
            small as single layers, joined up to a size that travels at link speed; model_level makes one of everything.
        blocks_per_group: consecutive blocks in one unit (block_level).
        block_names: names of containers, or of single modules, that are blocks; None finds block lists.
        unit_bytes: upper bound that units are cut to, and joined up to, where modules allow.
        slots: how many slots the ring will have.
    """
    cutter = _Cutter(root)
    if granularity == "model_level":
        return Partition((cutter.unit(root),), ())
    containers = [root.get_submodule(name) for name in block_names] if block_names else _block_lists(root)
    blocks = [list(_blocks_of(container)) for container in containers]
    tables, kept = cutter.outside(block for group in blocks for block in group)
    cutter.left_out |= {id(module) for module in (*tables, *kept)}
    if granularity == "leaf_level":
        units = cutter.cut(root, unit_bytes if unit_bytes is not None else cutter.leaf_bytes(slots))
    else:
        units = cutter.by_blocks(blocks, blocks_per_group, unit_bytes)
    return Partition(tuple(_each_entry_once(units)), tuple(tables))


def slot_bytes_for(sizes: Sequence[int], slots: int) -> int:
    """Return the smallest slot that serves units of these `sizes` well (0 for none).

    A unit wider than a slot takes several adjacent ones. That costs overlap while it loads, so at most a twentieth of the
    bytes may travel so; and all slots together must hold the widest. A single large layer then does not size every slot.
    """
    if not sizes or slots < 1:
        return 0
    total, wide = sum(sizes), 0
    best = max(sizes)
    for size in sorted(set(sizes), reverse=True):
        if wide * _WIDE_SHARE > total:
            break
        best = max(size, -(-max(sizes) // slots))
        wide += size * sum(other == size for other in sizes)
    return -(-best // 4096) * 4096


def _each_entry_once(units: Iterable[Unit]) -> Iterator[Unit]:
    """Drop entries that an earlier unit has: a module that stands in two places of the tree travels as one."""
    seen: set[int] = set()
    for unit in units:
        entries = tuple(entry for entry in unit.entries if id(entry) not in seen)
        seen.update(map(id, entries))
        if entries:
            yield dataclasses.replace(unit, entries=entries)


def _is_called(module: nn.Module) -> bool:
    """Whether the forward of `module` is its own, so that calling code calls it."""
    return not isinstance(module, _CONTAINERS) and type(module).forward is not nn.Module.forward


def _block_lists(module: nn.Module) -> Iterator[nn.Module]:
    if hasattr(module, "base_layer"):
        return  # a layer with adapters: PEFT keeps them in containers, which are no lists of blocks
    if isinstance(module, _CONTAINERS) and any(_has_parameters(child) for child in module.children()):
        yield module
    else:
        for child in module.children():
            yield from _block_lists(child)


def _blocks_of(container: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(container, _CONTAINERS):
        yield container
        return
    for child in container.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _blocks_of(child)
        elif _has_parameters(child):
            yield child


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _Cutter:
    """Cuts one module tree; knows sizes by module and what was left out of every unit."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._names = {id(module): name for name, module in root.named_modules()}
        self._own = {id(module): _own_bytes(module) for module in root.modules()}
        self._total = sum(self._own.values())
        self._fixed: dict[int, list[Unit]] = {}  # blocks that are cut already; the units of a group stand at its first
        self.left_out: set[int] = set()

    def _modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Walk `module` and what is below it, without what was left out."""
        if id(module) not in self.left_out:
            yield module
            for child in module.children():
                yield from self._modules(child)

    def _bytes(self, module: nn.Module) -> int:
        return sum({id(m): self._own[id(m)] for m in self._modules(module)}.values())

    def unit(self, *modules: nn.Module) -> Unit:
        """Make one unit of whole modules."""
        entries = [entry for module in modules for entry in self._entries(module)]
        holders = {id(m): m for module in modules for m in self._modules(module)}
        return Unit(self._names[id(modules[0])], tuple(entries), tuple(holders.values()))

    def _entries(self, module: nn.Module) -> Iterator[nn.Module]:
        if _is_called(module):
            if self._bytes(module):
                yield module
            return
        for child in module.children():
            yield from self._entries(child)

    def outside(self, blocks: Iterable[nn.Module]) -> tuple[list[nn.Embedding], list[nn.Module]]:
        """Find, outside `blocks`, the embedding tables to look up and the small layers to keep on the device."""
        inside = {id(module) for block in blocks for module in block.modules()}
        leaves = [leaf for unit in self.cut(self._root, 0) for leaf in unit.entries if id(leaf) not in inside]
        tables = [leaf for leaf in leaves if isinstance(leaf, nn.Embedding) and leaf.max_norm is None]
        tables = [table for table in tables if self._bytes(table) * 64 > self._total]
        rest = sorted((leaf for leaf in leaves if leaf not in tables), key=self._bytes)
        kept, kept_bytes = [], 0
        for leaf in rest:
            kept_bytes += self._bytes(leaf)
            if self._bytes(leaf) >= _SMALL_BYTES or kept_bytes * _SMALL_SHARE > self._total:
                break
            kept.append(leaf)
        return tables, kept

    def leaf_bytes(self, slots: int) -> int:
        """Return the size that leaf units are joined up to: what a slot must hold anyway, and enough for link speed."""
        sizes = [self._bytes_of_unit(unit) for unit in self.cut(self._root, 0)]
        return max(slot_bytes_for(sizes, slots), min(_SMALL_BYTES, self._total // _SMALL_SHARE))

    def _bytes_of_unit(self, unit: Unit) -> int:
        return sum(self._own[id(holder)] for holder in unit.holders)

    def by_blocks(
        self, lists: Sequence[Sequence[nn.Module]], blocks_per_group: int, unit_bytes: int | None
    ) -> list[Unit]:
        """Make units of `blocks_per_group` blocks, and of what is large outside the blocks."""
        for blocks in lists:
            for start in range(0, len(blocks), blocks_per_group):
                group = blocks[start : start + blocks_per_group]
                if unit_bytes is None or sum(map(self._bytes, group)) <= unit_bytes:
                    units = [self.unit(*group)]
                else:
                    units = [unit for block in group for unit in self.cut(block, unit_bytes)]
                self._fixed |= {id(block): [] for block in group} | {id(group[0]): units}
        sizes = [self._bytes_of_unit(unit) for units in self._fixed.values() for unit in units]
        return self.cut(self._root, max(sizes, default=0) if unit_bytes is None else unit_bytes)

    def cut(self, module: nn.Module, target_bytes: int) -> list[Unit]:
        """Descend until a subtree fits `target_bytes` or cannot be divided; join small neighbours up to it."""
        if id(module) in self._fixed:
            return self._fixed[id(module)]
        size = self._bytes(module)
        if not size:
            return []
        is_divided = any(id(part) in self._fixed for part in module.modules())
        if not is_divided and _is_called(module) and (size <= target_bytes or self._is_whole(module)):
            return [self.unit(module)]
        pieces = [unit for child in self._children(module) for unit in self.cut(child, target_bytes)]
        return self._joined(pieces, target_bytes)

    def _children(self, module: nn.Module) -> list[nn.Module]:
        return [child for child in module.children() if id(child) not in self.left_out]

    def _is_whole(self, module: nn.Module) -> bool:
        """Whether `module` must travel as one: its class says so, or its forward needs most of the parameters itself."""
        if getattr(module, "offload_unit", False) or isinstance(module, _WHOLE):
            return True
        called = [child for child in self._children(module) if any(True for _ in self._entries(child))]
        below = sum(self._bytes(child) for child in called)
        return self._bytes(module) - below > below

    def _joined(self, units: Sequence[Unit], target_bytes: int) -> list[Unit]:
        fixed = {id(unit) for units in self._fixed.values() for unit in units}
        joined: list[Unit] = []
        for unit in units:
            last = joined[-1] if joined and not {id(joined[-1]), id(unit)} & fixed else None
            if last and self._bytes_of_unit(last) + self._bytes_of_unit(unit) <= target_bytes:
                joined[-1] = Unit(last.name, last.entries + unit.entries, last.holders + unit.holders)
            else:
                joined.append(unit)
        return joined


def _own_bytes(module: nn.Module) -> int:
    return sum(tensor_bytes(parameter) for parameter in module.parameters(recurse=False))
