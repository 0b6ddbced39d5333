"""Configs that single files do not carry, told from the shapes of their weights.

What shapes do not tell is as published: heads of 128 channels, for example. A file of a model that is unlike those needs its
config from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["Shapes", "blocks_in", "tells", "told_config", "untold"]

Shapes = Mapping[str, tuple[int, ...]]


def told_config(model_class: str, shapes: Shapes) -> dict[str, Any] | None:
    """Return the config of a model by the shapes of its weights, under our names; None where they do not tell it.

    Weights whose rows are joined in the file are missing from `shapes`.
    """
    tell = _CONFIGS.get(model_class)
    try:
        return None if tell is None else tell(shapes)
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        return None


def untold(model_class: str) -> str:
    """Say what no shape tells of a model, as a part of a message, by values that were published; empty for others."""
    return _UNTOLD.get(model_class, "")


def tells(model_class: str) -> bool:
    """Whether configs of a model can be told from shapes at all."""
    return model_class in _CONFIGS


def blocks_in(shapes: Shapes, blocks: str) -> int:
    """How many blocks of a list there are."""
    return 1 + max(int(name[len(blocks) + 1 :].partition(".")[0]) for name in shapes if name.startswith(f"{blocks}."))


def _heads(channels: int, head: int) -> dict[str, int]:
    if channels % head:
        raise ValueError("no whole number of heads")
    return {"num_attention_heads": channels // head, "attention_head_dim": head}


def _wan(shapes: Shapes) -> dict[str, Any]:
    channels, in_channels, *patch = shapes["patch_embedding.weight"]
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    config = {
        **_heads(channels, 128),
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": blocks_in(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
    }
    if image is not None:
        config |= {"image_dim": image[0], "added_kv_proj_dim": channels}
    if positions is not None:
        config["pos_embed_seq_len"] = positions[1]
    return config


def _wan_vae(shapes: Shapes) -> dict[str, Any]:
    config = {"z_dim": shapes["post_quant_conv.weight"][0], "base_dim": shapes["encoder.conv_in.weight"][0]}
    if not any(".downsampler." in name for name in shapes):
        return config
    if config["z_dim"] != len(_WAN_5B["latents_mean"]):
        raise ValueError("other latents than those of Wan2.2 5B, whose means and spreads are in no weight")
    up = "decoder.up_blocks.0.resnets.0.conv1.weight"
    return config | _WAN_5B | {"decoder_base_dim": shapes[up][0] // 4}  # of the innermost of levels 1, 2, 4, 4


# As published with Wan-AI/Wan2.2-TI2V-5B-Diffusers.
# fmt: off
_WAN_5B: dict[str, Any] = {
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}
# fmt: on


def _hunyuan(shapes: Shapes) -> dict[str, Any]:
    channels, in_channels, patch_t, patch, _ = shapes["x_embedder.proj.weight"]
    return {
        **_heads(channels, 128),
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch_t * patch * patch),
        "num_layers": blocks_in(shapes, "transformer_blocks"),
        "num_single_layers": blocks_in(shapes, "single_transformer_blocks"),
        "num_refiner_layers": blocks_in(shapes, "context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / channels,
        "patch_size": patch,
        "patch_size_t": patch_t,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
    }


def _hunyuan_vae(shapes: Shapes) -> dict[str, Any]:
    return {"latent_channels": shapes["post_quant_conv.weight"][1]}


def _ltx(shapes: Shapes) -> dict[str, Any]:
    channels, in_channels = shapes["proj_in.weight"]
    return {
        **_heads(channels, channels // 32),  # 32 heads in all published ones
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "num_layers": blocks_in(shapes, "transformer_blocks"),
    }


# As published with Lightricks/LTX-Video 0.9.1, and where 0.9.5 and later differ from it.
_LTX_TIMED = {
    "decoder_block_out_channels": [256, 512, 1024],
    "decoder_spatio_temporal_scaling": [True] * 3,
    "decoder_layers_per_block": [5, 6, 7, 8],
    "decoder_inject_noise": [True, True, True, False],
    "upsample_residual": [True] * 3,
    "upsample_factor": [2] * 3,
    "timestep_conditioning": True,
}
_LTX_FOLDED = {
    "block_out_channels": [128, 256, 512, 1024, 2048],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": [True] * 4,
    "decoder_inject_noise": [False] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def _ltx_vae(shapes: Shapes) -> dict[str, Any]:
    is_timed = "decoder.time_embedder.timestep_embedder.linear_1.weight" in shapes
    is_folded = "encoder.down_blocks.3.downsamplers.0.conv.conv.weight" in shapes
    return {
        "latent_channels": shapes["latents_mean"][0],
        **(_LTX_TIMED if is_timed else {}),
        **(_LTX_FOLDED if is_folded else {}),
    }


def _cogvideox(shapes: Shapes) -> dict[str, Any] | None:
    patch = shapes["patch_embed.proj.weight"]
    if len(patch) != 4:  # of 1.5, which has sizes that the shapes do not tell
        return None
    channels, in_channels, size, _ = patch
    heads = _heads(channels, 64)
    return {
        **heads,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // (size * size),
        "patch_size": size,
        "time_embed_dim": shapes["time_embedding.linear_1.weight"][0],
        "text_embed_dim": shapes["patch_embed.text_proj.weight"][1],
        "num_layers": blocks_in(shapes, "transformer_blocks"),
        "use_rotary_positional_embeddings": heads["num_attention_heads"] > 30,  # 2B has 30, and sums of sines
        "use_learned_positional_embeddings": "patch_embed.pos_embedding" in shapes,
    }


_CONFIGS: Mapping[str, Callable[[Shapes], dict[str, Any] | None]] = MappingProxyType(
    {
        "WanTransformer3DModel": _wan,
        "AutoencoderKLWan": _wan_vae,
        "HunyuanVideoTransformer3DModel": _hunyuan,
        "AutoencoderKLHunyuanVideo": _hunyuan_vae,
        "LTXVideoTransformer3DModel": _ltx,
        "AutoencoderKLLTXVideo": _ltx_vae,
        "CogVideoXTransformer3DModel": _cogvideox,
    }
)
_UNTOLD: Mapping[str, str] = MappingProxyType(
    {
        "AutoencoderKLCogVideoX": (
            '. Its files are alike but for what latents are multiplied by: config={"scaling_factor": 1.15258426} is that of '
            'CogVideoX-2b, {"scaling_factor": 0.7} that of 5b, and {"scaling_factor": 0.7, "invert_scale_latents": True} '
            "that of 1.5"
        )
    }
)
