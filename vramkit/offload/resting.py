"""Bring weights to where they rest, and choose a store for each leaf.

RAM never holds two copies: what must be moved (from the device, into one piece of memory, onto the disk) is moved unit by
unit, and the original memory is let go before the next unit.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vramkit import tensors
from vramkit.errors import ConfigError, StoreError
from vramkit.memory import available_ram_bytes, format_bytes
from vramkit.offload.backend import Backend
from vramkit.offload.checkpoint import read_checkpoint, write_checkpoint
from vramkit.offload.config import OffloadConfig
from vramkit.offload.disk import FileReader, MappedFile, forget_span, span_of
from vramkit.offload.inventory import Inventory, Item
from vramkit.offload.layout import BufferLayout
from vramkit.offload.pinning import Pins, has_own_pages, own_pages
from vramkit.offload.stores import DiskStore, PageableStore, PinnedStore, Staging, Store

__all__ = ["RestingPlace"]

_RAM_SHARE = 0.9  # of what is free, for page-locking files that are not in RAM yet


class RestingPlace:
    """The host side of one offloaded module: its pins, its staging, its open files and what it wrote to disk."""

    def __init__(self, config: OffloadConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._on_cpu = backend.device.type == "cpu"
        budget = config.pin_budget_bytes
        self._pins = Pins(backend.device, int(available_ram_bytes() * _RAM_SHARE) if budget is None else budget)
        self._staging = Staging(backend)
        self._readers: dict[MappedFile, FileReader] = {}
        self._spilled: dict[Item, None] = {}
        self._folder: Path | None = None
        self._spills: list[MappedFile] = []
        self._spill_count = 0
        self._is_checked = False
        self.copied_to_host_bytes = 0

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes: weights, files and staging."""
        return self._pins.pinned_bytes + self._staging.size_bytes

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

    def forget_changed(self, inventory: Inventory) -> None:
        """Take tensors of files that were written through ``.data``, which leaves no other trace, for ordinary memory."""
        may_be_written: dict[MappedFile, bool] = {}
        for leaf in (leaf for item in inventory for leaf in tensors.leaves(item.tensor)):
            span = span_of(leaf)
            if span is None:
                continue
            if span.file not in may_be_written:
                may_be_written[span.file] = span.file.may_be_written()
            if may_be_written[span.file] and not span.holds(leaf):
                forget_span(leaf)

    def settle(self, items: Sequence[Item], inventory: Inventory) -> None:
        """Bring the tensors of one unit to where they rest from now on: in host memory, dense, in few pieces, or on disk."""
        if self._config.disk_folder is not None:
            self._spill([item for item in items if _is_loose(item)])
            return
        to_ram = self._config.store == "registered"  # asked for: files are read into RAM once
        loose = [item for item in items if to_ram or _is_loose(item)]
        self._gather(
            [item for item in loose if any(self._must_move(leaf, inventory) for leaf in tensors.leaves(item.tensor))]
        )

    def tidy(self, inventory: Inventory) -> None:
        """Forget what was written to disk for tensors that are gone or changed since (`Offload.edit`), and its files."""
        present = {id(item.tensor) for item in inventory}
        self._spilled = {item: None for item in self._spilled if id(item.tensor) in present}
        spans = (span_of(leaf) for item in inventory for leaf in tensors.leaves(item.tensor))
        used = {id(span.file) for span in spans if span is not None}
        for file in [file for file in self._spills if id(file) not in used]:
            self._spills.remove(file)
            if file in self._readers:
                self._readers.pop(file).close()
            file.path.unlink(missing_ok=True)

    def lock(self, units: Sequence[Sequence[torch.Tensor]]) -> None:
        """Page-lock what travels, within the budget; warn once about what could not be."""
        store = self._config.store
        if self._on_cpu or store in ("pageable", "disk"):
            return
        leaves = [leaf for unit in units for leaf in unit]
        spans = [span_of(leaf) for leaf in leaves]
        memories = [tensors.byte_view(leaf) for leaf, span in zip(leaves, spans, strict=True) if span is None]
        files = {id(span.file): span.file for span in spans if span is not None}
        self._pins.keep(memories, files.values())
        if self._pins.refused_bytes:
            warnings.warn(
                f"vramkit could not page-lock {format_bytes(self._pins.refused_bytes)} of weights; they are staged, at a "
                "fraction of the link's speed. Free memory, raise pin_budget or the container's limit, or choose 'pageable'",
                RuntimeWarning,
                stacklevel=2,
            )

    def stores(self, layout: BufferLayout, leaves: Sequence[torch.Tensor]) -> list[tuple[int, int, Store]]:
        """Choose stores for the travelling `leaves` of one unit: (offset in the slot, bytes, store).

        Leaves that lie in memory as they will lie in the slot travel as one.
        """
        pieces: list[tuple[int, int, torch.Tensor]] = []
        for spec, leaf in zip(layout.leaves, leaves, strict=True):
            if pieces:
                offset, _, first = pieces[-1]
                same = leaf.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                if same and leaf.data_ptr() - first.data_ptr() == spec.offset - offset:
                    pieces[-1] = (offset, spec.offset + spec.size_bytes - offset, first)
                    continue
            pieces.append((spec.offset, spec.size_bytes, leaf))
        return [(offset, size, self.store(leaf, size)) for offset, size, leaf in pieces]

    def store(self, leaf: torch.Tensor, size_bytes: int | None = None) -> Store:
        """Choose where the bytes of `leaf` (and what lies behind it, up to `size_bytes`) are read from."""
        span, kind = span_of(leaf), self._config.store
        if span is not None and (kind == "disk" or (kind is None and self._on_cpu)):
            return DiskStore(span, self._reader(span.file), self._staging)
        memory = tensors.byte_view(leaf, size_bytes) if span is None else span.shared()
        if self._pins.covers(memory):
            return PinnedStore(memory, "registered" if span is None else "mapped")
        # Not the shared mapping of a file: the one that the tensor has shows what is written to the tensor later.
        return PageableStore(tensors.byte_view(leaf, size_bytes), self._staging)

    def pinned_memory(self, leaf: torch.Tensor) -> torch.Tensor | None:
        """Return the page-locked bytes of `leaf`, which the device can read by address, or None."""
        span = span_of(leaf)
        memory = tensors.byte_view(leaf) if span is None else span.shared()
        return memory if self._pins.covers(memory) else None

    def to_device(self, leaf: torch.Tensor) -> torch.Tensor:
        """Return a copy of `leaf` on the device, or `leaf` itself where it is ordinary memory of that device."""
        if leaf.device == self._backend.device and span_of(leaf) is None:
            return leaf
        (spec,), size_bytes = (layout := BufferLayout.of([leaf])).leaves, layout.size_bytes
        memory = self._backend.memory(size_bytes)
        store = self.store(leaf) if leaf.device.type == "cpu" and tensors.is_dense(leaf) else None
        if store is None or store.kind == "pageable":  # no staging for what travels once: it would stay page-locked
            spec.view(memory).copy_(leaf)
        else:
            store.fill(memory[: spec.size_bytes])
        return spec.view(memory)

    def close(self) -> None:
        """Bring spilled weights back to RAM, unlock, and close and remove files. No copy may be in flight."""
        for item in self._spilled:
            item.move_to([leaf.clone() for leaf in tensors.leaves(item.tensor)])
        self._spilled.clear()
        self._pins.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._spills.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _must_move(self, leaf: torch.Tensor, inventory: Inventory) -> bool:
        """Whether a leaf cannot be read where it lies: on the device, with holes, (asked for in RAM) in a file, or small.

        Small leaves share pages with other memory, so they cannot be page-locked, and alone would not travel at the speed
        of the link. Those that share a storage with others of the module stay, lest a tie is cut.
        """
        if leaf.device.type != "cpu" or not tensors.is_dense(leaf) or span_of(leaf) is not None:
            return True
        is_locked = not self._on_cpu and self._config.store != "pageable"
        return is_locked and not has_own_pages(leaf) and not inventory.shares_memory(leaf)

    def _gather(self, items: Sequence[Item]) -> None:
        """Copy leaves into one piece of host memory with pages of its own, laid out as in a slot."""
        if not items:
            return
        leaves = [leaf for item in items for leaf in tensors.leaves(item.tensor)]
        layout = BufferLayout.of(leaves)
        memory = own_pages(layout.size_bytes)
        views = [spec.view(memory) for spec in layout.leaves]
        for view, leaf in zip(views, leaves, strict=True):
            view.copy_(leaf)
            self.copied_to_host_bytes += 0 if leaf.device.type == "cpu" else leaf.nbytes
        remaining = iter(views)
        for item in items:
            item.move_to([next(remaining) for _ in tensors.leaves(item.tensor)])

    def _spill(self, items: Sequence[Item]) -> None:
        """Write tensors to a new file in a folder of this module alone, and let them be views of that file.

        A folder is never read by another module or a later run, so nothing stale is ever served.
        """
        if not items:
            return
        if self._folder is None:
            self._folder = _own_folder(self._config.disk_folder)
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        named = [(f"{item.name}#{at}", x) for item in items for at, x in enumerate(tensors.leaves(item.tensor))]
        leaves = dict(sorted(named, key=lambda pair: -pair[1].element_size()))  # wide ones first: all are aligned then
        path = self._folder / f"{self._spill_count:05d}.safetensors"
        self._spill_count += 1
        write_checkpoint(path, {name: _bytes_in_memory_order(leaf) for name, leaf in leaves.items()})
        entries = read_checkpoint(path)
        self._spills.append(next(iter(entries.values())).file)
        for item in items:
            old = enumerate(tensors.leaves(item.tensor))
            flat = [(entries[f"{item.name}#{at}"].tensor().view(leaf.dtype), leaf) for at, leaf in old]
            item.move_to([new.as_strided(leaf.shape, tensors.dense_like(leaf)) for new, leaf in flat])
            self._spilled[item] = None

    def _reader(self, file: MappedFile) -> FileReader:
        if file not in self._readers:
            self._readers[file] = FileReader(file, direct=self._config.direct_io)
        return self._readers[file]


def _is_loose(item: Item) -> bool:
    """Whether a tensor, or a part of it, is not a view of a file."""
    return any(span_of(leaf) is None for leaf in tensors.leaves(item.tensor))


def _bytes_in_memory_order(leaf: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `leaf` on the host, so that a file keeps any dtype, and transposed weights transposed."""
    return tensors.byte_view(leaf.cpu() if tensors.is_dense(leaf) else leaf.cpu().contiguous())


def _own_folder(parent: Path | None) -> Path:
    assert parent is not None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="vramkit-", dir=parent))
    except OSError as error:
        raise StoreError(
            f"offload_to_disk_path={str(parent)!r} cannot be written: {error.strerror or error}"
        ) from error
