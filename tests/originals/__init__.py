"""Small stand-ins for the published repositories of video models, in the shapes of their code.

What matters is how each of them reaches its weights: through calls, past them, through tables of functions, through
attributes that move by themselves. Widths are tiny, and numbers mean nothing.
"""

from __future__ import annotations

from originals import autoencoders, encoders, flux, ltx, others, wan
from originals.parts import Call, Original, Put

__all__ = ["ORIGINALS", "Call", "Original", "Put"]

ORIGINALS: dict[str, Original] = (
    wan.MODELS | flux.MODELS | ltx.MODELS | others.MODELS | autoencoders.MODELS | encoders.MODELS
)
