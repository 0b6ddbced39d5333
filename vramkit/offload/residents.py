"""What stays on the device, and what becomes of it while the module rests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from vramkit import tensors
from vramkit.errors import StoreError
from vramkit.memory import tensor_bytes
from vramkit.offload.disk import check_files_of
from vramkit.offload.resting import RestingPlace
from vramkit.offload.tensor_slot import TensorSlot, asks_for_gradients
from vramkit.offload.transforms import outside_transforms
from vramkit.offload.watch import shown, stands_for, with_data, written_through_data

__all__ = ["Resident", "Residents"]

_WRITTEN = -1  # a version that no tensor has: written to, however often that is asked, until it is copied back


@dataclasses.dataclass(slots=True, eq=False)
class Resident:
    """A tensor that stays on the device, from when it was loaded until it rests or is restored."""

    slot: TensorSlot
    is_buffer: bool
    on_device: torch.Tensor
    """What owners have while it is on the device; the tensor at rest where it needs no other, and while it is not there."""
    version: int = 0
    _at_rest: list[torch.Tensor] = dataclasses.field(default_factory=list)  # leaves, and how often they were written
    _rest_version: int = 0

    @classmethod
    def at_rest(cls, slot: TensorSlot, *, is_buffer: bool) -> Resident:
        """Make one that is not on the device yet."""
        return cls(slot, is_buffer, slot.rest)

    @property
    def size_bytes(self) -> int:
        """Bytes on the device, when it is there."""
        return tensor_bytes(self.on_device)

    @property
    def is_unwritten(self) -> bool:
        """Whether it is on the device, and as it rests."""
        return self.on_device is not self.slot.rest and not self.is_buffer and not self._is_written()

    def load(self, place: RestingPlace) -> None:
        """Have it on the device. There already: nothing to do."""
        rest = self.slot.rest
        if self.on_device is not rest:
            return
        leaves = [rest] if tensors.sparse_parts(rest) else tensors.leaves(rest)
        moved = [place.to_device(leaf) for leaf in leaves]
        if tensors.materializes(rest):
            moved[0] = moved[0].clone() if moved[0] is leaves[0] else moved[0]
            self.on_device = shown(tensors.materialize(rest, moved), like=rest)
            return
        # A parameter that asks for gradients is shown as another tensor, as streamed ones are, also where it need not move.
        unmoved = not rest.requires_grad and all(new is old for new, old in zip(moved, leaves, strict=True))
        self.on_device = rest if unmoved else shown(tensors.rebuild(rest, moved), like=rest)

    def load_again(self, place: RestingPlace) -> None:
        """Have it and show it, after it rested: what was written to it meanwhile is no longer what a file holds."""
        if self.on_device is not self.slot.rest:  # letting go was cut short
            self._show(self.on_device)
            return
        if not tensors.sparse_parts(self.slot.rest):
            place.forget([leaf for leaf in tensors.leaves(self.slot.rest) if place.is_changed(leaf)])
        self.load(place)
        self.show()

    def rest(self) -> int:
        """Let it go from the device; return the bytes copied back."""
        returned = self.restore()
        self.on_device = self.slot.rest
        return returned

    def show(self) -> None:
        """Let owners have the tensor on the device."""
        self._show(self.on_device)
        self.version = tensors.version(self.on_device)
        self._at_rest = [] if self.is_buffer else tensors.leaves(self.slot.rest)
        self._rest_version = sum(map(tensors.version, self._at_rest))

    def refresh(self, *, anyway: bool = False) -> None:
        """Copy to the device what was written at rest: owners do not have that tensor, but somebody may."""
        now = sum(map(tensors.version, self._at_rest))
        if self.on_device is not self.slot.rest and (anyway or now != self._rest_version):
            tensors.copy_values(self.on_device, self.slot.rest)
            self.version, self._rest_version = tensors.version(self.on_device), now

    def current(self) -> torch.Tensor | None:
        """Return what the owners have now: a forward may put another tensor in the place of a buffer."""
        module, name = self.slot.owners[0]
        return module._buffers.get(name) if self.is_buffer else self.on_device  # noqa: SLF001

    def replaced(self) -> str | None:
        """Return the name of an owner that does not hold the tensor on the device, or None."""
        return self.slot.replaced(self.on_device)

    def restore(self) -> int:
        """Let owners have the tensor at rest, with what was written on the device since; return the bytes copied back."""
        if self.is_buffer:
            return self._restore_buffer()
        try:
            returned = self.keep_writes()
        except StoreError:  # the file of what rests is lost, so there is no place to copy to, also later
            self.version = tensors.version(self.on_device)
            self._show(self.slot.rest)
            raise
        self._show(self.slot.rest)
        return returned

    def keep_writes(self) -> int:
        """Let the parameter at rest have what was written on the device since; return the bytes copied back."""
        if self.on_device is self.slot.rest or not self._is_written():
            return 0
        returned = self._copy_back(self.on_device)
        self.version = tensors.version(self.on_device)
        self._rest_version = sum(map(tensors.version, self._at_rest))
        return returned

    def _show(self, tensor: torch.Tensor) -> None:
        """Let owners have `tensor`; a parameter that one was given between calls stays: the next call refuses it by name."""
        self.slot.show(tensor, instead_of=None if self.is_buffer else self.on_device)

    def _is_written(self) -> bool:
        is_replaced = not stands_for(self.on_device, self.slot.rest)  # by ``torch.utils.swap_tensors``
        if is_replaced or any(map(written_through_data, with_data([self.on_device]))):
            self.version = _WRITTEN
        return tensors.version(self.on_device) != self.version

    def _restore_buffer(self) -> int:
        # A forward may write to a buffer or put another tensor in its place; what the module has now is what counts.
        module, name = self.slot.owners[0]
        current = module._buffers.get(name)  # noqa: SLF001
        if current is None or current is self.slot.rest:
            return 0
        rest = self.slot.rest
        is_alike = (current.shape, current.dtype, current.layout) == (rest.shape, rest.dtype, torch.strided)
        if not is_alike or tensors.is_expanded(rest):  # cannot take the values: what the module has rests from now on
            self.slot.rest = current.to(rest.device)
            self.slot.show(self.slot.rest)
            return tensor_bytes(current)
        try:
            returned = self._copy_back(current)
        except StoreError:
            self.slot.show(current.to(self.slot.rest.device))
            raise
        self.slot.show(self.slot.rest)  # only now: whoever was interrupted before finds the buffer again
        return returned

    def _copy_back(self, current: torch.Tensor) -> int:
        check_files_of(tensors.leaves(self.slot.rest))
        tensors.copy_values(self.slot.rest, current)
        return tensor_bytes(current)


class Residents:
    """All tensors of a module that stay on the device."""

    def __init__(self, each: Sequence[Resident], place: RestingPlace) -> None:
        """Take them as they rest in `place`."""
        self.are_loaded = False
        self._each = list(each)
        self._place = place
        self._asking = [each for each in self._each if asks_for_gradients(each.slot.rest)]

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._each)

    @functools.cached_property
    def size_bytes(self) -> int:
        """Device memory of all of them, while they are there."""
        return sum(resident.size_bytes for resident in self)

    def load(self, on_device: dict[int, torch.Tensor]) -> None:
        """Have them on the device, those of `on_device` first: what is not wanted any more makes room."""
        for resident in self:
            resident.on_device = on_device.pop(id(resident.slot.rest), resident.slot.rest)
        on_device.clear()
        for resident in self:
            resident.load(self._place)
        self.are_loaded = True

    def load_again(self) -> None:
        """Have them and show them, after they rested. Those that there was room for stay, where there is none for all."""
        for resident in self:
            resident.load_again(self._place)
        self.are_loaded = True

    def rest(self) -> int:
        """Let them go from the device; return the bytes copied back."""
        self.are_loaded = False
        return sum(resident.rest() for resident in self)

    @outside_transforms
    def ask(self) -> None:
        """Let those that ask for gradients at rest do so here while nothing is recorded; see `ModuleGroup.show_device`.

        Not what autocast would keep copies of, which nobody has planned for; the copies do not ask for gradients anyway.
        """
        is_unrecorded = not torch.is_grad_enabled()
        for each in self._asking:
            asks = is_unrecorded and not _is_cast_for_long(each.on_device)
            if each.on_device is not each.slot.rest and each.on_device.requires_grad is not asks:
                each.on_device.requires_grad_(asks)

    def unwritten(self) -> dict[int, torch.Tensor]:
        """Return those that are as they rest, by the id of the tensor at rest."""
        return {id(each.slot.rest): each.on_device for each in self if each.is_unwritten}


def _is_cast_for_long(weight: torch.Tensor) -> bool:
    """Tell whether autocast would keep a copy of `weight` until it ends, as it does of weights that ask for gradients."""
    is_cast = weight.dtype == torch.float32 and weight.ndim > 1 and torch.is_autocast_enabled(weight.device.type)
    return is_cast and torch.is_autocast_cache_enabled()
