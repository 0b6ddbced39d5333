"""Which bytes of which file a tensor is: a note that its storage carries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from vramkit import tensors
from vramkit.offload.memory_map import range_of, written_pages

if TYPE_CHECKING:
    from vramkit.offload.disk.mapped_file import MappedFile

__all__ = ["FileSpan", "check_files_of", "file_of", "forget_span", "has_span", "note_span", "span_of"]

_SPAN, _FILE = "_vramkit_span", "_vramkit_file"  # notes that a storage carries


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileSpan:
    """The bytes of one tensor in a file."""

    file: MappedFile
    offset: int
    size_bytes: int

    def shared(self) -> torch.Tensor:
        """Return the bytes in the file, as uint8, whatever was written to the tensor since."""
        return self.file.shared()[self.offset : self.offset + self.size_bytes]

    def part(self, offset: int, size_bytes: int) -> FileSpan:
        """Return the span of `size_bytes` from byte `offset` of this one on."""
        if (offset, size_bytes) == (0, self.size_bytes):
            return self
        return FileSpan(self.file, self.offset + offset, size_bytes)

    def may_differ(self, leaf: torch.Tensor) -> bool:
        """Tell whether `leaf`, whose span this is, was written to since it was mapped, by whatever way.

        The kernel knows which pages were copied for that. Neighbours share pages, so the bytes in those are compared; where
        the kernel is not to be asked, all are.

        Raises:
            StoreError: the file is no longer what it was.
        """
        self.file.check()
        memory = tensors.byte_view(leaf)
        start, stop = range_of(memory)
        parts = written_pages((start, stop))
        if parts is None:
            parts = [(start, stop)]
        inside = (slice(low - start, high - start) for low, high in parts)
        return not all(torch.equal(memory[part], self.shared()[part]) for part in inside)


def span_of(leaf: torch.Tensor) -> FileSpan | None:
    """Return where in a file the bytes of `leaf` rest (in whatever order of dimensions), or None.

    Whether they are still those of the file, `FileSpan.may_differ` tells, and `forget_span` notes.
    """
    span: FileSpan | None = getattr(leaf.untyped_storage(), _SPAN, None)
    if span is None or leaf.nbytes == 0 or not tensors.is_dense(leaf):
        return None
    offset = int(leaf.storage_offset()) * leaf.element_size()
    return span.part(offset, leaf.nbytes) if offset + leaf.nbytes <= span.size_bytes else None


def forget_span(leaf: torch.Tensor) -> None:
    """From now on take `leaf` for ordinary memory: it was changed."""
    with contextlib.suppress(AttributeError):
        delattr(leaf.untyped_storage(), _SPAN)


def file_of(leaf: torch.Tensor) -> MappedFile | None:
    """Return the file whose pages the memory of `leaf` is, those apart that were written to since it was mapped; or None."""
    return getattr(leaf.untyped_storage(), _FILE, None) if leaf.layout == torch.strided else None


def check_files_of(leaves: Iterable[torch.Tensor]) -> None:
    """Look at the files of `leaves` before their memory is touched; see `MappedFile.check`."""
    for file in {id(file): file for file in map(file_of, leaves) if file is not None}.values():
        file.check()


def has_span(storage: torch.UntypedStorage) -> bool:
    """Tell whether it was noted where in a file `storage` lies."""
    return hasattr(storage, _SPAN)


def note_span(storage: torch.UntypedStorage, span: FileSpan) -> None:
    """Note that `storage` is a mapping of `span`."""
    setattr(storage, _SPAN, span)
    setattr(storage, _FILE, span.file)
