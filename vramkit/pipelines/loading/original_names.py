"""The names that single files give to the weights of our models: of the original code, of ComfyUI, or of diffusers.

`LAYOUTS` is the one table that a new family is added to. Its rules turn a name, its prefix taken off, into ours, one after
the other; names of diffusers come out as they are. In a result, ``(a|b)`` stands for the rows of a, then of b, joined in the
file, and ``<1,0/2>`` for these of two equal parts. Which name is which is known from the published conversions of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vramkit.errors import CheckpointError
from vramkit.offload.mapped import Renamed, Rows
from vramkit.pipelines.loading.rules import rewritten

__all__ = ["LAYOUTS", "Layout", "models_in", "renaming"]

Rule = tuple[str, "str | Callable[[re.Match[str]], str]"]

# Of the models in a file that holds several. What stands beside the one that is wanted is left out.
_COMPONENTS = (
    *("model.diffusion_model.", "diffusion_model.", "transformer.", "model_ema.", "vae.", "first_stage_model."),
    *("text_encoders.", "text_encoder.", "text_encoder_2.", "cond_stage_model.", "conditioner.", "clip_vision."),
)
_ALTERNATIVES = re.compile(r"\(([^)]*)\)")
_PARTS = re.compile(r"<([\d,]+)/(\d+)>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How files of a model name its weights."""

    probes: tuple[str, ...]
    """Names of which each file has one, behind a prefix, and no file of another model."""
    rules: Callable[[Collection[str]], tuple[Rule, ...]]
    """Patterns and what stands for them, by the names in the file."""
    dropped: str = "^$"
    """Pattern of names that have no place in the model."""


def models_in(names: Collection[str]) -> dict[str, str]:
    """Return the classes of the models that a file holds, by the names in it, and the prefix of each."""
    found = {}
    for model_class, layout in LAYOUTS.items():
        prefixes = {name.removesuffix(probe) for probe in layout.probes for name in names if name.endswith(probe)}
        prefixes = {
            prefix
            for prefix in prefixes
            if prefix in ("", "module.", "net.") or prefix.endswith(("model.", *_COMPONENTS))
        }
        if prefixes:
            found[model_class] = min(prefixes, key=len)
    return found


def renaming(model_class: str, names: Collection[str], *, source: object) -> Callable[[str], Renamed]:
    """Return what turns names of a file into those of a model's weights, as a key map of `load_mapped`.

    Args:
        model_class: published class name.
        names: all names in the file.
        source: the file, for messages.

    Raises:
        CheckpointError: the file holds no such model.
    """
    found = models_in(names)
    if model_class not in found:
        known = f"it holds {', '.join(found)}" if found else f"its names are {', '.join(list(names)[:3])} ..."
        raise CheckpointError(f"{source}: no weights of a {model_class} under names that are known; {known}")
    prefix, layout = found[model_class], LAYOUTS[model_class]
    # Without a prefix, "transformer." is one of the names of CogVideoX and not another model.
    others = tuple(each for each in _COMPONENTS if each != "transformer.")
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    rules = [(re.compile(pattern), new) for pattern, new in layout.rules(inner)]
    dropped = re.compile(layout.dropped)

    def rename(name: str) -> Renamed:
        if not name.startswith(prefix) or (not prefix and name.startswith(others)) or dropped.search(name):
            return None
        return _read(rewritten(name.removeprefix(prefix), rules))

    return rename


def _read(name: str) -> Renamed:
    choice = _ALTERNATIVES.search(name)
    if choice is None:
        return _rows(name) or name
    names = [f"{name[: choice.start()]}{each}{name[choice.end() :]}" for each in choice[1].split("|")]
    rows = [part for part in map(_rows, names) if part is not None]
    return tuple(rows) if rows else tuple(names)


def _rows(name: str) -> Rows | None:
    parts = _PARTS.search(name)
    if parts is None:
        return None
    return Rows(_PARTS.sub("", name), tuple(map(int, parts[1].split(","))), int(parts[2]))


def _always(*rules: Rule) -> Callable[[Collection[str]], tuple[Rule, ...]]:
    return lambda _names: rules


_WAN = _always(
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(time|text)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(time|text)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attn[12])\.o\.", r"\1.to_out.0."),
    (r"\.attn2\.([kv])_img\.", r".attn2.add_\1_proj."),
    (r"\.attn2\.norm_k_img\.", ".attn2.norm_added_k."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
)


def _wan_vae(names: Collection[str]) -> tuple[Rule, ...]:
    # Blocks of the decoder stand in one row in Wan2.1: the first that is no residual block ends the first stage.
    ends = [int(found[1]) for name in names if (found := re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name))]
    stage = min(ends, default=3) + 1

    def up(match: re.Match[str]) -> str:
        at, inner = divmod(int(match[1]), stage)
        return f"decoder.up_blocks.{at}.{'upsamplers.0' if inner == stage - 1 else f'resnets.{inner}'}."

    return (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
        (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
        (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
        (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
        # Wan2.2: stages of their own.
        (
            r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.",
            r"encoder.down_blocks.\1.downsampler.\2.",
        ),
        (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.", r"decoder.up_blocks.\1.upsampler.\2."),
        (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
        (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.upsamples\.(\d+)\.", up),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )


# The original code, and what ComfyUI saves (``in_layer``, ``lin``, ``query_norm.scale``).
_HUNYUAN = _always(
    (r"^(time|guidance)_in\.(mlp\.0|in_layer)\.", r"time_text_embed.\1_embedder.linear_1."),
    (r"^(time|guidance)_in\.(mlp\.2|out_layer)\.", r"time_text_embed.\1_embedder.linear_2."),
    (r"^vector_in\.in_layer\.", "time_text_embed.text_embedder.linear_1."),
    (r"^vector_in\.out_layer\.", "time_text_embed.text_embedder.linear_2."),
    (r"^img_in\.", "x_embedder."),
    (r"^txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (r"^txt_in\.t_embedder\.(mlp\.0|in_layer)\.", "context_embedder.time_text_embed.time_embedder.linear_1."),
    (r"^txt_in\.t_embedder\.(mlp\.2|out_layer)\.", "context_embedder.time_text_embed.time_embedder.linear_2."),
    (r"^txt_in\.c_embedder\.(linear_1|in_layer)\.", "context_embedder.time_text_embed.text_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.(linear_2|out_layer)\.", "context_embedder.time_text_embed.text_embedder.linear_2."),
    (r"\.time_embedder\.", ".timestep_embedder."),
    (r"^txt_in\.individual_token_refiner\.blocks\.", "context_embedder.token_refiner.refiner_blocks."),
    (r"\.self_attn[._]qkv\.", ".attn.(to_q|to_k|to_v)."),
    (r"\.self_attn[._]proj\.", ".attn.to_out.0."),
    (r"(refiner_blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.norm_out.linear."),
    (r"(refiner_blocks\.\d+)\.mlp\.(fc1|0)\.", r"\1.ff.net.0.proj."),
    (r"(refiner_blocks\.\d+)\.mlp\.(fc2|2)\.", r"\1.ff.net.2."),
    (r"^double_blocks\.", "transformer_blocks."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"\.img_attn[._]qkv\.", ".attn.(to_q|to_k|to_v)."),
    (r"\.txt_attn[._]qkv\.", ".attn.(add_q_proj|add_k_proj|add_v_proj)."),
    (r"\.img_attn[._]proj\.", ".attn.to_out.0."),
    (r"\.txt_attn[._]proj\.", ".attn.to_add_out."),
    (r"\.img_attn(_q_norm\.weight|\.norm\.query_norm\.scale)$", ".attn.norm_q.weight"),
    (r"\.img_attn(_k_norm\.weight|\.norm\.key_norm\.scale)$", ".attn.norm_k.weight"),
    (r"\.txt_attn(_q_norm\.weight|\.norm\.query_norm\.scale)$", ".attn.norm_added_q.weight"),
    (r"\.txt_attn(_k_norm\.weight|\.norm\.key_norm\.scale)$", ".attn.norm_added_k.weight"),
    (r"\.img_mod\.lin(ear)?\.", ".norm1.linear."),
    (r"\.txt_mod\.lin(ear)?\.", ".norm1_context.linear."),
    (r"\.img_mlp\.(fc1|0)\.", ".ff.net.0.proj."),
    (r"\.img_mlp\.(fc2|2)\.", ".ff.net.2."),
    (r"\.txt_mlp\.(fc1|0)\.", ".ff_context.net.0.proj."),
    (r"\.txt_mlp\.(fc2|2)\.", ".ff_context.net.2."),
    (r"\.linear1\.", ".(attn.to_q|attn.to_k|attn.to_v|proj_mlp)."),
    (r"\.linear2\.", ".proj_out."),
    (r"\.(q_norm\.weight|norm\.query_norm\.scale)$", ".attn.norm_q.weight"),
    (r"\.(k_norm\.weight|norm\.key_norm\.scale)$", ".attn.norm_k.weight"),
    (r"\.modulation\.lin(ear)?\.", ".norm.linear."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear<1,0/2>."),
    (r"^final_layer\.linear\.", "proj_out."),
)

_LTX = _always(
    (r"^patchify_proj\.", "proj_in."),
    (r"^adaln_single\.", "time_embed."),
    (r"\.([qk])_norm\.", r".norm_\1."),
)
_LTX_STAGES = {  # number of a block in the file -> ours, by version
    "0.9.0 decoder": ("mid_block", "0", "1.upsamplers.0", "1", "2.conv_in", "2.upsamplers.0", "2", "3.conv_in"),
    "0.9.1 decoder": (
        "mid_block",
        "0.upsamplers.0",
        "0",
        "1.upsamplers.0",
        "1",
        "2.upsamplers.0",
        "2",
        "3.upsamplers.0",
    ),
    "0.9.0 encoder": ("0", "0.downsamplers.0", "0.conv_out", "1", "1.downsamplers.0", "1.conv_out", "2"),
    "0.9.5 encoder": (
        "0",
        "0.downsamplers.0",
        "1",
        "1.downsamplers.0",
        "2",
        "2.downsamplers.0",
        "3",
        "3.downsamplers.0",
    ),
}
_LTX_STAGES["0.9.0 decoder"] += ("3.upsamplers.0", "3")
_LTX_STAGES["0.9.1 decoder"] += ("3",)
_LTX_STAGES["0.9.0 encoder"] += ("2.downsamplers.0", "3", "mid_block")
_LTX_STAGES["0.9.5 encoder"] += ("mid_block",)


def _ltx_vae(names: Collection[str]) -> tuple[Rule, ...]:
    if not any(".res_blocks." in name for name in names):  # diffusers' names
        return ()
    is_folded = any(name.startswith("encoder.down_blocks.2.res_blocks.") for name in names)
    is_timed = any(name.startswith("decoder.last_time_embedder.") for name in names)
    stages = {
        "encoder.down_blocks.": _LTX_STAGES["0.9.5 encoder" if is_folded else "0.9.0 encoder"],
        "decoder.up_blocks.": _LTX_STAGES["0.9.1 decoder" if is_timed else "0.9.0 decoder"],
    }

    def stage(match: re.Match[str]) -> str:
        known = stages[match[1]]
        at = int(match[2])
        if at >= len(known):
            return match[0]
        return f"{match[1]}{known[at]}." if known[at] != "mid_block" else f"{match[1].partition('.')[0]}.mid_block."

    return (
        (r"^(encoder\.down_blocks\.|decoder\.up_blocks\.)(\d+)\.", stage),
        (r"\.conv_shortcut\.", ".conv_shortcut.conv."),
        (r"\.res_blocks\.", ".resnets."),
        (r"\.norm3\.norm\.", ".norm3."),
        (r"^decoder\.last_time_embedder\.", "decoder.time_embedder."),
        (r"^decoder\.last_scale_shift_table$", "decoder.scale_shift_table"),
        (r"^per_channel_statistics\.mean-of-means$", "latents_mean"),
        (r"^per_channel_statistics\.std-of-means$", "latents_std"),
    )


_COGVIDEOX = _always(
    (r"^transformer\.final_layernorm\.", "norm_final."),
    (r"^transformer\.layers\.(\d+)\.", r"transformer_blocks.\1."),
    (r"\.attention\.query_key_value\.", ".attn1.(to_q|to_k|to_v)."),
    (r"\.attention\.dense\.", ".attn1.to_out.0."),
    (r"\.mlp\.dense_h_to_4h\.", ".ff.net.0.proj."),
    (r"\.mlp\.dense_4h_to_h\.", ".ff.net.2."),
    (r"\.input_layernorm\.", ".norm1.norm."),
    (r"\.post_attention_layernorm\.", ".norm2.norm."),
    (r"^(time|ofs)_embed\.0\.", r"\1_embedding.linear_1."),
    (r"^(time|ofs)_embed\.2\.", r"\1_embedding.linear_2."),
    (r"^mixins\.patch_embed\.", "patch_embed."),
    (r"^mixins\.pos_embed\.pos_embedding$", "patch_embed.pos_embedding"),
    (r"^mixins\.final_layer\.norm_final\.", "norm_out.norm."),
    (r"^mixins\.final_layer\.linear\.", "proj_out."),
    (r"^mixins\.final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^mixins\.adaln_layer\.query_layernorm_list\.(\d+)\.", r"transformer_blocks.\1.attn1.norm_q."),
    (r"^mixins\.adaln_layer\.key_layernorm_list\.(\d+)\.", r"transformer_blocks.\1.attn1.norm_k."),
    (
        r"^mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1\.",
        r"transformer_blocks.\1.(norm1.linear<0,1,2,6,7,8/12>|norm2.linear<3,4,5,9,10,11/12>).",
    ),
)


def _cogvideox_vae(names: Collection[str]) -> tuple[Rule, ...]:
    levels = [int(found[1]) for name in names if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    last = max(levels, default=0)
    return (
        (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
        (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{last - int(match[1])}."),
        (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
        (r"(_blocks\.\d+)\.downsample\.", r"\1.downsamplers.0."),
        (r"(_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    )


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "WanTransformer3DModel": Layout(
            probes=("time_projection.1.weight", "condition_embedder.time_proj.weight"), rules=_WAN
        ),
        "AutoencoderKLWan": Layout(
            probes=("decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"), rules=_wan_vae
        ),
        "HunyuanVideoTransformer3DModel": Layout(
            probes=("vector_in.in_layer.weight", "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"),
            rules=_HUNYUAN,
        ),
        "AutoencoderKLHunyuanVideo": Layout(probes=("decoder.mid_block.attentions.0.to_q.weight",), rules=_always()),
        "LTXVideoTransformer3DModel": Layout(
            probes=("adaln_single.linear.weight", "time_embed.linear.weight"), rules=_LTX
        ),
        "AutoencoderKLLTXVideo": Layout(
            probes=("per_channel_statistics.std-of-means", "latents_std"),
            rules=_ltx_vae,
            dropped=r"per_channel_statistics\.(channel|mean-of-stds)",
        ),
        "CogVideoXTransformer3DModel": Layout(
            probes=("mixins.patch_embed.proj.weight", "patch_embed.text_proj.weight"),
            rules=_COGVIDEOX,
            dropped=r"embed_tokens|freqs_(sin|cos)|position_embedding",
        ),
        "AutoencoderKLCogVideoX": Layout(
            probes=(
                "decoder.mid.block_1.norm1.conv_y.conv.weight",
                "decoder.mid_block.resnets.0.norm1.conv_y.conv.weight",
            ),
            rules=_cogvideox_vae,
            dropped=r"^loss\.",
        ),
    }
)
"""Published class name -> how files name its weights."""
