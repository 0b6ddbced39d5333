"""Single files as the original code, ComfyUI and others name them, made of models of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]

_WAN: Rules = (
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
_WAN_VAE: Rules = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"(samples\.\d+|middle\.[02]|resnets\.\d)\.norm1\.", r"\1.residual.0."),
    (r"(samples\.\d+|middle\.[02]|resnets\.\d)\.conv1\.", r"\1.residual.2."),
    (r"(samples\.\d+|middle\.[02]|resnets\.\d)\.norm2\.", r"\1.residual.3."),
    (r"(samples\.\d+|middle\.[02]|resnets\.\d)\.conv2\.", r"\1.residual.6."),
)
_HUNYUAN: Rules = (
    (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
    (r"^(txt_in\..*)\.attn\.to_[qkv]\.", r"\1.self_attn_qkv."),
    (r"^(txt_in\..*)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
    (r"^(txt_in\..*)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
    (r"^(txt_in\..*)\.ff\.net\.0\.proj\.", r"\1.mlp.fc1."),
    (r"^(txt_in\..*)\.ff\.net\.2\.", r"\1.mlp.fc2."),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^x_embedder\.", "img_in."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^(double.*)\.attn\.to_[qkv]\.", r"\1.img_attn_qkv."),
    (r"^(double.*)\.attn\.add_[qkv]_proj\.", r"\1.txt_attn_qkv."),
    (r"\.attn\.norm_added_([qk])\.", r".txt_attn_\1_norm."),
    (r"^(double.*)\.attn\.norm_([qk])\.", r"\1.img_attn_\2_norm."),
    (r"\.attn\.to_out\.0\.", ".img_attn_proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn_proj."),
    (r"\.norm1\.linear\.", ".img_mod.linear."),
    (r"\.norm1_context\.linear\.", ".txt_mod.linear."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.fc1."),
    (r"\.ff\.net\.2\.", ".img_mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.fc2."),
    (r"^(single.*)\.(attn\.to_[qkv]|proj_mlp)\.", r"\1.linear1."),
    (r"^(single.*)\.proj_out\.", r"\1.linear2."),
    (r"^(single.*)\.attn\.norm_([qk])\.", r"\1.\2_norm."),
    (r"^(single.*)\.norm\.linear\.", r"\1.modulation.linear."),
)
# What ComfyUI makes of those names, and saves.
_COMFY_HUNYUAN: Rules = (
    (r"^txt_in\.t_embedder\.mlp\.0\.", "txt_in.t_embedder.in_layer."),
    (r"^txt_in\.t_embedder\.mlp\.2\.", "txt_in.t_embedder.out_layer."),
    (r"^txt_in\.c_embedder\.linear_1\.", "txt_in.c_embedder.in_layer."),
    (r"^txt_in\.c_embedder\.linear_2\.", "txt_in.c_embedder.out_layer."),
    (r"_mod\.linear\.", "_mod.lin."),
    (r"_attn_qkv\.", "_attn.qkv."),
    (r"mlp\.fc1\.", "mlp.0."),
    (r"mlp\.fc2\.", "mlp.2."),
    (r"_attn_q_norm\.weight", "_attn.norm.query_norm.scale"),
    (r"_attn_k_norm\.weight", "_attn.norm.key_norm.scale"),
    (r"\.q_norm\.weight", ".norm.query_norm.scale"),
    (r"\.k_norm\.weight", ".norm.key_norm.scale"),
    (r"_attn_proj\.", "_attn.proj."),
    (r"\.modulation\.linear\.", ".modulation.lin."),
    (r"_in\.mlp\.2\.", "_in.out_layer."),
    (r"_in\.mlp\.0\.", "_in.in_layer."),
)
_LTX: Rules = (
    (r"^proj_in\.", "patchify_proj."),
    (r"^time_embed\.", "adaln_single."),
    (r"\.norm_([qk])\.", r".\1_norm."),
)
_LTX_VAE_PARTS: Rules = (
    (r"\.conv_shortcut\.conv\.", ".conv_shortcut."),
    (r"\.resnets\.", ".res_blocks."),
    (r"\.norm3\.", ".norm3.norm."),
    (r"^decoder\.time_embedder\.", "decoder.last_time_embedder."),
    (r"^decoder\.scale_shift_table$", "decoder.last_scale_shift_table"),
    (r"^latents_mean$", "per_channel_statistics.mean-of-means"),
    (r"^latents_std$", "per_channel_statistics.std-of-means"),
)


def _stages(part: str, stages: str) -> Rules:
    inner = sorted(enumerate(stages.split()), key=lambda pair: -len(pair[1]))  # "1.upsamplers.0" before "1"
    blocks = "down_blocks" if part == "encoder" else "up_blocks"
    # Marked, so that what was renamed is not renamed again.
    rules = [
        (rf"^{part}\.{'' if stage == 'mid_block' else f'{blocks}.'}{re.escape(stage)}\.", f"{part}.#{blocks}.{at}.")
        for at, stage in inner
    ]
    return (*rules, ("#", ""))


_LTX_VAE = {
    "0.9.0": (
        *_stages(
            "encoder",
            "0 0.downsamplers.0 0.conv_out 1 1.downsamplers.0 1.conv_out 2 2.downsamplers.0 3 mid_block",
        ),
        *_stages(
            "decoder",
            "mid_block 0 1.upsamplers.0 1 2.conv_in 2.upsamplers.0 2 3.conv_in 3.upsamplers.0 3",
        ),
        *_LTX_VAE_PARTS,
    ),
    "0.9.5": (
        *_stages(
            "encoder",
            "0 0.downsamplers.0 1 1.downsamplers.0 2 2.downsamplers.0 3 3.downsamplers.0 mid_block",
        ),
        *_stages("decoder", "mid_block 0.upsamplers.0 0 1.upsamplers.0 1 2.upsamplers.0 2"),
        *_LTX_VAE_PARTS,
    ),
}
_COGVIDEOX: Rules = (
    (r"^norm_final\.", "transformer.final_layernorm."),
    (r"^transformer_blocks\.(\d+)\.attn1\.norm_q\.", r"mixins.adaln_layer.query_layernorm_list.\1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.norm_k\.", r"mixins.adaln_layer.key_layernorm_list.\1."),
    (r"^transformer_blocks\.(\d+)\.norm[12]\.linear\.", r"mixins.adaln_layer.adaLN_modulations.\1.1."),
    (r"^transformer_blocks\.", "transformer.layers."),
    (r"\.attn1\.to_[qkv]\.", ".attention.query_key_value."),
    (r"\.attn1\.to_out\.0\.", ".attention.dense."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.dense_h_to_4h."),
    (r"\.ff\.net\.2\.", ".mlp.dense_4h_to_h."),
    (r"\.norm1\.norm\.", ".input_layernorm."),
    (r"\.norm2\.norm\.", ".post_attention_layernorm."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^patch_embed\.", "mixins.patch_embed."),
    (r"^norm_out\.norm\.", "mixins.final_layer.norm_final."),
    (r"^norm_out\.linear\.", "mixins.final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "mixins.final_layer.linear."),
)
_COGVIDEOX_VAE: Rules = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"^encoder\.down_blocks\.", "encoder.down."),
    *((rf"^decoder\.up_blocks\.{at}\.", f"decoder.up.{3 - at}.") for at in range(4)),
    (r"\.resnets\.", ".block."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
ORIGINAL: dict[str, tuple[str, Rules]] = {  # layout -> prefix, rules
    "WanTransformer3DModel": ("", _WAN),
    "WanTransformer3DModel, ComfyUI": ("model.diffusion_model.", _WAN),
    "AutoencoderKLWan": ("", _WAN_VAE),
    "HunyuanVideoTransformer3DModel": ("", _HUNYUAN),
    "HunyuanVideoTransformer3DModel, ComfyUI": ("model.model.", _HUNYUAN + _COMFY_HUNYUAN),
    "AutoencoderKLHunyuanVideo": ("", ()),
    "LTXVideoTransformer3DModel": ("model.diffusion_model.", _LTX),
    "AutoencoderKLLTXVideo": ("vae.", _LTX_VAE["0.9.0"]),
    "AutoencoderKLLTXVideo, 0.9.5": ("vae.", _LTX_VAE["0.9.5"]),
    "CogVideoXTransformer3DModel": ("model.diffusion_model.", _COGVIDEOX),
    "AutoencoderKLCogVideoX": ("first_stage_model.", _COGVIDEOX_VAE),
}


def original_file(layout: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model under the names of a layout, joined as it joins them."""
    prefix, rules = ORIGINAL[layout]
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(state.items(), key=lambda item: _order(item[0])):
        original = name
        for pattern, new in rules:
            original = re.sub(pattern, new, original)
        if layout == "AutoencoderKLWan":
            original = _flat(original)
        parts.setdefault(prefix + original, []).append(tensor)
    joined = {name: torch.cat(each) if len(each) > 1 else each[0].contiguous() for name, each in parts.items()}
    for name, tensor in joined.items():
        if "final_layer.adaLN_modulation" in name and "Hunyuan" in layout:
            joined[name] = torch.cat(tensor.chunk(2)[::-1])  # shift and scale
        if "adaLN_modulations" in name:
            first, second = tensor.chunk(2)
            (a, b), (c, d) = first.chunk(2), second.chunk(2)
            joined[name] = torch.cat([a, c, b, d])
    return joined


def _order(name: str) -> int:
    return next(
        (at for at, key in enumerate(("_q", "_k", "_v", "proj_mlp")) if f"{key}." in name or f"{key}_" in name), 0
    )


def _flat(name: str) -> str:
    """Blocks of Wan's decoder in one row: two residual blocks or three, and what enlarges."""
    found = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name)
    if found is None:
        return name
    at = int(found[1]) * 4 + (int(found[3]) if found[2] == "resnets" else 3)
    return f"decoder.upsamples.{at}.{found[4]}"
