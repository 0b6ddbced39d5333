"""Which components of a pipeline are quantized, and how each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vramkit.errors import ConfigError
from vramkit.quant.config import QuantConfig
from vramkit.quant.registry import as_config, config_class

__all__ = ["PipelineQuantizationConfig"]

_LEFT_ALONE = ("vae",)  # holds next to no linear layers, and its pictures are what everybody sees


class PipelineQuantizationConfig:
    """For ``from_pretrained(..., quantization_config=...)`` of a pipeline; mirrors the class of that name in diffusers."""

    def __init__(
        self,
        quant_backend: str | None = None,
        quant_kwargs: Mapping[str, Any] | None = None,
        components_to_quantize: Sequence[str] | str | None = None,
        quant_mapping: Mapping[str, Any] | None = None,
    ) -> None:
        """Either one backend for several components, or a config for each.

        Args:
            quant_backend: ``"bitsandbytes_4bit"``, ``"bitsandbytes_8bit"``, ``"quanto"`` or ``"fp8"``.
            quant_kwargs: options of that backend, under our names or those of the peers.
            components_to_quantize: names of components; None for every model but the VAE.
            quant_mapping: component name -> config (one of ours, or of a peer).

        Raises:
            ConfigError: an unknown backend or option, a value that cannot be used, or both ways at once.
        """
        if (quant_backend is None) == (quant_mapping is None):
            raise ConfigError(
                f"quant_backend={quant_backend!r} and quant_mapping={quant_mapping!r}; give one of them and not the other"
            )
        if quant_mapping is not None and (quant_kwargs or components_to_quantize):
            raise ConfigError(
                "quant_kwargs and components_to_quantize belong to quant_backend; quant_mapping says both by itself"
            )
        self.configs: dict[str, QuantConfig] = {}
        self.default: QuantConfig | None = None
        if quant_mapping is not None:
            self.configs = {name: as_config(config) for name, config in quant_mapping.items()}
            return
        config = config_class(str(quant_backend)).from_options(quant_kwargs or {})
        names = [components_to_quantize] if isinstance(components_to_quantize, str) else components_to_quantize
        if names is None:
            self.default = config
        else:
            self.configs = dict.fromkeys(names, config)

    def check(self, known: Sequence[str], ready: Sequence[str]) -> None:
        """Refuse names that are no component, or components that are given ready and so are not loaded here.

        Raises:
            ConfigError: names the component.
        """
        if unknown := sorted(self.configs.keys() - set(known)):
            raise ConfigError(f"quantization_config names {unknown[0]!r}; the components are {', '.join(known)}")
        if given := sorted(self.configs.keys() & set(ready)):
            raise ConfigError(
                f"quantization_config names {given[0]!r}, which was passed ready; quantize it by vramkit.quant.quantize, or "
                "leave it out of one of the two"
            )

    def config_for(self, name: str) -> QuantConfig | None:
        """Return how a component is to be quantized, or None."""
        return self.configs.get(name, None if name in _LEFT_ALONE else self.default)

    def __repr__(self) -> str:
        if self.default is not None:
            return f"PipelineQuantizationConfig(every model but {', '.join(_LEFT_ALONE)}: {self.default})"
        return f"PipelineQuantizationConfig({self.configs})"


def as_pipeline_config(config: Any) -> PipelineQuantizationConfig:
    """Our pipeline config of ours, of diffusers', or of a config for every model.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(config, PipelineQuantizationConfig):
        return config
    names = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
    if all(hasattr(config, name) for name in names):
        given = {name: getattr(config, name) or None for name in names}
        return PipelineQuantizationConfig(**given)
    whole = PipelineQuantizationConfig(quant_mapping={})
    whole.default = as_config(config)
    return whole
