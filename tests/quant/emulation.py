"""torch._scaled_mm with a scale per row, written out, for CPUs and versions of torch without it and to compare with."""

from __future__ import annotations

import torch


def emulated(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """Multiply a [M, K] by b [K, N], both e4m3, in float64; refuses what the kernels refuse."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.t().is_contiguous()  # column by column
    assert a.shape[1] % 16 == b.shape[1] % 16 == 0
    assert scale_a.shape == (a.shape[0], 1)
    assert scale_b.shape == (1, b.shape[1])
    out = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    return (out if bias is None else out + bias.double()).to(out_dtype)
