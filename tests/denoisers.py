"""The transformers that the tests run on: tiny ones of random weights beside diffusers', and the published configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import seeded

import vramkit


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    kind: str  # the class, of the same name in both libraries
    tiny: dict[str, Any]
    published: dict[str, tuple[dict[str, Any], int]]  # transformer/config.json and its number of parameters, by size
    inputs: Callable[..., dict[str, Any]]
    units: list[str]  # the classes of what is streamed as one, in the order of their calls
    two: dict[str, Any]  # what makes inputs for two clips


def wan_inputs(
    batch: int = 1,
    frames: int = 3,
    height: int = 8,
    width: int = 12,
    text: int = 9,
    channels: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    g = seeded(1)
    return {
        "hidden_states": torch.randn(batch, channels, frames, height, width, generator=g).to(dtype),
        "timestep": torch.tensor([999.0, 314.5, 3.0][:batch]),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=g).to(dtype),
    }


def hunyuan_inputs(
    lengths: tuple[int, ...] = (9,),
    frames: int = 3,
    height: int = 8,
    width: int = 12,
    text: int = 9,
    channels: int = 4,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    g, batch = seeded(1), len(lengths)
    given = {
        "hidden_states": torch.randn(batch, channels, frames, height, width, generator=g).to(dtype),
        "timestep": torch.tensor([999.0, 314.5, 3.0][:batch]),
        "encoder_hidden_states": torch.randn(batch, text, 20, generator=g).to(dtype),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(lengths)[:, None]).to(dtype),
        "pooled_projections": torch.randn(batch, 8, generator=g).to(dtype),
    }
    return given | ({"guidance": torch.tensor([6000.0, 1500.0, 1000.0][:batch])} if guidance else {})


LTX_SCALE = (8 / 25, 32, 32)


def ltx_masks(lengths: tuple[int, ...], tokens: int) -> torch.Tensor:
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def ltx_inputs(
    batch: int = 1,
    frames: int = 3,
    height: int = 4,
    width: int = 6,
    text: int = 9,
    lengths: tuple[int, ...] = (5, 9),
    channels: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    g = seeded(1)
    return {
        "hidden_states": torch.randn(batch, frames * height * width, channels, generator=g).to(dtype),
        "timestep": torch.tensor([999.0, 314.5][:batch]),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=g).to(dtype),
        "encoder_attention_mask": ltx_masks(lengths[:batch], text),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": LTX_SCALE,
    }


def cogvideox_inputs(
    batch: int = 1,
    frames: int = 3,
    height: int = 8,
    width: int = 12,
    ofs: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    g = seeded(1)
    given = {
        "hidden_states": torch.randn(batch, frames, 4, height, width, generator=g).to(dtype),
        "timestep": torch.tensor([999, 314, 3][:batch]),
        "encoder_hidden_states": torch.randn(batch, 7, 20, generator=g).to(dtype),
    }
    return given if ofs is None else given | {"ofs": torch.tensor([ofs])}


# Of Wan-AI/Wan2.1-T2V-{1.3B,14B}-Diffusers.
_WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_WAN_14B = _WAN | {"ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40}
_WAN_IMAGE = {"added_kv_proj_dim": 5120, "image_dim": 1280, "in_channels": 36}
# Of hunyuanvideo-community/HunyuanVideo.
_HUNYUAN: dict[str, Any] = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
# Of Lightricks/LTX-Video.
_LTX: dict[str, Any] = {
    "_class_name": "LTXVideoTransformer3DModel",
    "_diffusers_version": "0.32.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "attention_out_bias": True,
    "caption_channels": 4096,
    "cross_attention_dim": 2048,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 28,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm_across_heads",
}
# Of zai-org/CogVideoX-2b; the others differ in what follows.
_COGVIDEOX: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "_diffusers_version": "0.30.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 30,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
ROTARY = {"use_rotary_positional_embeddings": True}
_FIVE_B = _COGVIDEOX | ROTARY | {"num_attention_heads": 48, "num_layers": 42}
_ONE_FIVE = _FIVE_B | {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}

DENOISERS = {
    "Wan2.1": Denoiser(
        kind="WanTransformer3DModel",
        tiny={
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 64,
            "num_layers": 2,
        },
        published={
            "1.3B": (_WAN | {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}, 1_418_996_800),
            "14B": (_WAN_14B, 14_288_491_584),
            "I2V 14B": (_WAN_14B | _WAN_IMAGE, 16_394_878_784),
            "FLF2V 14B": (_WAN_14B | _WAN_IMAGE | {"pos_embed_seq_len": 514}, 16_395_536_704),
            "2.2 I2V A14B": (_WAN_14B | {"in_channels": 36}, 14_288_901_184),
            "2.2 TI2V 5B": (
                _WAN
                | {
                    "ffn_dim": 14336,
                    "in_channels": 48,
                    "num_attention_heads": 24,
                    "num_layers": 30,
                    "out_channels": 48,
                },
                4_999_787_712,
            ),
        },
        inputs=wan_inputs,
        units=["TextProjection"] + ["WanSelfAttention", "WanCrossAttention", "FeedForward"] * 2,
        two={"batch": 2},
    ),
    "HunyuanVideo": Denoiser(
        kind="HunyuanVideoTransformer3DModel",
        tiny={
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 20,
            "pooled_projection_dim": 8,
            "mlp_ratio": 2.0,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
        },
        published={"13B": (_HUNYUAN, 12_821_012_544)},
        inputs=hunyuan_inputs,
        units=["TimeTextEmbedder", "_RefinerBlock", "_RefinerBlock", "ConditionEmbedder"]
        + ["Modulation", "Modulation", "DoubleAttention", "FeedForward", "FeedForward"] * 2
        + ["HunyuanVideoSingleTransformerBlock"] * 2
        + ["Modulation"],
        two={"lengths": (9, 5)},
    ),
    "LTX-Video": Denoiser(
        kind="LTXVideoTransformer3DModel",
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "in_channels": 8,
            "out_channels": 8,
            "caption_channels": 24,
            "num_layers": 2,
        },
        published={
            "2B": (_LTX, 1_923_385_472),
            "13B": (
                _LTX | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
                13_042_569_344,
            ),
        },
        inputs=ltx_inputs,
        units=["TextProjection"] + ["LTXSelfAttention", "LTXCrossAttention", "FeedForward"] * 2,
        two={"batch": 2},
    ),
    "CogVideoX": Denoiser(
        kind="CogVideoXTransformer3DModel",
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 24,
            "text_embed_dim": 20,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 7,
        },
        published={
            "2b": (_COGVIDEOX, 1_693_783_872),
            "5b": (_FIVE_B, 5_570_283_072),
            "5b-I2V": (_FIVE_B | {"in_channels": 32, "use_learned_positional_embeddings": True}, 5_625_087_552),
            "1.5-5b": (_ONE_FIVE, 5_570_676_352),
            "1.5-5b-I2V": (_ONE_FIVE | {"in_channels": 32, "ofs_embed_dim": 512}, 5_571_594_880),
        },
        inputs=cogvideox_inputs,
        units=["CogVideoXPatchEmbed"]
        + ["AdaptiveNorm", "CogVideoXAttention", "AdaptiveNorm", "FeedForward"] * 2
        + ["AdaptiveNorm"],
        two={"batch": 2},
    ),
}


def other_text(name: str, *, seed: int = 7) -> dict[str, Any]:
    """Another text, of another length, for two clips: the arguments of a call that tell it."""
    g, width = seeded(seed), DENOISERS[name].inputs()["encoder_hidden_states"].shape[-1]
    every = {
        "encoder_hidden_states": torch.randn(2, 6, width, generator=g),
        "encoder_attention_mask": (torch.arange(6) < torch.tensor([[3], [6]])).long(),
        "pooled_projections": torch.randn(2, 8, generator=g),
    }
    return {key: value for key, value in every.items() if key in DENOISERS[name].inputs()}


def classes(name: str) -> tuple[Any, Any]:
    kind = DENOISERS[name].kind
    import diffusers  # some who import this need none of it

    return getattr(vramkit, kind), getattr(diffusers, kind)


def build_pair(name: str, **options: Any) -> tuple[Any, Any]:
    """Ours and diffusers', tiny, with the same random weights."""
    our_class, their_class = classes(name)
    options = DENOISERS[name].tiny | options
    torch.manual_seed(0)
    oracle = their_class(**options).eval().requires_grad_(False)
    for parameter in oracle.parameters():  # norms at 1 and 0 would hide mistakes
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = our_class.from_config(options).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle
