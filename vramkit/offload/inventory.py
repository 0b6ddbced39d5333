"""What a module holds: every tensor once, with all its owners, checked before anything is changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from vramkit import tensors
from vramkit.errors import ConfigError, ConflictError, UnsupportedTensorError
from vramkit.offload.tensor_slot import TensorSlot

__all__ = ["Inventory", "Item", "refuse_foreign_hooks", "refuse_scripted"]


@dataclasses.dataclass(slots=True, eq=False)
class Item:
    """One tensor of a module under its first name, with all (module, attribute) pairs that own it."""

    name: str
    tensor: torch.Tensor
    owners: list[tuple[nn.Module, str]]
    is_buffer: bool

    @property
    def is_sparse(self) -> bool:
        """Whether this is a sparse buffer: it has no leaves, and is moved to the device as it is."""
        return self.is_buffer and bool(tensors.sparse_parts(self.tensor))

    def leaves(self) -> list[torch.Tensor]:
        """Return the plain tensors that hold the bytes."""
        return [] if self.is_sparse else tensors.leaves(self.tensor)

    def move_to(self, leaves: Sequence[torch.Tensor]) -> None:
        """Let the tensor have its bytes in `leaves` from now on, for every owner and, where it can, whoever refers to it."""
        moved = tensors.rebuild(self.tensor, leaves)
        if tensors.is_plain(self.tensor) and not tensors.is_inference_made(self.tensor):
            self.tensor.data = moved  # the same object: what a user holds does not keep the old memory alive
            return
        asks_for_gradients = self.tensor.requires_grad
        self.tensor = tensors.as_owned(moved, like=self.tensor)
        self.tensor.requires_grad_(asks_for_gradients)
        TensorSlot(self.tensor, self.owners).show(self.tensor)

    def slot_for(self, holders: set[nn.Module]) -> TensorSlot:
        """Return the tensor with those of its owners that are among `holders`."""
        return TensorSlot(self.tensor, [owner for owner in self.owners if owner[0] in holders])


class Inventory:
    """The tensors below `root`."""

    def __init__(self, root: nn.Module, *, needs_values: bool = True) -> None:
        """List everything.

        Args:
            root: the module.
            needs_values: whether tensors on the meta device are refused.

        Raises:
            ConflictError: another library has its own offloading on the module; names it and how to take it off.
            ConfigError: a tensor is on the meta device, or a part is compiled by TorchScript.
            UnsupportedTensorError: a tensor cannot be taken apart.
        """
        self._by_id: dict[int, Item] = {}
        self._needs_values = needs_values
        for prefix, module in root.named_modules():
            refuse_foreign_hooks(prefix or type(root).__name__, module)
            refuse_scripted(prefix or type(root).__name__, module)
            for held, is_buffer in ((module._parameters, False), (module._buffers, True)):  # noqa: SLF001
                for key, tensor in held.items():
                    if tensor is not None:
                        self._add(f"{prefix}.{key}" if prefix else key, tensor, (module, key), is_buffer)
        self._users = Counter(
            leaf.untyped_storage().data_ptr() for item in self for leaf in item.leaves() if leaf.numel()
        )

    def __iter__(self) -> Iterator[Item]:
        return iter(self._by_id.values())

    def parameters_of(self, holders: Iterable[nn.Module]) -> list[Item]:
        """Return the distinct parameters that `holders` own themselves, in order."""
        own = (p for holder in holders for p in holder._parameters.values() if p is not None)  # noqa: SLF001
        found = {id(parameter): self._by_id[id(parameter)] for parameter in own}
        return list(found.values())

    def shares_memory(self, leaf: torch.Tensor) -> bool:
        """Whether another tensor of the module lies in the same storage."""
        return self._users[leaf.untyped_storage().data_ptr()] > 1

    def _add(self, name: str, tensor: torch.Tensor, owner: tuple[nn.Module, str], is_buffer: bool) -> None:
        item = self._by_id.get(id(tensor))
        if item is not None:
            item.owners.append(owner)
            return
        item = Item(name, tensor, [owner], is_buffer)
        try:
            leaves = item.leaves()
        except UnsupportedTensorError as error:
            raise UnsupportedTensorError(f"{name}: {error}") from error
        if self._needs_values and any(leaf.device.type == "meta" for leaf in leaves):
            raise ConfigError(f"{name} is on the meta device, so it has no values to offload; load the weights first")
        self._by_id[id(tensor)] = item


def refuse_foreign_hooks(name: str, module: nn.Module) -> None:
    """Raise ConflictError where another library moves or casts the weights of `module`."""
    if hasattr(module, "_hf_hook"):
        raise ConflictError(
            f"Cannot apply group offloading: {name} carries an accelerate hook "
            f"({type(module._hf_hook).__name__}), which moves weights too; "  # noqa: SLF001
            "call accelerate.hooks.remove_hook_from_module(module, recurse=True) first"
        )
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [hook for hook in getattr(registry, "hooks", {}) if "offload" in hook or "casting" in hook]
    if hooks:
        raise ConflictError(
            f"Cannot apply group offloading: {name} carries diffusers' hook {hooks[0]!r}, which moves or casts weights "
            f"too; remove it first (module._diffusers_hook.remove_hook({hooks[0]!r}, recurse=True)) and use vramkit's "
            "instead"
        )


def refuse_scripted(name: str, module: nn.Module) -> None:
    """Raise ConfigError where `module` is compiled by TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(
            f"{name} is compiled by TorchScript, which takes neither hooks nor other tensors for its weights; put the "
            "module that it was scripted or traced from in its place, or offload the parts around it one by one"
        )
