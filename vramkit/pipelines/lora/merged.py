"""A weight with adapters added to it, kept apart from them: what it was at rest, the sum where it is used.

Offloading moves the inner tensors, which are what `__tensor_flatten__` names, and makes the sum once in each slot, as soon
as they are there (`materialize_`): a layer then computes as if the adapters were fused, and the base stays what it is, in
the file that it is in. Anywhere else every use makes the sum anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vramkit.wrapper import WrapperTensor

__all__ = ["MergedTensor", "Product", "add_product"]

_CHUNK = 2**23  # numbers that are summed in float32 at a time

Product = tuple[torch.Tensor, torch.Tensor, float]  # up [out, rank], down [rank, in], factor


class MergedTensor(WrapperTensor):
    """A plain floating ``base`` [out, in] plus products of two matrices each, rounded once for each product."""

    base: torch.Tensor
    products: tuple[Product, ...]

    @staticmethod
    def __new__(cls: type[MergedTensor], base: torch.Tensor, products: Sequence[Product]) -> MergedTensor:
        """Wrap them; nothing is copied."""
        return cls._shell(base.shape, base.dtype, base.device, base.stride())

    def __init__(self, base: torch.Tensor, products: Sequence[Product]) -> None:
        self.base = base
        self.products = tuple(products)
        for name, part in self.parts().items():
            setattr(self, name, part)  # torch asks for inner tensors as attributes

    def materialize_(self) -> torch.Tensor:
        """Write the sum into ``base``, which is given up for it, and return that."""
        for product in self.products:
            add_product(self.base, *product)
        return self.base

    def dequantize(self) -> torch.Tensor:
        """Return the sum as an ordinary tensor."""
        return MergedTensor(self.base.clone(), self.products).materialize_()

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the inner tensors by name, the base first."""
        parts = {"base": self.base}
        for at, (up, down, _) in enumerate(self.products):
            parts |= {f"up_{at}": up, f"down_{at}": down}
        return parts

    def rebuilt(self, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> MergedTensor:
        """Return the same around other inner tensors."""
        given = {name: part if dtype is None else part.to(dtype) for name, part in parts.items()}
        return MergedTensor(given["base"], _products(given, [factor for *_, factor in self.products]))

    def refusal(self) -> str:
        """Say what an operation would write to, why it may not, and what to do instead."""
        return "a weight that adapters are added to at each use, and the change would be lost; unfuse_lora() first"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[float, ...]]:
        """Name the inner tensors (an interface of torch)."""
        return list(self.parts()), tuple(factor for *_, factor in self.products)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: tuple[float, ...], size: Sequence[int], stride: Sequence[int]
    ) -> MergedTensor:
        """Wrap other inner tensors (an interface of torch)."""
        return MergedTensor(inner["base"], _products(inner, context))

    def __repr__(self) -> str:  # type: ignore[override]
        ranks = ", ".join(str(down.shape[0]) for _, down, _ in self.products)
        return f"MergedTensor({list(self.shape)}, {self.dtype}, ranks {ranks}, device={self.device})"


@torch.no_grad()
def add_product(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, factor: float) -> None:
    """Add ``factor * up @ down`` to a plain `weight` [out, in] in place: in float32, rounded once, some rows at a time."""
    down = down.to(torch.float32)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for part, some in zip(torch.split(weight, rows), torch.split(up, rows), strict=True):
        wide = part.to(torch.float32)
        wide.addmm_(some.to(torch.float32), down, alpha=factor)  # in place: else autocast would round the operands
        if wide is not part:
            part.copy_(wide)


def _products(parts: dict[str, torch.Tensor], factors: Sequence[float]) -> list[Product]:
    return [(parts[f"up_{at}"], parts[f"down_{at}"], factor) for at, factor in enumerate(factors)]
