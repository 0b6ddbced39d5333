"""The tensors that move together, and how a module is shown them: at rest on the host, or in a slot of the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from vramkit import tensors
from vramkit.errors import ConflictError
from vramkit.offload.backend import Arrival
from vramkit.offload.disk import check_files_of
from vramkit.offload.layout import BufferLayout, LeafSpec
from vramkit.offload.placement import Placement
from vramkit.offload.ring import Pieces
from vramkit.offload.stores import JointStore, Store
from vramkit.offload.tensor_slot import TensorSlot, asks_for_gradients
from vramkit.offload.transforms import is_in_functional_call
from vramkit.offload.watch import shown

__all__ = ["ModuleGroup"]


@dataclasses.dataclass(slots=True, eq=False)
class _Binding:
    """A slot and its leaves: those that travel by their place in the group, those that stay on the device themselves."""

    slot: TensorSlot
    parts: list[LeafSpec | torch.Tensor]

    @property
    def is_made(self) -> bool:
        """Whether what owners are shown is made in the slot, of leaves that came there."""
        return tensors.materializes(self.slot.rest)

    def placed_in(self, memory: torch.Tensor) -> torch.Tensor:
        rest, parts = self.slot.rest, self._parts_in(memory)
        return shown(parts[0] if self.is_made else tensors.rebuild(rest, parts), like=rest)

    def make_in(self, memory: torch.Tensor) -> None:
        tensors.materialize(self.slot.rest, self._parts_in(memory))

    def _parts_in(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [part.view(memory) if isinstance(part, LeafSpec) else part for part in self.parts]


class Home(Protocol):
    """Where the tensors of one group rest."""

    def stores(self, changed: Sequence[torch.Tensor]) -> Sequence[tuple[int, int, Store]]:
        """Choose (offset in the slot, bytes, store) for what travels; `changed` leaves are no longer what a file holds."""

    def is_changed(self, rest: torch.Tensor) -> bool:
        """Tell whether the bytes of a tensor at rest differ from those in the file that they are read from."""


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
        home: Home,
    ) -> None:
        """Make a group.

        Args:
            name: of the first entry, for messages and profilers.
            entries: modules whose forward needs the group.
            bindings: each slot with its leaves on the device, None for a leaf that travels (in the order of `layout`).
            layout: of the leaves that travel.
            home: where they rest.
        """
        self.name = name
        self.entries = tuple(entries)
        self.layout = layout
        self.size_bytes = layout.size_bytes
        """Bytes that travel, alignment included."""
        specs = iter(layout.leaves)
        self._bindings = [
            _Binding(slot, [next(specs) if part is None else part for part in parts]) for slot, parts in bindings
        ]
        self._made = [binding for binding in self._bindings if binding.is_made]
        owners = [
            (owner, binding.slot, at) for at, binding in enumerate(self._bindings) for owner in binding.slot.owners
        ]
        # All owners are gone through four times a pass. So most are without a call, by the dictionaries of the modules:
        # to ask a module for an attribute takes three times as long.
        self._owned = [
            (vars(module), name, slot.rest, at) for (module, name), slot, at in owners if _has_it(module, name)
        ]
        self._special = [(slot, at) for (module, name), slot, at in owners if not _has_it(module, name)]
        leaves = [leaf for slot, _ in bindings for leaf in tensors.leaves(slot.rest)]
        self._counted = [leaf for leaf in leaves if not tensors.is_inference_made(leaf)]
        staying = [
            (leaf, part)
            for slot, parts in bindings
            for leaf, part in zip(tensors.leaves(slot.rest), parts, strict=True)
            if part is not None and part.data_ptr() != leaf.data_ptr()
        ]
        # At rest, on the device, and whether torch counts what is written to the former.
        self._staying = [(leaf, part, not tensors.is_inference_made(leaf)) for leaf, part in staying]
        self._copied = self._versions_of_staying()
        self._may_ask = any(asks_for_gradients(slot.rest) for slot, _ in bindings)
        self._placed: dict[int, Placement] = {}
        self._on_show: Placement | None = None
        self.kept_writes: tuple[int, int] | None = None
        """The versions before and after writes that were kept; whoever takes note of them puts None here."""
        self._home = home
        self._find_stores([])

    @property
    def needs_thread(self) -> bool:
        """Whether filling a slot touches bytes on the host."""
        return any(store.needs_thread for _, _, store in self.stores)

    def version(self) -> int:
        """Return a number that changes when any of the tensors at rest is written in place."""
        return sum(map(tensors.write_count, self._counted))

    def owners(self) -> list[tuple[nn.Module, str]]:
        """Return all (module, attribute) pairs that are shown the group."""
        return [owner for binding in self._bindings for owner in binding.slot.owners]

    def slots(self) -> list[TensorSlot]:
        """Return the tensors with their owners."""
        return [binding.slot for binding in self._bindings]

    def is_at_rest(self) -> bool:
        """Tell whether all owners have their tensors at rest; False where that takes a closer look."""
        for held, name, rest, _ in self._owned:
            if held["_parameters"].get(name) is not rest:
                return False
        return not self._special

    def replaced(self) -> str | None:
        """Return the name of an owner that does not hold its tensor at rest, or None."""
        if self.is_at_rest():
            return None
        found = (binding.slot.replaced(binding.slot.rest) for binding in self._bindings)
        return next((name for name in found if name is not None), None)

    def refuse_replaced(self) -> None:
        """Raise ConflictError where an owner was given another tensor than ours: to show ours would hide it."""
        for slot in self.slots():
            if slot.replaced(slot.rest) is not None and slot.put_in_place_of(slot.rest) is not None:
                raise ConflictError(
                    f"{slot.owner_name()} was given another tensor while its module is offloaded and its weights "
                    "were at rest (an assignment in a forward, torch.func.functional_call); the weights of now would be "
                    "used instead. Read the weight before you replace it, or remove() the offloading first"
                )

    def is_outdated(self) -> bool:
        """Tell whether tensors were written in place although their bytes travel from a file, which does not change."""
        return self._is_read_from_files and self.version() != self._version_in_files

    def differs_from_file(self, slot: TensorSlot) -> bool:
        """Tell whether a tensor at rest was changed, by whatever way, although its bytes travel from a file."""
        return self._is_read_from_files and self._home.is_changed(slot.rest)

    def refresh(self, *, all_of_it: bool = False) -> bool:
        """Copy anew to the device what stays there of the group and was written to at rest, or all of that.

        Returns whether `fill` reads what was copied, so that it has to come after.
        """
        if not self._staying:
            return False
        now = self._versions_of_staying()
        if now == self._copied and not all_of_it:
            return False
        for (leaf, part, _), version, before in zip(self._staying, now, self._copied, strict=True):
            if all_of_it or version != before:
                part.copy_(leaf)
        self._copied = now
        return bool(self._made)

    def reserve(self) -> None:
        """Say that a fill comes next of all that this process does with other ranks."""
        for _, _, store in self._joint:
            store.reserve()

    def fill(self, pieces: Pieces) -> Sequence[Arrival]:
        """Put the bytes into the memory of a region, in order with the current stream, and make there what is made of them.

        Returns what others send there.
        """
        for offset, size_bytes, store in self._alone:
            store.fill(pieces[offset, size_bytes])
        if not self._joint and not self._made:
            return ()
        arrivals = [joint.begin(pieces[offset, size_bytes]) for offset, size_bytes, joint in self._joint]
        if not self._made:
            return arrivals
        for arrival in arrivals:
            arrival.wait()
        for binding in self._made:
            binding.make_in(pieces.memory)
        return ()

    def show_device(self, memory: torch.Tensor, *, remember: bool) -> None:
        """Let owners have the tensors in `memory`; `remember` them where the same memory comes back every pass."""
        placement = self._placed.get(memory.data_ptr())
        if placement is None:
            placement = Placement(memory, (binding.placed_in(memory) for binding in self._bindings))
            if remember:
                self._placed[memory.data_ptr()] = placement
        else:
            placement.begin(memory)
        self._on_show = placement
        asks = self._may_ask and not torch.is_grad_enabled()
        if placement.asks is not asks:
            placement.ask([asks and asks_for_gradients(binding.slot.rest) for binding in self._bindings])
            placement.asks = asks
        shown = placement.tensors
        for held, name, _, at in self._owned:
            if name in (parameters := held["_parameters"]):
                parameters[name] = shown[at]
        for slot, at in self._special:
            slot.show(shown[at])

    @property
    def is_on_show(self) -> bool:
        """Whether owners have the tensors on the device."""
        return self._on_show is not None

    def on_device(self, rest: torch.Tensor) -> torch.Tensor | None:
        """Return what owners have for the tensor at rest now, or None where the group is not on the device."""
        if self._on_show is None:
            return None
        pairs = zip(self._bindings, self._on_show.tensors, strict=True)
        return next((tensor for binding, tensor in pairs if binding.slot.rest is rest), None)

    def show_rest(self) -> None:
        """Let owners have the tensors at rest, whatever they have now."""
        self._on_show = None
        for held, name, rest, _ in self._owned:
            if name in (parameters := held["_parameters"]):
                parameters[name] = rest
        for slot, _ in self._special:
            slot.show(slot.rest)

    def restore(self) -> None:
        """Let owners have the tensors at rest that have some of ours: what they were given between calls stays theirs."""
        self._on_show = None
        for slot in self.slots():
            slot.show(slot.rest, instead_of=slot.rest)

    def put_away(self) -> bool:
        """Let owners have the tensors at rest, with what a forward wrote to them; tell if somebody else has them still.

        Then their memory must stay as it is while `is_held_by_others` says so.
        """
        placement, self._on_show = self._on_show, None
        if placement is None:
            return False
        new = None if self._is_shown(placement.tensors) else self._given_instead(placement)
        written = placement.written()
        if written or placement.is_replaced:
            self._keep_writes(placement, written, new or [None] * len(placement.tensors))
        del new  # it may refer to them
        self.show_rest()
        if not placement.is_held_by_others():
            return False
        self._placed[placement.address] = placement
        return True

    def _is_shown(self, shown: Sequence[torch.Tensor]) -> bool:
        """Tell whether all owners still have what they were shown; False where that takes a closer look."""
        for held, name, _, at in self._owned:
            if held["_parameters"].get(name) is not shown[at]:
                return False
        return not self._special

    def _given_instead(self, placement: Placement) -> list[torch.Tensor | None]:
        """Return what owners were given in the place of tensors on show."""
        pairs = zip(self._bindings, placement.tensors, strict=True)
        new = [binding.slot.put_in_place_of(tensor) for binding, tensor in pairs]
        is_replaced = any(value is not None for value in new)
        if is_replaced and is_in_functional_call():
            self.show_rest()
            raise ConflictError(
                f"{self.name or 'a module'} was called through torch.func.functional_call while its module is offloaded; "
                "that puts other tensors in the place of weights for a while, which would be taken for a change of them. "
                "Call it so before it is offloaded, or inside `with offload_of(module).edit():`"
            )
        placement.is_replaced |= is_replaced
        return new

    def keep_late_writes(self, memory: torch.Tensor) -> None:
        """Keep what was written through views of `memory` after the group was put away."""
        placement = self._placed.get(memory.data_ptr())
        written = placement.written() if placement is not None else []
        if placement is not None and written:
            self._keep_writes(placement, written, [None] * len(placement.tensors))

    def is_replaced(self, memory: torch.Tensor) -> bool:
        """Tell whether what is in `memory` belongs to others alone, and the group has other tensors."""
        placement = self._placed.get(memory.data_ptr())
        return placement is None or placement.is_replaced

    def is_held_by_others(self, memory: torch.Tensor) -> bool:
        """Tell whether somebody still has a tensor in `memory`, or a view of one."""
        placement = self._placed.get(memory.data_ptr())
        return placement is not None and placement.is_held_by_others()

    def close(self, *, but: torch.Tensor | None = None) -> None:
        """Let the device memory go that the group was placed in, `but` this, also while something refers to the group."""
        kept = None if but is None else but.data_ptr()
        self._placed = {address: placement for address, placement in self._placed.items() if address == kept}

    def forget(self, memory: torch.Tensor) -> None:
        """Drop the tensors in `memory`, which will not come back."""
        self._placed.pop(memory.data_ptr(), None)

    def _keep_writes(self, placement: Placement, written: Sequence[int], new: Sequence[torch.Tensor | None]) -> None:
        """Copy to the tensors at rest what a forward wrote to those on show, or put in their place."""
        changed: list[torch.Tensor] = []
        before = self.version()
        check_files_of(leaf for binding in self._bindings for leaf in tensors.leaves(binding.slot.rest))
        for at, (binding, tensor) in enumerate(zip(self._bindings, placement.tensors, strict=True)):
            value = tensor if at in written else new[at]
            if value is None:
                continue
            rest = binding.slot.rest
            if value.shape != rest.shape:
                raise ConflictError(
                    f"a forward gave {binding.slot.owner_name()} the shape {list(value.shape)} instead of "
                    f"{list(rest.shape)}; offloaded weights keep their shape: remove() the offloading first"
                )
            tensors.copy_values(rest, value)
            changed += tensors.leaves(rest)
        placement.is_replaced |= not placement.is_whole()
        if placement.is_replaced:
            self._placed.pop(placement.address, None)
        self.kept_writes = before, self.version()
        self._find_stores(changed)

    def _versions_of_staying(self) -> list[int]:
        return [leaf._version if counts else 0 for leaf, _, counts in self._staying]  # noqa: SLF001

    def _find_stores(self, changed: Sequence[torch.Tensor]) -> None:
        self.stores = tuple(self._home.stores(changed))
        self._joint = [(at, size, store) for at, size, store in self.stores if isinstance(store, JointStore)]
        self.is_joint = bool(self._joint)
        """Whether other ranks wait for each fill."""
        self._alone = [each for each in self.stores if not isinstance(each[2], JointStore)]
        self._is_read_from_files = any(store.kind in ("disk", "mapped") for _, _, store in self.stores)
        self._version_in_files = self.version()


def _has_it(module: nn.Module, name: str) -> bool:
    """Tell whether a module has a parameter in its table and nowhere else: recurrent layers keep a list of theirs."""
    return name in module._parameters and not isinstance(module, nn.RNNBase)  # noqa: SLF001
