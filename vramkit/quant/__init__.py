"""Weights in fewer bits: which, how, under every way of offloading, and how much that costs."""

from vramkit.casting.coverage import Coverage, CoverageWarning, LeftWeight
from vramkit.quant.api import Quantization, adopt, coverage, dequantize, quantization_of, quantize, skip_modules_of
from vramkit.quant.config import (
    BitsAndBytes4bitConfig,
    BitsAndBytes8bitConfig,
    Fp8Config,
    GgufConfig,
    QuantConfig,
    QuantoConfig,
)
from vramkit.quant.files import load_quantized, save_quantized
from vramkit.quant.pipeline import PipelineQuantizationConfig
from vramkit.quant.quality import sqnr_db
from vramkit.quant.report import QuantizationReport, report

__all__ = [
    "BitsAndBytes4bitConfig",
    "BitsAndBytes8bitConfig",
    "Coverage",
    "CoverageWarning",
    "Fp8Config",
    "GgufConfig",
    "LeftWeight",
    "PipelineQuantizationConfig",
    "QuantConfig",
    "Quantization",
    "QuantizationReport",
    "QuantoConfig",
    "adopt",
    "coverage",
    "dequantize",
    "load_quantized",
    "quantization_of",
    "quantize",
    "report",
    "save_quantized",
    "skip_modules_of",
    "sqnr_db",
]
