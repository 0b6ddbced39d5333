"""Weights in fewer bits, and how much that costs. fp8 storage is in `vramkit.casting`; this measures any storage."""

from vramkit.quant.quality import sqnr_db
from vramkit.quant.report import QuantizationReport, report

__all__ = ["QuantizationReport", "report", "sqnr_db"]
