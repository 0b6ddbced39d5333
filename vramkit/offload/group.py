"""The tensors that move together, and how a module is shown them: at rest on the host, or in a slot of the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from vramkit import tensors
from vramkit.offload.layout import BufferLayout, LeafSpec
from vramkit.offload.stores import Store

__all__ = ["ModuleGroup", "TensorSlot"]


@dataclasses.dataclass(slots=True, eq=False)
class TensorSlot:
    """One tensor and all the places that own it: tied parameters have several.

    `rest` is the owners' tensor while nothing runs. Its bytes lie in host memory.
    """

    rest: torch.Tensor
    owners: list[tuple[nn.Module, str]]

    def replaced(self, expected: torch.Tensor) -> str | None:
        """Return the name of an owner that holds something else than `expected`, or None."""
        for module, name in self.owners:
            if module._parameters.get(name) is not expected:  # noqa: SLF001 (getattr is too slow for every pass)
                return f"{type(module).__name__}.{name}"
        return None

    def show(self, tensor: torch.Tensor) -> None:
        """Let every owner have `tensor` under its name."""
        for module, name in self.owners:
            if type(module).__setattr__ is not nn.Module.__setattr__:
                setattr(module, name, tensor)  # such a class (RNNs do) keeps track of its parameters itself
            elif name in module._parameters:  # noqa: SLF001 (setattr would pay for checks on every block of every step)
                module._parameters[name] = tensor  # type: ignore[assignment]  # noqa: SLF001
            else:
                module._buffers[name] = tensor  # noqa: SLF001


@dataclasses.dataclass(slots=True, eq=False)
class _Binding:
    """A slot and its leaves: those that travel by their place in the group, those that stay on the device themselves."""

    slot: TensorSlot
    parts: list[LeafSpec | torch.Tensor]

    def placed_in(self, memory: torch.Tensor) -> torch.Tensor:
        parts = [part.view(memory) if isinstance(part, LeafSpec) else part for part in self.parts]
        return tensors.as_owned(tensors.rebuild(self.slot.rest, parts), like=self.slot.rest)


class ModuleGroup:
    """Tensors that travel together.

    ``HOST``: owners hold the rest tensors; no device memory. ``LOADING``: the same, and a slot is being filled.
    ``DEVICE``: owners hold tensors in the slot. The streamer moves a group between these.
    """

    def __init__(
        self,
        name: str,
        entries: Sequence[nn.Module],
        bindings: Sequence[tuple[TensorSlot, list[torch.Tensor | None]]],
        layout: BufferLayout,
        stores: Sequence[tuple[int, int, Store]],
    ) -> None:
        """Make a group.

        Args:
            name: of the first entry, for messages and profilers.
            entries: modules whose forward needs the group.
            bindings: each slot with its leaves on the device, None for a leaf that travels (in the order of `layout`).
            layout: of the leaves that travel.
            stores: (offset in the slot, bytes, where they rest).
        """
        self.name = name
        self.entries = tuple(entries)
        self.layout = layout
        self.stores = tuple(stores)
        specs = iter(layout.leaves)
        self._bindings = [
            _Binding(slot, [next(specs) if part is None else part for part in parts]) for slot, parts in bindings
        ]
        self._counted = [leaf for slot, _ in bindings for leaf in tensors.leaves(slot.rest)]
        self._placed: dict[int, list[torch.Tensor]] = {}
        self._on_show: list[tuple[torch.Tensor, int]] = []  # outside the ring, with their versions
        self._is_read_from_files = any(store.kind in ("disk", "mapped") for _, _, store in self.stores)
        self._version_in_files = self.version()

    @property
    def size_bytes(self) -> int:
        """Bytes that travel, alignment included."""
        return self.layout.size_bytes

    @property
    def needs_thread(self) -> bool:
        """Whether filling a slot touches bytes on the host."""
        return any(store.needs_thread for _, _, store in self.stores)

    def version(self) -> int:
        """Return a number that changes when any of the tensors at rest is written in place."""
        return sum(map(tensors.version, self._counted))

    def owners(self) -> list[tuple[nn.Module, str]]:
        """Return all (module, attribute) pairs that are shown the group."""
        return [owner for binding in self._bindings for owner in binding.slot.owners]

    def replaced(self) -> str | None:
        """Return the name of an owner that does not hold its tensor at rest, or None."""
        found = (binding.slot.replaced(binding.slot.rest) for binding in self._bindings)
        return next((name for name in found if name is not None), None)

    def is_outdated(self) -> bool:
        """Tell whether tensors were written in place although their bytes travel from a file, which does not change."""
        return self._is_read_from_files and self.version() != self._version_in_files

    def fill(self, memory: torch.Tensor) -> None:
        """Put the bytes into `memory`, in order with the current stream."""
        for offset, size_bytes, store in self.stores:
            store.fill(memory[offset : offset + size_bytes])

    def show_device(self, memory: torch.Tensor, *, remember: bool) -> None:
        """Let owners have the tensors in `memory`; `remember` them where the same memory comes back every pass."""
        placed = self._placed.get(memory.data_ptr())
        if placed is None:
            placed = [binding.placed_in(memory) for binding in self._bindings]
            if remember:
                self._placed[memory.data_ptr()] = placed
        for binding, tensor in zip(self._bindings, placed, strict=True):
            binding.slot.show(tensor)
        self._on_show = [] if remember else [(tensor, tensors.version(tensor)) for tensor in placed]

    def keep_writes(self) -> None:
        """Copy to the tensors at rest what was written to those that were on show between calls (model offload)."""
        for binding, (tensor, version) in zip(self._bindings, self._on_show, strict=False):
            if tensors.version(tensor) != version:
                tensors.copy_values(binding.slot.rest, tensor)

    def show_rest(self) -> None:
        """Let owners have the tensors at rest."""
        self._on_show = []
        for binding in self._bindings:
            binding.slot.show(binding.slot.rest)
