"""A tensor at rest and the places that own it, which are shown another one while it is on the device."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from vramkit import tensors
from vramkit.offload.watch import stands_for

__all__ = ["TensorSlot", "asks_for_gradients"]


def asks_for_gradients(rest: torch.Tensor) -> bool:
    """Tell whether torch takes `rest` for trainable: what was made in inference mode may say so and is not."""
    return rest.requires_grad and not tensors.is_inference_made(rest)


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

    def owner_name(self) -> str:
        """Return the first owner's class and attribute, for messages."""
        module, name = self.owners[0]
        return f"{type(module).__name__}.{name}"

    def put_in_place_of(self, mine: torch.Tensor) -> torch.Tensor | None:
        """Return what an owner was given instead of `mine`, by whoever but us, or None."""
        for module, name in self.owners:
            held = module._parameters.get(name)  # noqa: SLF001
            if held is not None and not self._is_one(held, mine):
                return held
        return None

    def show(self, tensor: torch.Tensor, *, instead_of: torch.Tensor | None = None) -> None:
        """Let every owner have `tensor` under its name; or only those that have `instead_of`, or another one of ours."""
        for module, name in self.owners:
            if instead_of is not None and not self._is_one(module._parameters.get(name), instead_of):  # noqa: SLF001
                continue
            if isinstance(module, nn.RNNBase):
                nn.RNNBase.__setattr__(module, name, tensor)  # keeps a list of them for its kernels
            elif name in module._parameters:  # noqa: SLF001 (a class may refuse setattr, which is slow, too)
                module._parameters[name] = tensor  # type: ignore[assignment]  # noqa: SLF001
            elif name in module._buffers:  # noqa: SLF001 (a forward may have deleted it)
                module._buffers[name] = tensor  # noqa: SLF001

    def _is_one(self, held: torch.Tensor | None, mine: torch.Tensor) -> bool:
        return held is mine or held is self.rest or (held is not None and stands_for(held, self.rest))
