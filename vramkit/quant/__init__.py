"""Weights in fewer bits, and how much that costs. fp8 storage is in `vramkit.casting`; this measures any storage."""

from vramkit.quant.quality import sqnr_db

__all__ = ["sqnr_db"]
