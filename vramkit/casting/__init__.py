"""Weights stored in fp8 and computed in a wider dtype."""

from vramkit.casting.api import LayerwiseCasting, apply_layerwise_casting
from vramkit.casting.coverage import Coverage, CoverageWarning, LeftWeight
from vramkit.casting.narrow import NarrowTensor, narrowed

__all__ = [
    "Coverage",
    "CoverageWarning",
    "LayerwiseCasting",
    "LeftWeight",
    "NarrowTensor",
    "apply_layerwise_casting",
    "narrowed",
]
