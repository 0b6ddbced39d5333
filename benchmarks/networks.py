"""The networks that are measured: published shapes, tiny ones of the same kind, and inputs of one forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["NETWORKS", "Clip", "Network"]

DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """Pixels and frames of a video."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    def latents(self, spatial: int = 8, temporal: int = 4) -> tuple[int, int, int]:
        """Return frames, height and width of the latents."""
        return (self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial


class Draw:
    """Random inputs on one device, always the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(1)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device, dtype=DTYPE, generator=self._generator)

    def tokens(self, count: int, vocabulary: int) -> Tensor:
        """Ids of shape (1, count)."""
        return torch.randint(1, vocabulary, (1, count), device=self.device, generator=self._generator)

    def ones(self, *shape: int) -> Tensor:
        """A mask without holes."""
        return torch.ones(shape, device=self.device)

    def timestep(self) -> Tensor:
        """The middle of the schedule."""
        return torch.tensor([500], device=self.device)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A model with random weights: its class, which has the same name in every library that has it, and its config."""

    class_name: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    """What of the config a test has smaller."""
    inputs: Callable[[Draw, Clip, dict[str, Any]], dict[str, Any]]
    clip: Clip
    """The published one; for text encoders the frames are tokens."""
    bytes: int
    """Of its file."""
    tiny_clip: Clip = Clip(32, 48, 5)
    config_class: str = ""
    """Of models of transformers."""

    def config_at(self, scale: str) -> dict[str, Any]:
        """Return the config, published or tiny."""
        return self.config | (self.tiny if scale == "smoke" else {})


def _wan(draw: Draw, clip: Clip, config: dict[str, Any]) -> dict[str, Any]:
    channels = config.get("in_channels", 16)
    frames, height, width = clip.latents(spatial=16 if channels == 48 else 8)
    return {
        "hidden_states": draw.normal(1, channels, frames, height, width),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, 512, config.get("text_dim", 4096)),
        "return_dict": False,
    }


def _hunyuan(draw: Draw, clip: Clip, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(1, config.get("in_channels", 16), *clip.latents()),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, 256, config.get("text_embed_dim", 4096)),
        "encoder_attention_mask": draw.ones(1, 256),
        "pooled_projections": draw.normal(1, config.get("pooled_projection_dim", 768)),
        "guidance": torch.tensor([6000.0], device=draw.device),
        "return_dict": False,
    }


def _ltx(draw: Draw, clip: Clip, config: dict[str, Any]) -> dict[str, Any]:
    frames, height, width = clip.latents(spatial=32, temporal=8)
    return {
        "hidden_states": draw.normal(1, frames * height * width, config.get("in_channels", 128)),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, 128, config.get("caption_channels", 4096)),
        "encoder_attention_mask": draw.ones(1, 128),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def _cogvideox(draw: Draw, clip: Clip, config: dict[str, Any]) -> dict[str, Any]:
    frames, height, width = clip.latents()
    return {
        "hidden_states": draw.normal(1, frames, config.get("in_channels", 16), height, width),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, 226, config.get("text_embed_dim", 4096)),
        "return_dict": False,
    }


def _text(draw: Draw, clip: Clip, config: dict[str, Any]) -> dict[str, Any]:
    ids = draw.tokens(clip.frames, config["vocab_size"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": False}


_T5: dict[str, Any] = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_TINY_T5 = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 6, "num_heads": 4}
_TINY_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 4,
    "rope_max_seq_len": 64,
}  # fmt: skip
_TINY_COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 16,
    "sample_width": 6, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 226,
}  # fmt: skip

NETWORKS: dict[str, Network] = {
    "wan-14b": Network(
        class_name="WanTransformer3DModel",
        config={"num_layers": 40},  # the other defaults are those of the 14B too
        tiny=_TINY_WAN,
        inputs=_wan,
        clip=Clip(480, 832, 81),
        bytes=29 * 10**9,
    ),
    "wan-5b": Network(
        class_name="WanTransformer3DModel",
        config={
            "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48,
        },
        tiny=_TINY_WAN,
        inputs=_wan,
        clip=Clip(704, 1280, 121),
        bytes=11 * 10**9,
        tiny_clip=Clip(64, 96, 5),
    ),
    "hunyuan": Network(
        class_name="HunyuanVideoTransformer3DModel",
        config={},
        tiny={
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
            "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 8, "rope_axes_dim": [4, 6, 6],
        },
        inputs=_hunyuan,
        clip=Clip(720, 1280, 129),
        bytes=26 * 10**9,
    ),
    "ltx": Network(
        class_name="LTXVideoTransformer3DModel",
        config={},
        tiny={
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12,
            "cross_attention_dim": 24, "num_layers": 2, "caption_channels": 32,
        },
        inputs=_ltx,
        clip=Clip(512, 768, 161),
        bytes=4 * 10**9,
        tiny_clip=Clip(64, 96, 9),
    ),
    "cogvideox-2b": Network(
        class_name="CogVideoXTransformer3DModel",
        config={},
        tiny=_TINY_COG,
        inputs=_cogvideox,
        clip=Clip(480, 720, 49),
        bytes=35 * 10**8,
    ),
    "cogvideox-5b": Network(
        class_name="CogVideoXTransformer3DModel",
        config={"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        tiny=_TINY_COG,
        inputs=_cogvideox,
        clip=Clip(480, 720, 49),
        bytes=12 * 10**9,
    ),
    "umt5-xxl": Network(
        class_name="UMT5EncoderModel",
        config_class="UMT5Config",
        config=_T5 | {"vocab_size": 256384},
        tiny=_TINY_T5,
        inputs=_text,
        clip=Clip(0, 0, 512),
        bytes=115 * 10**8,
        tiny_clip=Clip(0, 0, 16),
    ),
    "t5-xxl": Network(
        class_name="T5EncoderModel",
        config_class="T5Config",
        config=_T5 | {"vocab_size": 32128},
        tiny=_TINY_T5,
        inputs=_text,
        clip=Clip(0, 0, 226),
        bytes=97 * 10**8,
        tiny_clip=Clip(0, 0, 16),
    ),
}  # fmt: skip
