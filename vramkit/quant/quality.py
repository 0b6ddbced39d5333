"""How far stored weights, or results computed from them, are from the exact ones."""

from __future__ import annotations

import math

import torch

from vramkit.errors import ConfigError

__all__ = ["Noise", "sqnr_db"]

_PIECE = 1 << 22  # elements that are widened to float64 at a time


class Noise:
    """Energy of exact values and of their error, summed over as many tensors as are added."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0

    def add(self, exact: torch.Tensor, stored: torch.Tensor) -> None:
        """Count two tensors of one shape; float64 copies are made of a piece at a time.

        Raises:
            ConfigError: the shapes differ.
        """
        if exact.shape != stored.shape:
            raise ConfigError(
                f"exact has shape {list(exact.shape)} and stored {list(stored.shape)}; give the same shape"
            )
        flat = exact.detach().flatten(), stored.detach().flatten()
        for signal, other in zip(*(torch.split(each, _PIECE) for each in flat), strict=True):
            signal = signal.double()  # noqa: PLW2901 (frees the piece)
            self._signal += signal.square().sum().item()
            self._noise += signal.sub_(other.to(signal.device)).square().sum().item()

    @property
    def db(self) -> float:
        """The ratio in decibels: infinite without error, NaN where there is an error and no signal, or values not finite."""
        if self._noise == 0:
            return math.inf
        ratio = self._signal / self._noise
        return 10 * math.log10(ratio) if ratio > 0 else math.nan


def sqnr_db(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels: 20 log10(||exact|| / ||exact - stored||), in float64.

    6 dB are one bit. Infinite where both are the same; fp8 e4m3 with scales reaches 31.5, e5m2 25.5.

    Args:
        exact: any shape, floating point.
        stored: the same shape; a tensor of a narrow kind counts as what it computes as.

    Raises:
        ConfigError: the shapes differ, or `exact` is all zeros and `stored` is not.
    """
    noise = Noise()
    noise.add(exact, stored)
    if math.isnan(noise.db) and not exact.detach().any():
        raise ConfigError("exact holds only zeros and stored does not, so no ratio says how far they are apart")
    return noise.db
