"""What a row is about: a network of a library, how its weights are kept, and what it is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from benchmarks.bench import Bench
from benchmarks.checkpoints import write_network
from benchmarks.networks import NETWORKS, Clip, Draw

__all__ = ["Subject"]

_BF16 = torch.bfloat16
# What no transformer of diffusers is cast in, as its users write it.
_SKIPPED = ("patch_embedding", "condition_embedder", "norm", "proj_out$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """``wan-14b diffusers bf16 832x480x81``. `weights`: bf16, fp8, fp8-mm (fp8 products), nf4, int8."""

    network: str
    clip: Clip
    library: str = "diffusers"
    weights: str = "bf16"
    layers: int | None = None
    """Other than published, for growth."""

    @classmethod
    def of(
        cls, network: str, scale: str, *, frames: int | None = None, library: str = "diffusers", weights: str = "bf16",
        layers: int | None = None,
    ) -> Subject:  # fmt: skip
        """The published clip of a network, or a tiny one; `frames` are other than those."""
        known = NETWORKS[network]
        clip = known.tiny_clip if scale == "smoke" else known.clip
        clip = clip if frames is None else dataclasses.replace(clip, frames=frames)
        library = "transformers" if known.config_class else library
        return cls(network=network, clip=clip, library=library, weights=weights, layers=layers)

    def __str__(self) -> str:
        is_text = self.clip.width == 0
        asked = f"{self.clip.frames} tokens" if is_text else str(self.clip)
        layers = "" if self.layers is None else f" {self.layers} layers"
        return f"{self.network} {self.library} {self.weights} {asked}{layers}"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Subject:
        """Read what `to_json` returned."""
        return cls(**found | {"clip": Clip(**found["clip"])})

    def to_json(self) -> dict[str, Any]:
        """Return this as plain data."""
        return dataclasses.asdict(self)

    def inputs(self, bench: Bench) -> dict[str, Any]:
        """Return random inputs of one forward, on the device."""
        known = NETWORKS[self.network]
        return known.inputs(Draw(bench.device), self.clip, known.config_at(bench.scale))

    def load(self, bench: Bench) -> nn.Module:
        """Load the network from its checkpoint as users of its library do; quantized where that is asked for.

        Raises:
            ValueError: the library does not know such weights.
        """
        folder = write_network(bench.folder, self.network, bench.scale, bench.device)
        loaders = {"diffusers": self._of_diffusers, "vramkit": self._of_ours, "transformers": self._of_transformers}
        model = loaders[self.library](folder).eval().requires_grad_(False)
        if self.layers is not None:
            _shortened(model, self.layers)
        return model

    def prepare(self, bench: Bench) -> None:
        """Write the checkpoint and import the library, which no figure contains."""
        write_network(bench.folder, self.network, bench.scale, bench.device)
        __import__("vramkit.pipelines" if self.library == "vramkit" else self.library)
        # Names of theirs are imported when they are asked for, which takes seconds.
        if self.library != "vramkit":
            getattr(__import__(self.library), NETWORKS[self.network].class_name)
        torch.zeros(1, device=bench.device)

    def _of_ours(self, folder: Any) -> nn.Module:
        from vramkit.pipelines.loading.auto_model import AutoModel
        from vramkit.quant import BitsAndBytes4bitConfig, BitsAndBytes8bitConfig, Fp8Config

        configs: dict[str, Any] = {
            "bf16": None,
            "fp8": Fp8Config(),
            "fp8-mm": Fp8Config(compute="scaled_mm"),
            "nf4": BitsAndBytes4bitConfig(quant_type="nf4"),
            "int8": BitsAndBytes8bitConfig(),
        }
        kind = AutoModel.class_named(NETWORKS[self.network].class_name)
        model: nn.Module = kind.from_pretrained(
            folder, torch_dtype=_BF16, quantization_config=configs[self._known(configs)]
        )
        return model

    def _of_diffusers(self, folder: Any) -> nn.Module:
        import diffusers

        kind = getattr(diffusers, NETWORKS[self.network].class_name)
        options: dict[str, Any] = {}
        if self._known(("bf16", "fp8", "nf4")) == "nf4":
            options["quantization_config"] = diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_BF16
            )
        model: nn.Module = kind.from_pretrained(folder, torch_dtype=_BF16, **options)
        if self.weights == "fp8":
            from diffusers.hooks import apply_layerwise_casting

            apply_layerwise_casting(model, torch.float8_e4m3fn, _BF16, skip_modules_pattern=_SKIPPED)
        return model

    def _of_transformers(self, folder: Any) -> nn.Module:
        import transformers

        self._known(("bf16",))
        kind = getattr(transformers, NETWORKS[self.network].class_name)
        model: nn.Module = kind.from_pretrained(folder, dtype=_BF16)
        return model

    def _known(self, names: Any) -> str:
        if self.weights not in names:
            raise ValueError(
                f"{self.library} has no weights of the kind {self.weights!r}; there are {', '.join(names)}"
            )
        return self.weights


def _shortened(model: nn.Module, layers: int) -> None:
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            del child[layers:]
