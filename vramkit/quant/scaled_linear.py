"""A linear layer that multiplies in fp8, through torch._scaled_mm with a scale per row on both sides.

Weights rest as in storage only: fp8 e4m3 and a power of two per output row (`NarrowTensor`). Activations are narrowed the
same way when they come, with a scale per token. Products are summed in the tensor cores, scaled, and rounded to bfloat16.

Shapes: M tokens, K in_features, N out_features.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vramkit.casting.narrow import NarrowTensor, row_scales
from vramkit.quant.tensor import autocast_dtype
from vramkit.shared_input import made_once

__all__ = ["ScaledLinear", "narrow_rows", "scaled_mm_problem"]

MULTIPLE = 16  # of in_features and out_features: what the kernels ask for
_DTYPE = torch.float8_e4m3fn
_MIN_CAPABILITY = (8, 9)
LinearT = TypeVar("LinearT", bound=nn.Linear)

_PIECE = 1 << 24  # elements of the activations that exist a third time, scaled but not yet narrow


class ScaledLinear(nn.Linear):
    """A linear layer whose weight is a `NarrowTensor` in e4m3 and whose inputs are narrowed for the product.

    On devices other than `multiplies_on`, and with a weight of another kind (after merging an adapter, say), it is an
    ordinary linear layer.
    """

    multiplies_on: str

    @classmethod
    def of(cls, layer: nn.Linear, multiplies_on: str) -> ScaledLinear:
        """Return a layer that shares the parameters of `layer` and multiplies in fp8 on devices of a type such as "cuda"."""
        scaled = _sharing(cls, layer)
        scaled.multiplies_on = multiplies_on
        return scaled

    def plain(self) -> nn.Linear:
        """Return an ordinary linear layer that shares the parameters of this one."""
        return _sharing(nn.Linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., K], bf16, fp16 or fp32 -> [..., N] of the same dtype, or of autocast's."""
        weight = self.weight
        if not isinstance(weight, NarrowTensor) or weight.scale is None:
            return F.linear(x, weight, self.bias)
        if x.device.type != self.multiplies_on or not x.numel():
            return F.linear(x, weight, self.bias)
        given, dtype = x, autocast_dtype(x) or x.dtype
        x = x.to(dtype)  # autocast does not know fp8 products
        stored, scale = made_once(given, dtype, lambda: narrow_rows(x.reshape(-1, self.in_features)))
        fused_bias = self.bias if x.dtype == torch.bfloat16 else None
        out = torch._scaled_mm(  # noqa: SLF001 (torch has no public name for it in the versions that are declared)
            stored,
            weight.stored.t(),
            scale_a=scale,
            scale_b=weight.scale.t(),
            bias=fused_bias,
            out_dtype=torch.bfloat16,  # the one that every row-wise kernel has
            use_fast_accum=True,
        ).to(x.dtype)
        if self.bias is not None and fused_bias is None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say where it multiplies in fp8."""
        return f"{super().extra_repr()}, fp8 products on {self.multiplies_on}"


def _sharing(kind: type[LinearT], layer: nn.Linear) -> LinearT:
    with torch.device("meta"):
        made = kind(layer.in_features, layer.out_features, bias=False, dtype=layer.weight.dtype)
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def narrow_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Narrow activations [M, K] to e4m3 [M, K] with a power of two per token, float32 [M, 1].

    The scaled values exist for a piece of the tokens at a time: bfloat16 for bfloat16 (scaling is exact), else float32.
    """
    scale = row_scales(x, _DTYPE)
    by = scale.to(torch.bfloat16) if x.dtype == torch.bfloat16 else scale
    if x.numel() <= _PIECE or torch.compiler.is_compiling():  # compiled it is one fused kernel
        return (x / by).to(_DTYPE), scale
    stored = torch.empty(x.shape, dtype=_DTYPE, device=x.device)
    rows = max(1, _PIECE // x.shape[1])
    for out, part, own in zip(*(torch.split(each, rows) for each in (stored, x, by)), strict=True):
        out.copy_(part / own)
    return stored, scale


def scaled_mm_problem(device: torch.device) -> str | None:
    """Say why `device` cannot multiply in fp8 with scales per row, or None if it can: a small product is tried."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            found, needed = (".".join(map(str, version)) for version in (capability, _MIN_CAPABILITY))
            return f"compute capability {found}, at least {needed} is needed"
    try:
        probe = torch.ones(MULTIPLE, 2 * MULTIPLE, device=device).to(_DTYPE)
        scale = torch.ones(MULTIPLE, 1, device=device)
        torch._scaled_mm(probe, probe.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)  # noqa: SLF001
    except (RuntimeError, ValueError, AttributeError) as error:  # NotImplementedError is a RuntimeError
        return str(error).strip().split("\n", maxsplit=1)[0]
    return None
