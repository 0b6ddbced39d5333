"""What of a clip is known before it is denoised: how that goes into the transformer and past the scheduler.

Shapes: B clips, S tokens; latents are laid out as the family has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Beside", "FirstFrame", "FirstTokens", "Known", "Step", "timestep_of_each_token"]

Step = Callable[..., Tensor]  # (prediction, timestep, latents, options of the scheduler's step) -> latents


class Known:
    """Nothing is known: latents and timestep go in as they are. Others say in which way they do not."""

    def prepared(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents before a step."""
        return latents

    def inputs(self, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """What the transformer is given for latents and the timestep of a step."""
        return {"hidden_states": latents, "timestep": timestep.expand(latents.shape[0])}

    def stepped(self, step: Step, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The latents after a step of the scheduler."""
        return step(noise, timestep, latents)

    def finished(self, latents: Tensor) -> Tensor:
        """The latents after the last step, as they are decoded."""
        return latents


@dataclass(frozen=True, slots=True, eq=False)
class Beside(Known):
    """More channels than are denoised: the transformer sees what is known beside the noise."""

    channels: Tensor
    dim: int

    def inputs(self, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The same with more channels."""
        return Known.inputs(self, torch.cat([latents, self.channels], dim=self.dim), timestep)


@dataclass(frozen=True, slots=True, eq=False)
class FirstFrame(Known):
    """The first frame of latents [B, c, f, h, w], which the transformer sees without noise and at a timestep of 0."""

    frame: Tensor  # [B, c, 1, h, w]
    tokens: int  # of a frame

    def inputs(self, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The latents with that frame, and a timestep for it and for what comes after it."""
        others = (latents.shape[2] - 1) * self.tokens
        return {"hidden_states": self.finished(latents), **_zero_and(timestep, self.tokens, others, latents.shape[0])}

    def finished(self, latents: Tensor) -> Tensor:
        """The latents with that frame."""
        return torch.cat([self.frame.expand(latents.shape[0], -1, -1, -1, -1), latents[:, :, 1:]], dim=2)


@dataclass(frozen=True, slots=True, eq=False)
class FirstTokens(Known):
    """The first tokens of latents [B, S, c], which stay as they are and have a timestep of 0."""

    tokens: int

    def inputs(self, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The latents, and a timestep for those tokens and for what comes after them."""
        others = latents.shape[1] - self.tokens
        return {"hidden_states": latents, **_zero_and(timestep, self.tokens, others, latents.shape[0])}

    def stepped(self, step: Step, noise: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """A step of what comes after those tokens."""
        others = step(noise[:, self.tokens :], timestep, latents[:, self.tokens :])
        return torch.cat([latents[:, : self.tokens], others], dim=1)


def _zero_and(timestep: Tensor, first: int, others: int, batch: int) -> dict[str, Any]:
    """A timestep of 0 for the first tokens, and the one of the step for the others, if there are any."""
    timesteps = torch.stack([torch.zeros_like(timestep), timestep]).float()[None]
    runs = slice(0, 2 if others else 1)
    return {"timestep": timesteps[:, runs].expand(batch, -1), "timestep_tokens": (first, others)[runs]}


def timestep_of_each_token(timesteps: Tensor, lengths: Sequence[int]) -> Tensor:
    """Timesteps [B, N] of runs of so many tokens -> [B, S], as the published models take them."""
    return torch.cat([timesteps[:, n : n + 1].expand(-1, length) for n, length in enumerate(lengths)], dim=1)
