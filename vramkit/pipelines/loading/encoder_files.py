"""Encoders of text and images in one file, as ComfyUI, the code of Wan and llama.cpp write them: names, and configs.

Names become those of transformers, rule by rule. Configs are told from shapes; what those do not tell is as published: heads
of 128 channels in Llama, of 64 in CLIP, for example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vramkit.errors import CheckpointError
from vramkit.pipelines.loading.rules import Rules, rewritten
from vramkit.pipelines.loading.told_configs import Shapes, blocks_in

__all__ = ["Encoder", "encoder_in"]

_WAN: Rules = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1."),
    (r"(\.\d+)\.pos_embedding\.embedding\.", r"\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"(\.\d+)\.attn\.", r"\1.layer.0.SelfAttention."),
    (r"(\.\d+)\.norm1\.", r"\1.layer.0.layer_norm."),
    (r"(\.\d+)\.norm2\.", r"\1.layer.1.layer_norm."),
    (r"(\.\d+)\.ffn\.gate\.0\.", r"\1.layer.1.DenseReluDense.wi_0."),
    (r"(\.\d+)\.ffn\.fc1\.", r"\1.layer.1.DenseReluDense.wi_1."),
    (r"(\.\d+)\.ffn\.fc2\.", r"\1.layer.1.DenseReluDense.wo."),
)
_LLAMA_CPP_T5: Rules = (
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.", r"encoder.block.\1."),
    (r"(\.\d+)\.attn_([qkvo])\.", r"\1.layer.0.SelfAttention.\2."),
    (r"(\.\d+)\.attn_rel_b\.", r"\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"(\.\d+)\.attn_norm\.", r"\1.layer.0.layer_norm."),
    (r"(\.\d+)\.ffn_norm\.", r"\1.layer.1.layer_norm."),
    (r"(\.\d+)\.ffn_gate\.", r"\1.layer.1.DenseReluDense.wi_0."),
    (r"(\.\d+)\.ffn_up\.", r"\1.layer.1.DenseReluDense.wi_1."),
    (r"(\.\d+)\.ffn_down\.", r"\1.layer.1.DenseReluDense.wo."),
)
_SPELLINGS = {"blocks.0.pos_embedding.embedding.weight": _WAN, "enc.blk.0.attn_q.weight": _LLAMA_CPP_T5}
_ATTENTION = "encoder.block.{}.layer.0.SelfAttention."
_FEED_FORWARD = "encoder.block.0.layer.1.DenseReluDense."


@dataclass(frozen=True, slots=True)
class Encoder:
    """What a file holds: a class of transformers, its config as the shapes tell it, and its names."""

    class_name: str
    config: Mapping[str, Any]
    names: Mapping[str, str]
    """Name in the file -> name in the model, its prefix there left out."""


def encoder_in(shapes: Shapes, *, source: object, wanted: str | None = None) -> Encoder:
    """Tell which encoder a file holds.

    Args:
        shapes: of its tensors, by their names in it.
        source: the file, for messages.
        wanted: the class that is asked for; a file may hold several, as those of whole CLIP models do.

    Raises:
        CheckpointError: none that is known, or not that one.
    """
    names = _spelled(shapes)
    found = {each: prefix for each, probe in _PROBES.items() if (prefix := _before(names.values(), probe)) is not None}
    if "UMT5EncoderModel" in found:  # each of its blocks has positions, of T5's only the first
        found.pop("T5EncoderModel", None)
    if wanted == "CLIPVisionModelWithProjection" and "CLIPVisionModel" in found:
        found[wanted] = found["CLIPVisionModel"]
    class_name = next(iter(found), None) if wanted is None else wanted
    if class_name not in found:
        held = f"it holds {', '.join(found)}" if found else f"its names are {', '.join(list(shapes)[:3])} ..."
        raise CheckpointError(f"{source}: no weights of {wanted or 'an encoder that is known'}; {held}")
    prefix = found[class_name]
    inner = {name: new.removeprefix(prefix) for name, new in names.items() if new.startswith(prefix)}
    try:
        config = _CONFIGS[class_name]({inner.get(name, name): tuple(shape) for name, shape in shapes.items()})
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: its shapes do not tell the config of this {class_name} ({error})") from error
    return Encoder(class_name, config, inner)


def _spelled(names: Collection[str]) -> dict[str, str]:
    """Names in the file -> as transformers spells them."""
    for probe, rules in _SPELLINGS.items():
        prefix = _before(names, probe)
        if prefix is not None:
            return {name: rewritten(name.removeprefix(prefix), rules) for name in names}
    return {name: name for name in names}


def _before(names: Collection[str], probe: str) -> str | None:
    """What stands before `probe` in the name that ends with it, the shortest; None where there is no such name."""
    found = [name.removesuffix(probe) for name in names if name.endswith(probe)]
    return min((prefix for prefix in found if not prefix or prefix.endswith(".")), key=len, default=None)


def _t5(shapes: Shapes) -> dict[str, Any]:
    table = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    buckets, heads = shapes[_ATTENTION.format(0) + "relative_attention_bias.weight"]
    is_gated = f"{_FEED_FORWARD}wi_0.weight" in shapes
    return {
        "vocab_size": table[0],
        "d_model": table[1],
        "num_layers": blocks_in(shapes, "encoder.block"),
        "num_heads": heads,
        "d_kv": shapes[_ATTENTION.format(0) + "q.weight"][0] // heads,
        "d_ff": shapes[f"{_FEED_FORWARD}{'wi_0' if is_gated else 'wi'}.weight"][0],
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


def _llama(shapes: Shapes) -> dict[str, Any]:
    vocabulary, channels = shapes["embed_tokens.weight"]
    if "layers.0.self_attn.q_proj.bias" in shapes:
        raise ValueError("its attention has biases, as Qwen's, which no pipeline here has")
    is_third = vocabulary > 100_000
    return {
        "vocab_size": vocabulary,
        "hidden_size": channels,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": blocks_in(shapes, "layers"),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // 128,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // 128,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0 if is_third else 10_000.0,
        "max_position_embeddings": 8192 if is_third else 4096,
    }


def _clip(shapes: Shapes, channels: int) -> dict[str, Any]:
    """What the halves of CLIP have in common; of the first ones the activation is the quick one."""
    return {
        "hidden_size": channels,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": blocks_in(shapes, "encoder.layers"),
    }


def _clip_text(shapes: Shapes) -> dict[str, Any]:
    vocabulary, channels = shapes["embeddings.token_embedding.weight"]
    return _clip(shapes, channels) | {
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "num_attention_heads": channels // 64,
        "hidden_act": "quick_gelu" if channels <= 768 else "gelu",
        "projection_dim": shapes.get("text_projection.weight", (channels,))[0],
        "eos_token_id": 2,  # published so: the last token is the one with the highest number
    }


def _clip_vision(shapes: Shapes) -> dict[str, Any]:
    (channels,) = shapes["embeddings.class_embedding"]
    patch = shapes["embeddings.patch_embedding.weight"][2]
    patches = shapes["embeddings.position_embedding.weight"][0] - 1
    return _clip(shapes, channels) | {
        "patch_size": patch,
        "image_size": math.isqrt(patches) * patch,
        "num_attention_heads": channels // (80 if channels == 1280 else 64),
        "hidden_act": "quick_gelu" if channels <= 1024 else "gelu",
        "projection_dim": shapes.get("visual_projection.weight", (channels,))[0],
    }


_PROBES: dict[str, str] = {  # class -> the end of a name that its files have
    "UMT5EncoderModel": _ATTENTION.format(1) + "relative_attention_bias.weight",
    "T5EncoderModel": _ATTENTION.format(0) + "q.weight",
    "LlamaModel": "layers.0.input_layernorm.weight",
    "CLIPTextModel": "embeddings.token_embedding.weight",
    "CLIPVisionModel": "embeddings.class_embedding",
}
_CONFIGS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "UMT5EncoderModel": _t5,
    "T5EncoderModel": _t5,
    "LlamaModel": _llama,
    "CLIPTextModel": _clip_text,
    "CLIPVisionModel": _clip_vision,
    "CLIPVisionModelWithProjection": _clip_vision,
}
