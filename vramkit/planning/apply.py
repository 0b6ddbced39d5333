"""Do what a plan says, by the public calls of offloading: all of it or nothing."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vramkit.errors import StoreError
from vramkit.offload import Offload, apply_group_offloading, offload_of
from vramkit.offload.stores import Sharing
from vramkit.offload.turns import Turns
from vramkit.planning.holding import Holding
from vramkit.planning.plans import ComponentPlan, Plan

__all__ = ["Applied"]


class Applied:
    """The components of a plan while they are offloaded."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plan: Plan,
        *,
        disk_folder: Path | None = None,
        mesh: Sharing | None = None,
    ) -> None:
        """Nothing is done yet; all ranks of `mesh` will share host memory, and the reading where the plan says so."""
        self.offloads: dict[str, Offload] = {}
        self._modules, self._plan, self._disk_folder = modules, plan, disk_folder
        self._mesh = mesh
        self._folder: Path | None = None
        self._turns = Turns(plan.vram_bytes - plan.margin_bytes)
        self._call = Holding(0, 0)  # which holds nothing itself
        self._turns.add(self._call, activation_bytes=plan.before_bytes)

    def open(self) -> None:
        """Offload every component.

        Raises:
            ConfigError, ConflictError, UnsupportedTensorError, StoreError: as `apply_group_offloading`; then none is.
        """
        try:
            for component in self._plan.components:
                options = self._options(component, self._plan, self._disk_folder)
                offload = apply_group_offloading(self._modules[component.name], self._plan.device, **options)
                self.offloads[component.name] = offload
                offload.join(self._turns, activation_bytes=component.room_bytes)
        except BaseException:
            self.remove()
            raise

    def begin(self) -> None:
        """Make room for what a call of the pipeline needs before the first component computes."""
        self._turns.make_room(self._call)

    def remove(self) -> None:
        """Give all components their tensors back; one that fails keeps no other from it. Later calls finish what is left."""
        for component in self._plan.components:  # a Ctrl-C may have come between the offloading and its note
            offload = offload_of(self._modules[component.name])
            if offload is not None:
                self.offloads.setdefault(component.name, offload)
        with contextlib.ExitStack() as steps:  # the last one that is put on it is taken first
            if self._folder is not None:
                steps.callback(shutil.rmtree, self._folder, ignore_errors=True)
            for offload in reversed(self.offloads.values()):
                steps.callback(offload.remove)

    def _options(self, component: ComponentPlan, plan: Plan, disk_folder: Path | None) -> dict[str, Any]:
        options: dict[str, Any] = {"resident": component.chosen_bytes, "store": component.store, "turns": self._turns}
        if component.granularity != "resident":
            options |= {
                "offload_type": component.granularity,
                "slots": component.slots,
                "unit_bytes": component.unit_bytes,
            }
        if self._mesh is not None and component.phase != "decode":  # of which ranks may decode some tiles each
            options["mesh"] = self._mesh if component.shares else self._mesh.apart
        if plan.ram_bytes is not None:
            options["pin_budget"] = component.pinned_bytes
        if component.store == "disk":
            if self._folder is None:
                self._folder = _new_folder(disk_folder)
            options["offload_to_disk_path"] = self._folder / component.name
        return options


def _new_folder(parent: Path | None) -> Path:
    """Make a folder in `parent`, which is made when it is missing, or in that for temporary files.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="vramkit-", dir=parent))
    except OSError as error:
        raise StoreError(
            f"disk_folder={str(parent or tempfile.gettempdir())!r} takes no weights: {error.strerror or error}; give a "
            "folder that can be written"
        ) from error
