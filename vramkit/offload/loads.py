"""A group on its way to the device, or there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vramkit.offload.backend import Arrival, Fence
from vramkit.offload.group import ModuleGroup
from vramkit.offload.ring import Region

__all__ = ["OUTDATED", "Load"]

OUTDATED = -1  # the version of a load of what is no longer at rest


@dataclasses.dataclass(slots=True, eq=False)
class Load:
    """A group on its way into a region, or there. `version` is what was at rest when it was issued."""

    group: ModuleGroup
    region: Region
    version: int
    ready: Fence = dataclasses.field(init=False)
    is_given_up: bool = False
    """Whether nobody wants any more what would be copied: a copy that has not begun need not."""

    def fill(self) -> Sequence[Arrival]:
        """Copy, on the queue."""
        if self.is_given_up and not self.group.is_joint:  # other ranks, who may have begun it, would wait
            return ()
        return self.group.fill(self.region.pieces)

    def keep_late_writes(self) -> None:
        """Let what rests have what was written through views after the group was put away."""
        self.group.keep_late_writes(self.region.memory)
        self.note_writes()

    def note_writes(self) -> None:
        """Where what rests was given the values of this load, be of that version."""
        kept, self.group.kept_writes = self.group.kept_writes, None
        if kept is not None:
            self.version = kept[1] if self.version == kept[0] else OUTDATED
