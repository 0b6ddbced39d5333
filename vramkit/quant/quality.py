"""How far stored weights, or results computed from them, are from the exact ones."""

from __future__ import annotations

import math

import torch

from vramkit.errors import ConfigError

__all__ = ["sqnr_db"]


def sqnr_db(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels: 20 log10(||exact|| / ||exact - stored||), in float64.

    6 dB are one bit. Infinite where both are the same; fp8 e4m3 with scales reaches 31.5, e5m2 25.5.

    Args:
        exact: any shape, floating point.
        stored: the same shape; a tensor of a narrow kind counts as what it computes as.

    Raises:
        ConfigError: the shapes differ, or `exact` is all zeros and `stored` is not.
    """
    if exact.shape != stored.shape:
        raise ConfigError(f"exact has shape {list(exact.shape)} and stored {list(stored.shape)}; give the same shape")
    signal = exact.detach().double()
    noise = (signal - stored.detach().double()).norm().item()
    if noise == 0:
        return math.inf
    if not signal.any():
        raise ConfigError("exact holds only zeros and stored does not, so no ratio says how far they are apart")
    return 20 * math.log10(signal.norm().item() / noise)
