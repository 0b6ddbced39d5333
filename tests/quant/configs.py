"""One config for each kind of quantized weight."""

from __future__ import annotations

from vramkit.quant import BitsAndBytes4bitConfig, BitsAndBytes8bitConfig, Fp8Config, QuantConfig, QuantoConfig

CONFIGS: dict[str, QuantConfig] = {
    "nf4": BitsAndBytes4bitConfig(quant_type="nf4"),
    "nf4_double": BitsAndBytes4bitConfig(quant_type="nf4", double_quant=True),
    "fp4": BitsAndBytes4bitConfig(quant_type="fp4", block_size=128),
    "int8": BitsAndBytes8bitConfig(),
    "int8_no_outliers": BitsAndBytes8bitConfig(threshold=0.0),
    "quanto_int8": QuantoConfig(weights="int8"),
    "quanto_int4": QuantoConfig(weights="int4"),
    "quanto_int2": QuantoConfig(weights="int2"),
    "quanto_float8": QuantoConfig(weights="float8"),
    "fp8": Fp8Config(),
}
ALIKE_COMPILED = {"nf4", "fp4", "int8_no_outliers", "quanto_int2", "quanto_float8"}  # to others that are here
