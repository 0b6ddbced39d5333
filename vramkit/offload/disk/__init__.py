"""Files as a place where weights rest: mapped for tensors at rest, read in pieces for slots, written whole.

This is the one place that knows about disks. Other loaders map files themselves: `ForeignViews` finds the file of such a
tensor, which from there on is as one of ours, for its storage carries a `FileSpan`.
"""

from vramkit.offload.disk.foreign import ForeignViews
from vramkit.offload.disk.mapped_file import MappedFile
from vramkit.offload.disk.reader import FileReader, read_workers
from vramkit.offload.disk.spans import FileSpan, check_files_of, file_of, forget_span, span_of
from vramkit.offload.disk.spills import SpillFile, SpillFolder, lock_file, remove_rubbish, views_like
from vramkit.offload.disk.writing import atomic_write, staged_folder

__all__ = [
    "FileReader",
    "FileSpan",
    "ForeignViews",
    "MappedFile",
    "SpillFile",
    "SpillFolder",
    "atomic_write",
    "check_files_of",
    "file_of",
    "forget_span",
    "lock_file",
    "read_workers",
    "remove_rubbish",
    "span_of",
    "staged_folder",
    "views_like",
]
