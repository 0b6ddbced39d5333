"""Bring weights to where they rest, and choose a store for each leaf.

RAM never holds two copies: what must be moved (from the device, into one piece of memory, onto the disk) is moved unit by
unit, and the original memory is let go before the next unit.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from vramkit import tensors
from vramkit.errors import ConfigError, StoreError
from vramkit.memory import format_bytes
from vramkit.offload.backend import Backend
from vramkit.offload.config import OffloadConfig
from vramkit.offload.disk import (
    FileReader,
    FileSpan,
    ForeignViews,
    MappedFile,
    SpillFolder,
    check_files_of,
    file_of,
    forget_span,
    read_workers,
    span_of,
)
from vramkit.offload.inventory import Inventory, Item
from vramkit.offload.layout import BufferLayout
from vramkit.offload.memory_map import MemoryMap, give_free_memory_back, own_pages
from vramkit.offload.pinning import PinBudget, Pins
from vramkit.offload.stores import DiskStore, PageableStore, PartedStore, PeerStore, PinnedStore, Staging, Store
from vramkit.offload.workers import Workers

__all__ = ["RestingPlace", "is_loose", "loose_leaves", "move_loose"]

_MANY_PLACES = 8  # modules that are offloaded: an application has fewer
_STAGING_SHARE = 4  # a budget of less than this many times the staging is left to weights


class RestingPlace:
    """The host side of one offloaded module: its pins, its staging, its open files and what it wrote to disk."""

    def __init__(self, config: OffloadConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._on_cpu = backend.device.type == "cpu"
        budget = config.pin_budget if isinstance(config.pin_budget, PinBudget) else PinBudget(config.pin_budget)
        self._budget = budget
        self._pins, self._staging_pins = Pins(backend.device, budget), Pins(backend.device, budget)
        is_cuda = backend.device.type == "cuda"
        self._staging = Staging(backend, self._staging_pins.keep_own if is_cuda else None)
        self._known = MemoryMap(())
        self._views = ForeignViews()
        self._readers: dict[MappedFile, FileReader] = {}
        self._read_workers: Workers | None = None  # that all readers share
        self._spilled: dict[Item, None] = {}
        self._came_from: dict[Item, torch.device] = {}
        self._files: tuple[MappedFile, ...] = ()
        self._spills = None if config.disk_folder is None else SpillFolder(config.disk_folder)
        self._is_checked = False
        self.copied_to_host_bytes = 0

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes: weights, files and staging."""
        return self._pins.pinned_bytes + self._staging_pins.pinned_bytes

    def check(self, leaves: Iterable[torch.Tensor]) -> None:
        """Refuse a store that cannot serve `leaves`, before anything is changed.

        Asked once: what `Offload.edit` adds or changes later (adapters, merged or cast weights) may rest in RAM.

        Raises:
            ConfigError: weights in RAM with a store that reads files, or page-locking asked of the CPU.
        """
        if self._is_checked:
            return
        store = self._config.store
        if self._on_cpu and store in ("registered", "mapped"):
            raise ConfigError(f"store={store!r} page-locks memory for a device; on 'cpu' use 'disk' or 'pageable'")
        if store in ("disk", "mapped") and self._config.disk_folder is None:
            loose = sum(span_of(leaf) is None for leaf in leaves)
            if loose:
                raise ConfigError(
                    f"store={store!r} needs weights in files, and {loose} tensors are not: load them by load_mapped"
                    + (", or give offload_to_disk_path" if store == "disk" else "")
                )
        self._is_checked = True

    def survey(self, inventory: Inventory) -> None:
        """Learn what the memory of every tensor is, which are views of files, and which of those were written to since.

        Versions do not tell: that of a Parameter counts its initialisation, and writes through ``.data`` are not counted.

        Raises:
            StoreError: a file is no longer what it was when it was mapped.
        """
        _living().add(self)
        self._known = MemoryMap.of_process()
        leaves = [leaf for item in inventory for leaf in item.leaves()]
        self._views.note(leaves, self._known)
        check_files_of(leaves)
        for leaf in leaves:
            span = span_of(leaf)
            if span is not None and span.may_differ(leaf):
                forget_span(leaf)

    def forget(self, changed: Iterable[torch.Tensor]) -> None:
        """Take these tensors for ordinary memory from now on: they are no longer what a file holds."""
        for leaf in changed:
            forget_span(leaf)

    def is_changed(self, leaf: torch.Tensor) -> bool:
        """Tell whether the bytes of `leaf` differ from those in the file that they are read from."""
        span = span_of(leaf)
        return span is not None and span.may_differ(leaf)

    def check_files(self) -> None:
        """Look at the files that weights rest in; a microsecond each.

        Raises:
            StoreError: one is no longer what it was when it was mapped.
        """
        for file in self._files:
            file.check()

    def settle(self, units: Sequence[Sequence[Item]], inventory: Inventory) -> None:
        """Bring the tensors of units to where they rest from now on: in host memory, dense, in few pieces, or on disk."""
        for item in {item: None for items in units for item in items}:
            devices = {leaf.device for leaf in item.leaves()} - {torch.device("cpu")}
            if devices:
                self._came_from[item] = devices.pop()
        if self._spills is not None:
            self._spill(units, self._spills)
            return
        to_ram = self._config.store == "registered"  # asked for: files are read into RAM once
        for items in units:
            loose = [item for item in items if to_ram or is_loose(item)]
            self._gather([item for item in loose if any(self._must_move(leaf, inventory) for leaf in item.leaves())])

    def end_applying(self, *, is_applied: bool) -> None:
        """Forget what came from a device; where applying failed, first move it back, for the module shall be as it was."""
        for item, device in () if is_applied else self._came_from.items():
            item.move_to([leaf.to(device) for leaf in item.leaves()])
        self._came_from.clear()

    def tidy(self, inventory: Inventory) -> None:
        """Forget what was written to disk for tensors that are gone or changed since (`Offload.edit`), and its files."""
        present = {id(item.tensor) for item in inventory}
        self._spilled = {item: None for item in self._spilled if id(item.tensor) in present}
        files = (file_of(leaf) for item in inventory for leaf in item.leaves())
        used = {id(file): file for file in files if file is not None}
        self._files = tuple(used.values())
        if self._spills is not None:
            for file in [file for file in self._spills.files if id(file) not in used]:
                if file in self._readers:
                    self._readers.pop(file).close()
                self._spills.drop(file)
        if self._spilled:
            give_free_memory_back()  # small weights lay in between others, and their memory would stay with the process

    def lock(self, units: Sequence[Sequence[torch.Tensor]]) -> None:
        """Page-lock what travels, within the budget; warn once about what could not be."""
        store = self._config.store
        if self._on_cpu or store in ("pageable", "disk", "peer"):
            return
        leaves = [leaf for unit in units for leaf in unit]
        spans = [span_of(leaf) for leaf in leaves]
        memories = [tensors.byte_view(leaf) for leaf, span in zip(leaves, spans, strict=True) if span is None]
        files = {id(span.file): span.file for span in spans if span is not None}
        wanted = sum(memory.nbytes for memory in memories) + sum(file.shared().nbytes for file in files.values())
        if wanted - self._pins.pinned_bytes > self._budget.left_bytes > _STAGING_SHARE * self._staging.size_bytes:
            self._staging.prepare()  # first: all that does not fit passes through it
        self._pins.keep(memories, files.values(), self._known)
        if self._pins.refused_bytes:
            warnings.warn(
                f"vramkit could not page-lock {format_bytes(self._pins.refused_bytes)} of weights; they are staged, at a "
                "fraction of the link's speed. Free memory, raise pin_budget or the container's limit, or choose 'pageable'",
                RuntimeWarning,
                stacklevel=2,
            )

    def apart_from_files(self, leaves: Sequence[torch.Tensor]) -> list[bool]:
        """Tell which `leaves` rest beside the files that others rest in: adapters, say, gathered so that they travel as one.

        None do for ranks, who lay out alike wherever each has its weights.
        """
        return [self._config.mesh is None and span_of(leaf) is None for leaf in leaves]

    def stores(self, name: str, layout: BufferLayout, leaves: Sequence[torch.Tensor]) -> list[tuple[int, int, Store]]:
        """Choose stores for the travelling `leaves` of the unit called `name`: (offset in the slot, bytes, store).

        Leaves that lie in memory as they will lie in the slot travel as one.
        """
        if self._config.peer_device is not None:
            each = zip(layout.leaves, leaves, strict=True)
            return [(spec.offset, spec.size_bytes, self._peer_store(leaf)) for spec, leaf in each]
        pieces: list[tuple[int, int, torch.Tensor]] = []
        pairs = sorted(zip(layout.leaves, leaves, strict=True), key=lambda pair: pair[0].offset)
        for spec, leaf in pairs:
            if pieces:
                offset, _, first = pieces[-1]
                same = leaf.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                if same and leaf.data_ptr() - first.data_ptr() == spec.offset - offset:
                    pieces[-1] = (offset, spec.offset + spec.size_bytes - offset, first)
                    continue
            pieces.append((spec.offset, spec.size_bytes, leaf))
        stores = [(offset, size, self.store(leaf, size)) for offset, size, leaf in pieces]
        if self._config.mesh is None:
            return [*stores]
        return [*self._config.mesh.shared(name, stores, layout.size_bytes)]

    def store(self, leaf: torch.Tensor, size_bytes: int | None = None) -> PartedStore:
        """Choose where the bytes of `leaf` (and what lies behind it, up to `size_bytes`) are read from."""
        span, kind = _span(leaf, size_bytes), self._config.store
        if span is not None and (kind == "disk" or (kind is None and self._on_cpu)):
            return DiskStore(span, self._reader(span.file), self._staging)
        memory = tensors.byte_view(leaf, size_bytes) if span is None else span.shared()
        if self._pins.covers(memory):
            return PinnedStore(memory, "registered" if span is None else "mapped")
        # Not the shared mapping of a file: the one that the tensor has shows what is written to the tensor later.
        return PageableStore(tensors.byte_view(leaf, size_bytes), self._staging, file_of(leaf))

    def _peer_store(self, leaf: torch.Tensor) -> Store:
        with torch.inference_mode(False):
            memory = torch.empty(leaf.nbytes, dtype=torch.uint8, device=self._config.peer_device)
        return PeerStore(memory, tensors.byte_view(leaf), partial(tensors.version, leaf))

    def pinned_memory(self, leaf: torch.Tensor) -> torch.Tensor | None:
        """Return the page-locked bytes of `leaf`, which the device can read by address, or None."""
        span = span_of(leaf)
        memory = tensors.byte_view(leaf) if span is None else span.shared()
        return memory if self._pins.covers(memory) else None

    def to_device(self, leaf: torch.Tensor) -> torch.Tensor:
        """Return a copy of `leaf` on the device, or `leaf` itself where it is ordinary memory of that device."""
        if leaf.layout != torch.strided:
            return leaf.to(self._backend.device)
        if leaf.device == self._backend.device and span_of(leaf) is None:
            return leaf
        (spec,) = BufferLayout.of([leaf]).leaves
        memory = self._backend.memory(spec.size_bytes)  # no more: safetensors' save_model refuses a part of a storage
        store = self.store(leaf) if leaf.device.type == "cpu" and tensors.is_dense(leaf) else None
        if store is not None and store.kind != "pageable":
            store.fill(memory)
        else:  # no staging for what travels once: it would stay page-locked
            is_risky = store is not None and self._pins.touches(tensors.byte_view(leaf))
            spec.view(memory).copy_(leaf.clone() if is_risky else leaf)
        return spec.view(memory)

    def close(self) -> None:
        """Bring spilled weights back to RAM, unlock, and close and remove files. No copy may be in flight.

        Raises:
            StoreError: a file that weights rest in is no longer what it was, so they are lost. All the rest was done.
        """
        files, lost = self._files, None
        ours: Sequence[MappedFile] = () if self._spills is None else self._spills.files
        for item in self._spilled:
            try:
                check_files_of(item.leaves())
            except StoreError as error:
                lost = error
                continue
            with torch.inference_mode(False):  # the weights shall not become inference tensors by that
                item.move_to([leaf.clone() if file_of(leaf) in ours else leaf for leaf in item.leaves()])
        self._spilled.clear()
        self._pins.close()
        self._staging.close()
        self._staging_pins.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._read_workers is not None:
            self._read_workers.close()
            self._read_workers = None
        if self._spills is not None:
            self._spills.remove()
        self._files = ()
        _living().discard(self)
        if lost is not None:
            raise lost
        for file in files:
            file.check()

    def _must_move(self, leaf: torch.Tensor, inventory: Inventory) -> bool:
        """Whether a leaf cannot be read where it lies.

        It is on the device, or its values are not one span of bytes, or (asked for in RAM) in a file. Or it is to be locked,
        and shares pages with other memory; but what lies in one storage with other tensors of the module stays, lest a tie
        is cut, and what other processes see stays too.
        """
        if span_of(leaf) is not None:
            return self._config.store == "registered"
        if leaf.device.type != "cpu" or not tensors.is_dense(leaf):
            return True
        if self._on_cpu or self._config.store in ("pageable", "peer") or inventory.shares_memory(leaf):
            return False
        memory = self._known.classify(leaf)
        return memory.pages is None and not memory.is_seen_by_others and not self._pins.covers(tensors.byte_view(leaf))

    def _is_seen_by_others(self, item: Item) -> bool:
        return any(self._known.classify(leaf).is_seen_by_others for leaf in item.leaves())

    def _gather(self, items: Sequence[Item]) -> None:
        """Copy leaves into one piece of host memory with pages of its own, laid out as in a slot."""
        if not items:
            return
        to_ram = self._config.store == "registered"  # else the part of a tensor that is a view of a file stays
        leaves = [leaf for item in items for leaf in item.leaves()] if to_ram else loose_leaves(items)
        layout = BufferLayout.of(leaves)
        memory = own_pages(layout.size_bytes)
        views = [spec.view(memory) for spec in layout.leaves]
        for view, leaf in zip(views, leaves, strict=True):
            view.copy_(leaf)
            self.copied_to_host_bytes += 0 if leaf.device.type == "cpu" else leaf.nbytes
        move_loose(items, views, in_files=to_ram)

    def _spill(self, units: Sequence[Sequence[Item]], folder: SpillFolder) -> None:
        """Write tensors to a new file, unit by unit, and let them be views of that file."""
        loose = [[item for item in items if is_loose(item) and not self._is_seen_by_others(item)] for items in units]
        leaves = loose_leaves({item: None for items in loose for item in items})
        if not leaves:
            return
        file = folder.new_file(leaves)
        del leaves  # they are let go of unit by unit
        for items in loose:
            new = [item for item in items if item not in self._spilled]  # tied ones are in several units
            views = file.add(loose_leaves(new))
            self._spilled |= dict.fromkeys(new)  # first: what is moved comes back when this is closed
            move_loose(new, views)

    def _reader(self, file: MappedFile) -> FileReader:
        self._read_workers = self._read_workers or read_workers()
        if file not in self._readers:
            self._readers[file] = FileReader(file, direct=self._config.direct_io, workers=self._read_workers)
        return self._readers[file]


def _span(leaf: torch.Tensor, size_bytes: int | None) -> FileSpan | None:
    """Return the span of `leaf` and what lies behind it in its storage, up to `size_bytes`."""
    span = span_of(leaf)
    return span if span is None or size_bytes is None else span.part(0, size_bytes)


def loose_leaves(items: Iterable[Item]) -> list[torch.Tensor]:
    """Return the leaves of `items` that are not views of a file."""
    return [leaf for item in items for leaf in item.leaves() if span_of(leaf) is None]


def move_loose(items: Iterable[Item], views: Iterable[torch.Tensor], *, in_files: bool = False) -> None:
    """Put `views` in the place of the `loose_leaves` of `items`, and of those `in_files` as well."""
    remaining = iter(views)
    for item in items:
        item.move_to([next(remaining) if in_files or span_of(leaf) is None else leaf for leaf in item.leaves()])


def is_loose(item: Item) -> bool:
    """Whether a tensor, or a part of it, is not a view of a file."""
    return bool(loose_leaves([item]))


class _Living:
    """The resting places that there are. Those of modules that go without `remove` are garbage in a circle.

    Python collects it by how many objects there are, and knows nothing of the descriptors and threads that it holds.
    """

    def __init__(self) -> None:
        self._places: weakref.WeakSet[RestingPlace] = weakref.WeakSet()
        self._limit = _MANY_PLACES

    def add(self, place: RestingPlace) -> None:
        """Note one; look for garbage first, where there are twice as many as were left the last time."""
        if place not in self._places and len(self._places) >= self._limit:
            gc.collect()
            self._limit = max(_MANY_PLACES, 2 * len(self._places))
        self._places.add(place)

    def discard(self, place: RestingPlace) -> None:
        """Forget one that was closed."""
        self._places.discard(place)


@functools.cache
def _living() -> _Living:
    return _Living()
