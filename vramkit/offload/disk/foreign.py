"""Files that other loaders have mapped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch

from vramkit.errors import StoreError
from vramkit.offload.disk.mapped_file import MappedFile
from vramkit.offload.disk.spans import FileSpan, has_span, note_span
from vramkit.offload.memory_map import Mapping, MemoryMap, range_of

__all__ = ["ForeignViews"]


class ForeignViews:
    """Files that somebody else mapped, each opened once more: of tensors that ordinary loaders left as views of them."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int], MappedFile] = {}

    def note(self, leaves: Iterable[torch.Tensor], known: MemoryMap) -> None:
        """Let storages of `leaves` that are views of a file carry their `FileSpan`.

        A file that was deleted, replaced or cannot be opened is passed over: its views are ordinary memory.
        """
        found = ((leaf.untyped_storage(), known.classify(leaf)) for leaf in leaves)
        views = [(s, m.mapping) for s, m in found if m.kind == "file" and m.mapping is not None and not has_span(s)]
        self._open({mapping.file_id: mapping for _, mapping in views if mapping.file_id not in self._files})
        for storage, mapping in views:
            file = self._files.get(mapping.file_id)
            offset = mapping.offset + storage.data_ptr() - mapping.start
            if file is not None and offset + storage.nbytes() <= file.size_bytes:
                note_span(storage, FileSpan(file, offset, storage.nbytes()))

    def _open(self, mappings: dict[tuple[str, int], Mapping]) -> None:
        opened = {}
        for file_id, mapping in mappings.items():
            with contextlib.suppress(OSError, StoreError):
                if Path(mapping.path).is_file():
                    opened[file_id] = MappedFile(mapping.path)
                    opened[file_id].shared()
        if opened:
            # Whether it is the same file, the kernel says, by the name that it gives to our mapping of it.
            now = MemoryMap.of_process()
            same = {file_id: now.mapping_of(range_of(file.shared())) for file_id, file in opened.items()}
            self._files |= {k: opened[k] for k, mine in same.items() if mine is not None and mine.file_id == k}
