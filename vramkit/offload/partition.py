"""Cut a module into units that travel together: by blocks, by bytes, or not at all. Nothing is touched here.

A unit is entered through modules whose forward is really called. Containers (``ModuleList``, ``Sequential``) and modules
without a forward of their own are not: whoever iterates over them never triggers their hooks, so their children stand in.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

from torch import nn

from vramkit.memory import tensor_bytes
from vramkit.offload.uses import Times

__all__ = [
    "Granularity",
    "Partition",
    "Unit",
    "moved_bytes",
    "partition",
    "parts_of",
    "slot_bytes_for",
]

Granularity = Literal["block_level", "leaf_level", "model_level"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_WHOLE = (nn.MultiheadAttention, nn.RNNBase)  # their forward reads parameters of children, or keeps lists of them
_SMALL_BYTES = 16 * 2**20  # below this a copy does not reach the speed of the link
_TABLE_BYTES = 16 * 2**20  # an embedding below this costs little to move or to keep, and serves whoever reads it
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
    """Units in the order of definition (of use, where that is known), and tables whose rows are looked up where they rest.

    Whatever is in neither stays on the device.
    """

    units: tuple[Unit, ...]
    tables: tuple[nn.Embedding, ...]


def partition(
    root: nn.Module,
    *,
    granularity: Granularity,
    blocks_per_group: int | None = None,
    block_names: Sequence[str] | None = None,
    unit_bytes: int | None = None,
    slots: int = 2,
    times: Times | None = None,
) -> Partition:
    """Cut `root` into units.

    Args:
        root: any module, also on the meta device.
        granularity: block_level makes a unit of every block of every block list, at any depth; leaf_level makes units as
            small as single layers, joined up to a size that travels at link speed; model_level makes one of everything.
        blocks_per_group: consecutive blocks in one unit (block_level); None: one, and of small ones as many as reach the
            speed of the link together, at most a 32nd of all.
        block_names: names of containers, or of single modules, that are blocks; None finds block lists.
        unit_bytes: upper bound that units are cut to, and joined up to, where modules allow.
        slots: how many slots the ring will have.
        times: when modules of `root` are used, if that was recorded. Units are then formed by it and not by the definition.
    """
    cutter = _Cutter(root)
    if granularity == "model_level":
        return Partition((cutter.unit(root),), ())
    containers = [root.get_submodule(name) for name in block_names] if block_names else _block_lists(root)
    blocks = [list(_blocks_of(container)) for container in containers]
    tables, kept = cutter.outside(block for group in blocks for block in group)
    cutter.leave_out([*tables, *kept])
    if granularity == "leaf_level" and unit_bytes is None:
        unit_bytes = cutter.leaf_bytes(slots)
    cutter.times = times  # only now: what is left out and how large units are does not depend on it
    if granularity == "leaf_level":
        assert unit_bytes is not None
        units = cutter.cut(root, unit_bytes)
    else:
        units = cutter.by_blocks(blocks, blocks_per_group, unit_bytes)
    return Partition(tuple(_each_entry_once(units)), tuple(tables))


def parts_of(root: nn.Module, entries: Collection[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Name the modules below `root` that somebody may call by themselves although they are no unit.

    Those are all that are called and have an entry of a unit below them, and what is called outside the blocks.
    """
    inside = {part for blocks in _block_lists(root) for block in _blocks_of(blocks) for part in block.modules()}
    tops = {block for blocks in _block_lists(root) for block in _blocks_of(blocks)}

    def is_part(module: nn.Module) -> bool:
        if module is root or module in entries or not _is_called(module):
            return False
        above = any(part in entries for part in module.modules())
        return above or module not in inside or (not entries and module in tops)

    return [(name, module) for name, module in root.named_modules() if is_part(module)]


def moved_bytes(units: Iterable[Unit], times: Times) -> int:
    """Return the bytes that `units` move in all recorded passes."""
    return sum(times.runs(unit.entries) * sum(map(_own_bytes, unit.holders)) for unit in units)


def slot_bytes_for(sizes: Sequence[int], slots: int) -> int:
    """Return the smallest slot that serves units of these `sizes` well (0 for none).

    A unit wider than a slot takes several adjacent ones. That costs overlap while it loads, so at most a twentieth of the
    bytes may travel so; and all slots together must hold the widest. A single large layer then does not size every slot.
    """
    if not sizes or slots < 1:
        return 0
    total, widest, wide = sum(sizes), max(sizes), 0
    best = widest
    for size, count in sorted(Counter(sizes).items(), reverse=True):
        if wide * _WIDE_SHARE > total:
            break
        best = max(size, -(-widest // slots))
        wide += size * count
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


def _reads_below(module: nn.Module) -> bool:
    """Whether the forward of `module` reads weights of modules below it.

    Layers with adapters, parametrizations, and torch's attention and encoder layers, which have one kernel for all of it.
    """
    return isinstance(module, _FUSED) or hasattr(module, "base_layer") or hasattr(module, "parametrizations")


def _has_parameters(module: nn.Module) -> bool:
    return any(_own_parameters(part) for part in module.modules())


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    # Not through `parameters()`, which models of others override.
    return [parameter for parameter in module._parameters.values() if parameter is not None]  # noqa: SLF001


class _Cutter:
    """Cuts one module tree; knows sizes by module and what was left out of every unit."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._names = {id(module): name for name, module in root.named_modules()}
        self._own = {id(module): _own_bytes(module) for module in root.modules()}
        self._total = sum(self._own.values())
        self._small_bytes = min(_SMALL_BYTES, self._total // _SMALL_SHARE)  # up to here, small ones are joined
        self._fixed: dict[int, list[Unit]] = {}  # blocks that are cut already; the units of a group stand at its first
        self._subtrees: dict[int, list[nn.Module]] = {}  # as long as no more is left out; so are their sizes
        self._sizes: dict[int, int] = {}
        self._left_out: frozenset[int] = frozenset()
        self.times: Times | None = None

    def leave_out(self, modules: Iterable[nn.Module]) -> None:
        """Let `modules` be part of no unit."""
        self._left_out |= {id(module) for module in modules}
        self._subtrees.clear()
        self._sizes.clear()

    def _modules(self, module: nn.Module) -> Sequence[nn.Module]:
        """Return `module` and what is below it, without what was left out."""
        if id(module) in self._left_out:
            return ()
        if id(module) not in self._subtrees:
            self._subtrees[id(module)] = [module, *chain.from_iterable(map(self._modules, module.children()))]
        return self._subtrees[id(module)]

    def _bytes(self, module: nn.Module) -> int:
        size = self._sizes.get(id(module))
        if size is None:
            size = sum({id(m): self._own[id(m)] for m in self._modules(module)}.values())
            self._sizes[id(module)] = size
        return size

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
        tables = [table for table in tables if self._bytes(table) >= max(_TABLE_BYTES, self._total // 64)]
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
        return max(slot_bytes_for(sizes, slots), self._small_bytes)

    def _bytes_of_unit(self, unit: Unit) -> int:
        return sum(self._own[id(holder)] for holder in unit.holders)

    def by_blocks(
        self, lists: Sequence[Sequence[nn.Module]], blocks_per_group: int | None, unit_bytes: int | None
    ) -> list[Unit]:
        """Make units of `blocks_per_group` blocks, and of what is large outside the blocks."""
        for group in self._grouped(lists, blocks_per_group, unit_bytes):
            if unit_bytes is None or sum(map(self._bytes, group)) <= unit_bytes:
                units = [self.unit(*group)]
            else:
                units = [unit for block in group for unit in self.cut(block, unit_bytes)]
            self._fixed |= {id(block): [] for block in group} | {id(group[0]): units}
        sizes = [self._bytes_of_unit(unit) for units in self._fixed.values() for unit in units]
        return self.cut(self._root, max(sizes, default=0) if unit_bytes is None else unit_bytes)

    def _grouped(
        self, lists: Sequence[Sequence[nn.Module]], count: int | None, unit_bytes: int | None
    ) -> Iterator[list[nn.Module]]:
        """Take `count` consecutive blocks at a time: of a list, or, where times are known, of all lists as they run."""
        most = self._small_bytes if unit_bytes is None else min(unit_bytes, self._small_bytes)
        times = self.times

        def is_full(group: list[nn.Module], block: nn.Module) -> bool:
            return sum(map(self._bytes, (*group, block))) > most if count is None else len(group) == count

        def go_together(group: list[nn.Module], block: nn.Module) -> bool:
            return times is None or self._go_together(self.unit(*group), self.unit(block))

        if times is not None:
            lists = [sorted((block for blocks in lists for block in blocks), key=lambda block: times.first([block]))]
        for blocks in lists:
            group: list[nn.Module] = []
            for block in blocks:
                if group and (is_full(group, block) or not go_together(group, block)):
                    yield group
                    group = []
                group.append(block)
            if group:
                yield group

    def cut(self, module: nn.Module, target_bytes: int) -> list[Unit]:
        """Descend until a subtree fits `target_bytes` or cannot be divided; join small neighbours up to it."""
        if id(module) in self._fixed:
            return self._fixed[id(module)]
        size = self._bytes(module)
        if not size:
            return []
        is_divided = bool(self._fixed) and not self._fixed.keys().isdisjoint(map(id, self._modules(module)))
        can_be_whole = not is_divided and _is_called(module) and (size <= target_bytes or self._is_whole(module))
        if can_be_whole and (self.times is None or self._is_whole(module)):
            return [self.unit(module)]
        pieces = [unit for child in self._children(module) for unit in self.cut(child, target_bytes)]
        pieces = self._joined(pieces, target_bytes)
        return [self.unit(module)] if can_be_whole and self._go_together(*pieces) else pieces

    def _children(self, module: nn.Module) -> list[nn.Module]:
        return [child for child in module.children() if id(child) not in self._left_out]

    def _is_whole(self, module: nn.Module) -> bool:
        """Whether `module` must travel as one: its class says so, or its forward needs most of the parameters itself."""
        if getattr(module, "offload_unit", False) or isinstance(module, _WHOLE) or _reads_below(module):
            return True
        called = [child for child in self._children(module) if any(True for _ in self._entries(child))]
        below = sum(self._bytes(child) for child in called)
        return self._bytes(module) - below > below

    def _joined(self, units: Sequence[Unit], target_bytes: int) -> list[Unit]:
        times = self.times
        if times is not None:
            units = sorted(units, key=lambda unit: times.first(unit.entries))
        fixed = {id(unit) for units in self._fixed.values() for unit in units}
        joined: list[Unit] = []
        for unit in units:
            last = joined[-1] if joined and not {id(joined[-1]), id(unit)} & fixed else None
            fits = last is not None and self._bytes_of_unit(last) + self._bytes_of_unit(unit) <= target_bytes
            if last and fits and self._go_together(last, unit):
                joined[-1] = Unit(last.name, last.entries + unit.entries, last.holders + unit.holders)
            else:
                joined.append(unit)
        return joined

    def _go_together(self, *units: Unit) -> bool:
        """Whether these units move no more bytes as one, by the times at which they are used."""
        if self.times is None:
            return True
        whole = self.times.runs(entry for unit in units for entry in unit.entries)
        return whole * sum(map(self._bytes_of_unit, units)) <= sum(
            self.times.runs(unit.entries) * self._bytes_of_unit(unit) for unit in units
        )


def _own_bytes(module: nn.Module) -> int:
    return sum(tensor_bytes(parameter) for parameter in _own_parameters(module))
