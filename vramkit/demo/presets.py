"""What the demo makes: the sizes of its checkpoint and of its clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A checkpoint's shape, in the keys of its config.json files, and the clip that is generated from it."""

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    cpu_budget_bytes: int
    cuda_budget_bytes: int
    sweep: tuple[float, ...]  # further budgets, as parts of the first
    max_sequence_length: int = 64
    prompt: str = "A red bird flies low above the sea in the soft light of the morning, wide shot, slow motion"
    negative_prompt: str = "blurry, distorted, worst quality"
    guidance_scale: float = 5.0
    flow_shift: float = 3.0
    seed: int = 0

    def clip(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        keys = (
            "prompt",
            "negative_prompt",
            "height",
            "width",
            "num_frames",
            "num_inference_steps",
            "guidance_scale",
            "max_sequence_length",
        )
        return {key: getattr(self, key) for key in keys}

    def shape(self) -> dict[str, Any]:
        """Return what decides the checkpoint's bytes, for its manifest."""
        keys = ("name", "transformer", "vae", "text_encoder", "flow_shift")
        return {key: asdict(self)[key] for key in keys}


SMALL = Preset(
    name="small",
    transformer={
        "num_attention_heads": 12,
        "attention_head_dim": 64,
        "ffn_dim": 3072,
        "num_layers": 10,
        "text_dim": 512,
    },
    vae={"base_dim": 32},
    text_encoder={"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 8, "num_layers": 6, "vocab_size": 4096},
    # Upright: below 160 rows torch's CPU convolution of so few channels unfolds its input, which takes 27 times its memory.
    height=176,
    width=96,
    num_frames=13,
    num_inference_steps=4,
    cpu_budget_bytes=256 * MIB,
    cuda_budget_bytes=256 * MIB,
    sweep=(1.25, 1.75),
)

# A few MB, for tests of the whole path.
TINY = Preset(
    name="tiny",
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "ffn_dim": 96,
        "num_layers": 3,
        "text_dim": 32,
        "freq_dim": 32,
    },
    vae={"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    text_encoder={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 512},
    height=32,
    width=48,
    num_frames=5,
    num_inference_steps=2,
    cpu_budget_bytes=512 * MIB,
    cuda_budget_bytes=512 * MIB,
    sweep=(0.5,),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (SMALL, TINY)})
