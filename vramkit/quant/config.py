"""How weights are to be quantized: one frozen dataclass per backend, and the choice of components of a pipeline.

Option names of bitsandbytes, quanto and their configs in diffusers and transformers are understood beside our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from vramkit.casting.weights import Skips
from vramkit.errors import ConfigError

__all__ = [
    "BitsAndBytes4bitConfig",
    "BitsAndBytes8bitConfig",
    "Fp8Config",
    "GgufConfig",
    "QuantConfig",
    "QuantoConfig",
]

_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What all backends have in common."""

    backend: ClassVar[str]
    # Names that other libraries give to our options; None for options that say nothing here.
    peer_names: ClassVar[Mapping[str, str | None]] = MappingProxyType({})

    skip_modules: Sequence[str] | None = None
    """Regular expressions searched in module names; what matches stays as it is, with what is below it. None: the
    model's own list."""

    def __post_init__(self) -> None:
        if self.skip_modules is not None:
            patterns = [self.skip_modules] if isinstance(self.skip_modules, str) else self.skip_modules
            if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
                raise ConfigError(f"{self.backend}: skip_modules={patterns!r}; expected regular expressions")
            Skips.of(f"{self.backend}: skip_modules", patterns)  # refuses what are none
            object.__setattr__(self, "skip_modules", tuple(patterns))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A config from options under our names or under those of the peers.

        Raises:
            ConfigError: an option that the backend does not have, or a value that it cannot use.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for key, value in options.items():
            name = cls.peer_names.get(key, key)
            if name is None:
                continue
            if name not in own:
                raise ConfigError(f"{cls.backend} has no option {key!r}; expected some of {', '.join(sorted(own))}")
            given[name] = value
        try:
            return cls(**given)
        except ConfigError as error:
            said = str(error)  # of our names
            for key in options:
                said = said.replace(f" {cls.peer_names.get(key)}=", f" {key}=")
            raise ConfigError(said) from error

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON keeps them, with the backend's name."""
        return {"backend": self.backend, **dataclasses.asdict(self)}

    def _choose(self, name: str, choices: Sequence[Any]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(
                f"{self.backend}: {name}={value!r}; expected one of {', '.join(repr(choice) for choice in choices)}"
            )

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ConfigError(f"{self.backend}: {name}={getattr(self, name)!r}; expected True or False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsAndBytes4bitConfig(QuantConfig):
    """4 bits per weight and a scale per block of weights (QLoRA, arXiv:2305.14314), by bitsandbytes."""

    backend: ClassVar[str] = "bitsandbytes_4bit"
    peer_names: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {
            "bnb_4bit_quant_type": "quant_type",
            "bnb_4bit_use_double_quant": "double_quant",
            "bnb_4bit_compute_dtype": "compute_dtype",
            "bnb_4bit_quant_storage": "storage",
            "llm_int8_skip_modules": "skip_modules",
            "load_in_4bit": None,
            "load_in_8bit": None,
            "llm_int8_threshold": None,
            "llm_int8_enable_fp32_cpu_offload": None,
            "llm_int8_has_fp16_weight": None,
        }
    )

    quant_type: str = "fp4"
    """``"nf4"`` (normal float, the better one for weights) or ``"fp4"`` (the peers' default)."""
    double_quant: bool = False
    """Whether the scales are quantized too, to 8 bits: 4.13 bits per weight instead of 4.5."""
    compute_dtype: str | torch.dtype | None = None
    """float32, bfloat16 or float16; None is the dtype of the weights. Inputs are cast to it, and results back."""
    block_size: int = 64
    """Weights that share a scale."""
    storage: str | torch.dtype | None = None
    """Only uint8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compute_dtype", "storage"):  # a name, so that the config is the same after JSON
            value = getattr(self, name)
            object.__setattr__(self, name, str(value).removeprefix("torch.") if value is not None else None)
        self._choose("quant_type", ("nf4", "fp4"))
        self._choose("block_size", _BLOCK_SIZES)
        self._choose("compute_dtype", (None, *_COMPUTE_DTYPES))
        self._choose("storage", (None, "uint8"))
        self._flag("double_quant")

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """The compute dtype as torch knows it."""
        return None if self.compute_dtype is None else _COMPUTE_DTYPES[str(self.compute_dtype)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsAndBytes8bitConfig(QuantConfig):
    """8 bits per weight, inputs in 8 bits too but for outliers (LLM.int8, arXiv:2208.07339), by bitsandbytes."""

    backend: ClassVar[str] = "bitsandbytes_8bit"
    peer_names: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {
            "llm_int8_threshold": "threshold",
            "llm_int8_skip_modules": "skip_modules",
            "load_in_8bit": None,
            "load_in_4bit": None,
            "llm_int8_enable_fp32_cpu_offload": None,
            "llm_int8_has_fp16_weight": None,
            "bnb_4bit_quant_type": None,
            "bnb_4bit_use_double_quant": None,
            "bnb_4bit_compute_dtype": None,
            "bnb_4bit_quant_storage": None,
        }
    )

    threshold: float = 6.0
    """Inputs of at least this size are outliers, whose columns are multiplied exactly; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not self.threshold >= 0:
            raise ConfigError(f"{self.backend}: threshold={self.threshold!r}; expected a number >= 0")
        object.__setattr__(self, "threshold", float(self.threshold))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantoConfig(QuantConfig):
    """Weights of optimum-quanto; inputs stay as they are."""

    backend: ClassVar[str] = "quanto"
    peer_names: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {"weights_dtype": "weights", "modules_to_not_convert": "skip_modules"}
    )

    weights: str = "int8"
    """``"int8"``, ``"int4"``, ``"int2"`` or ``"float8"`` (e4m3)."""
    activations: None = None
    """Only None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose("weights", ("int8", "int4", "int2", "float8"))
        self._choose("activations", (None,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Config(QuantConfig):
    """fp8 with a scale per row, by vramkit itself."""

    backend: ClassVar[str] = "fp8"
    peer_names: ClassVar[Mapping[str, str | None]] = MappingProxyType({"weights_dtype": "dtype"})

    dtype: str = "float8_e4m3fn"
    """``"float8_e4m3fn"`` (31 dB) or ``"float8_e5m2"`` (25 dB)."""
    compute: str = "storage"
    """``"storage"`` widens a weight in the operation that uses it; ``"scaled_mm"`` narrows the inputs too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        self._choose("dtype", ("float8_e4m3fn", "float8_e5m2"))
        self._choose("compute", ("storage", "scaled_mm"))
        if self.compute == "scaled_mm" and self.dtype != "float8_e4m3fn":
            raise ConfigError(
                f"compute='scaled_mm' multiplies in float8_e4m3fn, but dtype={self.dtype!r} was given; leave out one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufConfig(QuantConfig):
    """Weights of a ``.gguf`` file in its own block formats. Nothing is quantized by it: what a file holds stays so."""

    backend: ClassVar[str] = "gguf"
    peer_names: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {"pre_quantized": None, "modules_to_not_convert": None}
    )

    compute_dtype: str | torch.dtype | None = None
    """float32, bfloat16 or float16, where a call gives no ``torch_dtype``; None is the dtype of the file's biases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.compute_dtype
        object.__setattr__(self, "compute_dtype", None if given is None else str(given).removeprefix("torch."))
        self._choose("compute_dtype", (None, *_COMPUTE_DTYPES))

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """The compute dtype as torch knows it."""
        return None if self.compute_dtype is None else _COMPUTE_DTYPES[str(self.compute_dtype)]
