"""What the video autoencoders return: a distribution of latents, or decoded samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vramkit.errors import ConfigError

__all__ = ["DecoderOutput", "EncoderOutput", "LatentDistribution"]


class LatentDistribution:
    """A Gaussian with a diagonal covariance over latents.

    `parameters` [B, 2C, ...] holds the means and after them the logarithms of the variances, which are clamped to [-30, 20].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # each [B, C, ...]
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviations, [B, C, ...]."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variances, [B, C, ...]."""
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents, which are the means, [B, C, ...]."""
        return self.mean

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draw latents [B, C, ...]; a list of generators draws each item of the batch from its own.

        A generator on the CPU gives the same latents on every device.

        Raises:
            ConfigError: the number of generators is not the batch size.
        """
        if generator is None or isinstance(generator, torch.Generator):
            noise = self._noise(self.mean.shape, generator)
        elif len(generator) == 1:
            noise = self._noise(self.mean.shape, generator[0])
        elif len(generator) == self.mean.shape[0]:
            noise = torch.cat([self._noise((1, *self.mean.shape[1:]), one) for one in generator])
        else:
            raise ConfigError(
                f"Got {len(generator)} generators for a batch of {self.mean.shape[0]}; pass one, or one for each item."
            )
        return noise.mul_(self.std).add_(self.mean)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=self.mean.dtype).to(self.mean.device)


class EncoderOutput(NamedTuple):
    """What `encode` returns."""

    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    """What `decode` returns: `sample` [B, 3, F, H, W], between -1 and 1."""

    sample: Tensor
