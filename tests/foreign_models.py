"""Models that others wrote, tiny: classes of transformers and diffusers, each with a config of its own and one call.

`MODELS` maps the name of a class to a `ForeignModel`, which builds one with random weights and calls it; entries import
nothing before they are used. `tensors_of` lists what a call returned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    library: str
    name: str  # of the class
    options: dict[str, Any]  # of its config
    inputs: Callable[[], dict[str, Any]]
    config: str = ""  # the class of the config, in transformers
    warns: str = ""  # a warning that is the class's own affair
    # Whether save_pretrained writes what the module has, under its names.
    saves_as_it_is: bool = True

    def make(self) -> nn.Module:
        """A model in evaluation use; in a context that says where parameters are put, there."""
        library = importlib.import_module(self.library)
        kind = getattr(library, self.name)
        torch.manual_seed(0)
        with self._quiet():
            if self.library == "transformers":
                model = kind(getattr(library, self.config)(**self.options))
            else:
                model = kind(**self.options)
        # Frozen, because torch picks other kernels for some convolutions that could be trained.
        return model.eval().requires_grad_(False)

    def call(self, model: nn.Module) -> list[torch.Tensor]:
        """All tensors that one forward with fixed inputs returns."""
        torch.manual_seed(1)
        with torch.no_grad(), self._quiet():
            return list(tensors_of(model(**self.inputs())))

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if self.warns:
                warnings.filterwarnings("ignore", message=self.warns)
            yield


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Walk through tuples, dicts and dataclasses; caches and other objects are passed over."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_of(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(output):
        yield from tensors_of([getattr(output, field.name) for field in dataclasses.fields(output)])


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# -- transformers -------------------------------------------------------------------------------------------------------

_IDS = torch.arange(3, 12)[None]


def ids() -> dict[str, Any]:
    return {"input_ids": _IDS.clone(), "attention_mask": torch.ones_like(_IDS)}


def pair() -> dict[str, Any]:
    return {**ids(), "decoder_input_ids": _IDS[:, :5].clone()}


def picture(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": normal(1, 3, size, size)}


def picture_and_ids() -> dict[str, Any]:
    return {**ids(), **picture()()}


def sound(samples: int = 800) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_values": normal(1, samples)}


def mel() -> dict[str, Any]:
    return {"input_features": normal(1, 16, 60), "decoder_input_ids": _IDS[:, :5].clone()}


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LM = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GQA = {**_LM, "num_key_value_heads": 2, "head_dim": 8}
_MOE = {**_GQA, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **_SPECIAL}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, **_SPECIAL}
_BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **_SPECIAL,
}
_CLIP_TEXT = {**_LM, "projection_dim": 16}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_CLIP_VISION = {**_VIT, "projection_dim": 16}
_WAVES = {
    **_LM,
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
# class, config class, options, inputs
# fmt: off
_TRANSFORMERS: list[tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = [
    # language models
    ("LlamaForCausalLM", "LlamaConfig", {**_GQA, "tie_word_embeddings": True}, ids),
    ("MistralForCausalLM", "MistralConfig", {**_GQA, "sliding_window": 4}, ids),
    ("Qwen2ForCausalLM", "Qwen2Config", _GQA, ids),
    ("Qwen3ForCausalLM", "Qwen3Config", _GQA, ids),
    ("GemmaForCausalLM", "GemmaConfig", _GQA, ids),
    ("Gemma2ForCausalLM", "Gemma2Config", _GQA, ids),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", _GQA, ids),
    ("PhiForCausalLM", "PhiConfig", {**_LM, "num_key_value_heads": 2}, ids),
    ("Phi3ForCausalLM", "Phi3Config", _GQA, ids),
    ("OlmoForCausalLM", "OlmoConfig", _GQA, ids),
    ("Olmo2ForCausalLM", "Olmo2Config", _GQA, ids),
    ("CohereForCausalLM", "CohereConfig", _GQA, ids),
    ("GraniteForCausalLM", "GraniteConfig", _GQA, ids),
    ("SmolLM3ForCausalLM", "SmolLM3Config", _GQA, ids),
    ("StableLmForCausalLM", "StableLmConfig", _GQA, ids),
    ("Starcoder2ForCausalLM", "Starcoder2Config", _GQA, ids),
    ("GlmForCausalLM", "GlmConfig", _GQA, ids),
    ("Glm4ForCausalLM", "Glm4Config", _GQA, ids),
    ("HeliumForCausalLM", "HeliumConfig", _GQA, ids),
    ("NemotronForCausalLM", "NemotronConfig", _GQA, ids),
    ("GPT2LMHeadModel", "GPT2Config", _GPT, ids),
    ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}, ids),
    ("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "rotary_dim": 4}, ids),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", _LM, ids),
    ("GPTNeoForCausalLM", "GPTNeoConfig", {**_SPECIAL, "vocab_size": 99, "hidden_size": 32, "num_layers": 2,
     "num_heads": 4, "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]]}, ids),
    ("OPTForCausalLM", "OPTConfig", {**_LM, "ffn_dim": 48, "word_embed_proj_dim": 32}, ids),
    ("BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_SPECIAL},
     ids),
    ("FalconForCausalLM", "FalconConfig", {**_LM, "new_decoder_architecture": False}, ids),
    ("MptForCausalLM", "MptConfig", {"vocab_size": 99, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
     ids),
    ("MixtralForCausalLM", "MixtralConfig", {**_GQA, "num_local_experts": 4}, ids),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 16}, ids),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE, ids),
    ("OlmoeForCausalLM", "OlmoeConfig", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}, ids),
    ("GptOssForCausalLM", "GptOssConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}, ids),
    ("MambaForCausalLM", "MambaConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4,
     **_SPECIAL}, ids),
    ("XGLMForCausalLM", "XGLMConfig", {"vocab_size": 99, "d_model": 32, "num_layers": 3, "attention_heads": 4,
     "ffn_dim": 48, "max_position_embeddings": 64, **_SPECIAL}, ids),
    # encoders
    ("BertModel", "BertConfig", _LM, ids),
    ("BertForMaskedLM", "BertConfig", _LM, ids),
    ("RobertaModel", "RobertaConfig", _LM, ids),
    ("XLMRobertaModel", "XLMRobertaConfig", _LM, ids),
    ("DistilBertModel", "DistilBertConfig", {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4,
     "max_position_embeddings": 64}, ids),
    ("ElectraModel", "ElectraConfig", {**_LM, "embedding_size": 16}, ids),
    ("AlbertModel", "AlbertConfig", {**_LM, "embedding_size": 16}, ids),
    ("DebertaV2Model", "DebertaV2Config", {**_LM, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
     "position_buckets": 8, "share_att_key": True}, ids),
    ("MPNetModel", "MPNetConfig", _LM, ids),
    ("ModernBertModel", "ModernBertConfig", {**_LM, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}, ids),
    ("T5EncoderModel", "T5Config", _T5, ids),
    ("UMT5EncoderModel", "UMT5Config", _T5, ids),
    ("MT5EncoderModel", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, ids),
    # encoder and decoder
    ("T5ForConditionalGeneration", "T5Config", _T5, pair),
    ("BartForConditionalGeneration", "BartConfig", _BART, pair),
    ("MBartForConditionalGeneration", "MBartConfig", _BART, pair),
    ("PegasusForConditionalGeneration", "PegasusConfig", _BART, pair),
    ("MarianMTModel", "MarianConfig", _BART, pair),
    ("M2M100ForConditionalGeneration", "M2M100Config", _BART, pair),
    # pictures, alone and with words
    ("CLIPTextModel", "CLIPTextConfig", _CLIP_TEXT, ids),
    ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_TEXT, ids),
    ("CLIPVisionModel", "CLIPVisionConfig", _CLIP_VISION, picture()),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _CLIP_VISION, picture()),
    ("CLIPModel", "CLIPConfig", {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 16},
     picture_and_ids),
    ("SiglipTextModel", "SiglipTextConfig", _LM, ids),
    ("SiglipVisionModel", "SiglipVisionConfig", _VIT, picture()),
    ("SiglipModel", "SiglipConfig", {"text_config": _LM, "vision_config": _VIT}, picture_and_ids),
    ("ViTModel", "ViTConfig", _VIT, picture()),
    ("DeiTModel", "DeiTConfig", _VIT, picture()),
    ("BeitModel", "BeitConfig", {**_VIT, "use_relative_position_bias": True}, picture()),
    ("Dinov2Model", "Dinov2Config", {**_VIT, "mlp_ratio": 2}, picture()),
    ("SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2],
     "num_heads": [2, 2], "window_size": 4}, picture()),
    ("ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "image_size": 32},
     picture()),
    ("ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1],
     "layer_type": "basic"}, picture()),
    ("SegformerModel", "SegformerConfig", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
     "num_attention_heads": [1, 2, 2, 2]}, picture(64)),
    # sound
    ("WhisperForConditionalGeneration", "WhisperConfig", {**_BART, "num_mel_bins": 16, "max_source_positions": 30,
     "max_target_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None}, mel),
    ("Wav2Vec2Model", "Wav2Vec2Config", _WAVES, sound()),
    ("HubertModel", "HubertConfig", _WAVES, sound()),
    ("EncodecModel", "EncodecConfig", {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16,
     "upsampling_ratios": [4, 2], "num_lstm_layers": 1}, lambda: {"input_values": normal(1, 1, 400)}),
    ("VitsModel", "VitsConfig", {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
     "ffn_dim": 32, "flow_size": 16, "spectrogram_bins": 9, "upsample_initial_channel": 16, "upsample_rates": [4, 4],
     "upsample_kernel_sizes": [8, 8], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
     "prior_encoder_num_flows": 2, "prior_encoder_num_wavenet_layers": 2, "posterior_encoder_num_wavenet_layers": 2,
     "wavenet_dilation_rate": 1, "duration_predictor_num_flows": 2}, ids),
]
# fmt: on

# -- diffusers -----------------------------------------------------------------------------------------------------------

_NOISE = torch.tensor([500.0])
_GRID = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])  # of 16 tokens


def latents(*shape: int, text: int = 16, tokens: int = 9, **more: Any) -> Callable[[], dict[str, Any]]:
    """What most denoisers take: latents, a timestep, embeddings of a text; and more."""
    return lambda: {
        "hidden_states": normal(*shape),
        "timestep": _NOISE.clone(),
        "encoder_hidden_states": normal(1, tokens, text),
        **_fresh(more),
    }


def packed(ids_width: int = 3, **more: Any) -> Callable[[], dict[str, Any]]:
    """The same with a picture as tokens and their positions, as Flux takes it."""
    image = torch.cat([_GRID, torch.zeros(16, ids_width - 3)], dim=-1)
    return latents(1, 16, 8, img_ids=image, txt_ids=torch.zeros(9, ids_width), **more)


def packed_with_sound() -> dict[str, Any]:
    """One sequence of words, sounds and pictures, as MiniMax-H3 takes it: 9, 5 and 8 tokens."""
    tags = torch.tensor([1] * 9 + [2] * 5 + [0] * 8)
    positions = torch.zeros(22, 3)
    positions[:, 0] = torch.arange(22.0)
    named = {"text": 1, "audio": 2, "video": 0}
    return {
        "hidden_states": normal(1, 8, 16),
        "audio_hidden_states": normal(1, 5, 6),
        "encoder_hidden_states": normal(1, 9, 16),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == named["audio"]).long(),
        "token_tags": tags,
        "position_ids": positions,
        **{f"{name}_indices": (tags == tag).nonzero().flatten() for name, tag in named.items()},
    }


def sample(*shape: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": normal(*shape), **_fresh(more)}


def denoised(**more: Any) -> Callable[[], dict[str, Any]]:
    return sample(1, 4, 16, 16, timestep=_NOISE, **more)


def _fresh(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_SAME = {"in_channels": 4, "out_channels": 4}
_FLUX = {**_HEADS, "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 16}
_WAN = {**_HEADS, **_SAME, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": 4, "rope_max_seq_len": 32}
_HUNYUAN = {
    **_HEADS,
    **_SAME,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
_COG = {
    **_HEADS,
    **_SAME,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 9,
}
_UNET = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
_CROSS = {**_UNET, "cross_attention_dim": 16, "attention_head_dim": 4}
_VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
_WAN_VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
_FULL = torch.ones(1, 9)
# class, options, inputs
# fmt: off
_DIFFUSERS: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = [
    # video
    ("WanTransformer3DModel", _WAN, latents(1, 4, 3, 8, 8)),
    ("SkyReelsV2Transformer3DModel", _WAN, latents(1, 4, 3, 8, 8)),
    ("WanVACETransformer3DModel", {**_WAN, "vace_layers": [0, 2], "vace_in_channels": 6}, latents(1, 4, 3, 8, 8,
     control_hidden_states=normal(1, 6, 3, 8, 8))),
    ("HunyuanVideoTransformer3DModel", _HUNYUAN, latents(1, 4, 3, 8, 8, encoder_attention_mask=_FULL,
     pooled_projections=normal(1, 8), guidance=_NOISE)),
    ("HunyuanVideoFramepackTransformer3DModel", {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 12,
     "has_clean_x_embedder": True}, latents(1, 4, 3, 8, 8, encoder_attention_mask=_FULL,
     pooled_projections=normal(1, 8), guidance=_NOISE, image_embeds=normal(1, 5, 12), indices_latents=torch.arange(3),
     latents_clean=normal(1, 4, 1, 8, 8), indices_latents_clean=torch.arange(1),
     latents_history_2x=normal(1, 4, 2, 8, 8), indices_latents_history_2x=torch.arange(2),
     latents_history_4x=normal(1, 4, 4, 8, 8), indices_latents_history_4x=torch.arange(4))),
    ("HunyuanVideo15Transformer3DModel", {**_HEADS, **_SAME, "num_layers": 4, "num_refiner_layers": 1,
     "text_embed_dim": 16, "text_embed_2_dim": 12, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
     "task_type": "t2v"}, latents(1, 4, 3, 4, 4, encoder_attention_mask=_FULL, encoder_hidden_states_2=normal(1, 5, 12),
     encoder_attention_mask_2=torch.ones(1, 5), image_embeds=torch.zeros(1, 3, 8))),
    ("LTXVideoTransformer3DModel", {**_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32,
     "num_layers": 4, "caption_channels": 16}, latents(1, 12, 8, encoder_attention_mask=_FULL, num_frames=3, height=2,
     width=2)),
    ("LTX2VideoTransformer3DModel", {**_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32,
     "num_layers": 3, "caption_channels": 16, "audio_in_channels": 4, "audio_out_channels": 4,
     "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}, latents(1, 12, 8,
     audio_hidden_states=normal(1, 5, 4), audio_encoder_hidden_states=normal(1, 9, 16), num_frames=3, height=2, width=2,
     fps=24.0, audio_num_frames=5)),
    ("CogVideoXTransformer3DModel", _COG, latents(1, 3, 4, 8, 8)),
    ("ConsisIDTransformer3DModel", {**_COG, "num_layers": 3}, latents(1, 3, 4, 8, 8)),
    ("MochiTransformer3DModel", {**_HEADS, "in_channels": 4, "num_layers": 3, "pooled_projection_dim": 8,
     "text_embed_dim": 16, "time_embed_dim": 16, "max_sequence_length": 9}, latents(1, 4, 2, 8, 8,
     encoder_attention_mask=_FULL)),
    ("AllegroTransformer3DModel", {**_HEADS, **_SAME, "attention_head_dim": 24, "num_layers": 3,
     "cross_attention_dim": 48, "caption_channels": 16, "sample_height": 8, "sample_width": 8, "sample_frames": 2},
     latents(1, 4, 2, 8, 8)),
    ("LatteTransformer3DModel", {**_HEADS, **_SAME, "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 16,
     "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
     "norm_elementwise_affine": False, "video_length": 2, "attention_bias": True}, latents(1, 4, 2, 8, 8)),
    ("CosmosTransformer3DModel", {**_HEADS, **_SAME, "num_layers": 3, "text_embed_dim": 16, "adaln_lora_dim": 4,
     "max_size": (4, 16, 16), "concat_padding_mask": False}, latents(1, 4, 2, 8, 8, fps=24)),
    ("SanaVideoTransformer3DModel", {**_HEADS, **_SAME, "num_layers": 3, "num_cross_attention_heads": 2,
     "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8,
     "rope_max_seq_len": 32}, latents(1, 4, 2, 8, 8)),
    ("EasyAnimateTransformer3DModel", {**_HEADS, **_SAME, "patch_size": 2, "sample_width": 8, "sample_height": 8,
     "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 16, "text_embed_dim": 16}, latents(1, 4, 2, 8, 8)),
    ("Kandinsky5Transformer3DModel", {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8,
     "time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 3,
     "axes_dims": (4, 6, 6)}, latents(1, 2, 8, 8, 4, pooled_projections=normal(1, 8), visual_rope_pos=[torch.arange(2),
     torch.arange(4), torch.arange(4)], text_rope_pos=torch.arange(9))),
    ("MiniMaxH3Transformer3DModel", {**_HEADS, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 2,
     "ffn_dim": 48, "in_channels": 4, "audio_in_channels": 6, "text_dim": 16, "freq_dim": 16,
     "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2}, packed_with_sound),
    # pictures
    ("FluxTransformer2DModel", {**_FLUX, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)},
     packed(pooled_projections=normal(1, 8))),
    ("Flux2Transformer2DModel", {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16}, packed(4,
     guidance=_NOISE)),
    ("ChromaTransformer2DModel", {**_FLUX, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 16,
     "approximator_hidden_dim": 16, "approximator_layers": 2}, packed()),
    ("QwenImageTransformer2DModel", {**_HEADS, "in_channels": 8, "out_channels": 2, "num_layers": 4,
     "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}, latents(1, 16, 8, encoder_hidden_states_mask=_FULL.long(),
     img_shapes=[[(1, 4, 4)]])),
    ("SD3Transformer2DModel", {**_HEADS, **_SAME, "sample_size": 8, "num_layers": 4, "joint_attention_dim": 16,
     "caption_projection_dim": 32, "pooled_projection_dim": 8, "pos_embed_max_size": 8, "dual_attention_layers": (0,),
     "qk_norm": "rms_norm"}, latents(1, 4, 8, 8, pooled_projections=normal(1, 8))),
    ("SanaTransformer2DModel", {**_HEADS, **_SAME, "num_layers": 3, "num_cross_attention_heads": 2,
     "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8},
     latents(1, 4, 8, 8)),
    ("Lumina2Transformer2DModel", {**_SAME, "sample_size": 8, "hidden_size": 32, "num_layers": 3,
     "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
     "axes_dim_rope": (4, 6, 6), "axes_lens": (16, 16, 16), "cap_feat_dim": 16}, latents(1, 4, 8, 8,
     encoder_attention_mask=_FULL.bool())),
    ("HiDreamImageTransformer2DModel", {**_HEADS, **_SAME, "patch_size": 2, "num_layers": 2, "num_single_layers": 2,
     "caption_channels": [16, 16], "text_emb_dim": 8, "axes_dims_rope": (4, 6, 6), "max_resolution": (8, 8),
     "llama_layers": [0, 1, 1, 0], "num_routed_experts": 2, "num_activated_experts": 2, "force_inference_output": True},
     lambda: {"hidden_states": normal(1, 4, 8, 8), "timesteps": _NOISE.clone(),
     "encoder_hidden_states_t5": normal(1, 9, 16), "encoder_hidden_states_llama3": normal(2, 1, 9, 16),
     "pooled_embeds": normal(1, 8)}),
    ("AuraFlowTransformer2DModel", {**_HEADS, **_SAME, "sample_size": 8, "num_mmdit_layers": 2,
     "num_single_dit_layers": 2, "joint_attention_dim": 16, "caption_projection_dim": 32, "pos_embed_max_size": 16},
     latents(1, 4, 8, 8)),
    ("PixArtTransformer2DModel", {**_HEADS, **_SAME, "num_layers": 4, "cross_attention_dim": 32, "sample_size": 8,
     "caption_channels": 16, "use_additional_conditions": False}, latents(1, 4, 8, 8)),
    ("DiTTransformer2DModel", {**_HEADS, **_SAME, "num_layers": 4, "sample_size": 8},
     lambda: {"hidden_states": normal(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([5])}),
    ("CogView4Transformer2DModel", {**_HEADS, **_SAME, "num_layers": 3, "text_embed_dim": 16, "time_embed_dim": 16,
     "condition_dim": 8, "sample_size": 8, "rope_axes_dim": (8, 8)}, latents(1, 4, 8, 8,
     original_size=torch.tensor([[64.0, 64.0]]), target_size=torch.tensor([[64.0, 64.0]]),
     crop_coords=torch.zeros(1, 2))),
    ("CogView3PlusTransformer2DModel", {**_HEADS, **_SAME, "num_layers": 3, "text_embed_dim": 16, "time_embed_dim": 16,
     "condition_dim": 8, "sample_size": 8, "pos_embed_max_size": 8}, latents(1, 4, 8, 8,
     original_size=torch.tensor([[64.0, 64.0]]), target_size=torch.tensor([[64.0, 64.0]]),
     crop_coords=torch.zeros(1, 2))),
    ("HunyuanImageTransformer2DModel", {**_HEADS, **_SAME, "num_layers": 2, "num_single_layers": 2,
     "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (8, 8)}, latents(1, 4, 8, 8,
     encoder_attention_mask=_FULL.long())),
    ("ZImageTransformer2DModel", {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2,
     "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]},
     lambda: {"x": [normal(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [normal(9, 16)]}),
    ("PriorTransformer", {**_HEADS, "num_layers": 3, "embedding_dim": 16, "num_embeddings": 9,
     "additional_embeddings": 4}, lambda: {"hidden_states": normal(1, 16), "timestep": _NOISE.clone(),
     "proj_embedding": normal(1, 16), "encoder_hidden_states": normal(1, 9, 16)}),
    ("UNet2DModel", {**_UNET, **_SAME, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
     "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4}, denoised()),
    ("UNet2DConditionModel", {**_CROSS, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, denoised(encoder_hidden_states=normal(1, 9, 16))),
    ("UNet3DConditionModel", {**_CROSS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
     "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}, sample(1, 4, 2, 16, 16, timestep=_NOISE,
     encoder_hidden_states=normal(1, 9, 16))),
    ("UNetMotionModel", {**_UNET, "cross_attention_dim": 16, "num_attention_heads": 2,
     "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "up_block_types": ("UpBlockMotion",
     "CrossAttnUpBlockMotion"), "motion_num_attention_heads": 2}, sample(1, 4, 2, 16, 16, timestep=_NOISE,
     encoder_hidden_states=normal(2, 9, 16))),
    ("UNetSpatioTemporalConditionModel", {"sample_size": 16, "in_channels": 8, "block_out_channels": (32, 32),
     "layers_per_block": 1, "cross_attention_dim": 16, "num_attention_heads": 2, "addition_time_embed_dim": 8,
     "projection_class_embeddings_input_dim": 24, "down_block_types": ("CrossAttnDownBlockSpatioTemporal",
     "DownBlockSpatioTemporal"), "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
     sample(1, 2, 8, 16, 16, timestep=_NOISE, encoder_hidden_states=normal(1, 1, 16), added_time_ids=torch.ones(1, 3))),
    ("ControlNetModel", {**{k: v for k, v in _CROSS.items() if k != "sample_size"},
     "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "conditioning_embedding_out_channels": (4, 8)},
     denoised(encoder_hidden_states=normal(1, 9, 16), controlnet_cond=normal(1, 3, 32, 32))),
    # autoencoders
    ("AutoencoderKL", {**_VAE, "down_block_types": ("DownEncoderBlock2D",) * 2,
     "up_block_types": ("UpDecoderBlock2D",) * 2}, sample(1, 3, 16, 16)),
    ("AsymmetricAutoencoderKL", {"down_block_types": ("DownEncoderBlock2D",) * 2,
     "up_block_types": ("UpDecoderBlock2D",) * 2, "down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16),
     "norm_num_groups": 4}, sample(1, 3, 16, 16)),
    ("AutoencoderKLTemporalDecoder", {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 32),
     "layers_per_block": 1}, sample(2, 3, 16, 16, num_frames=2)),
    ("AutoencoderTiny", {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
     "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}, sample(1, 3, 16, 16)),
    ("VQModel", {"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 16}, sample(1, 3, 16, 16)),
    ("AutoencoderDC", {"latent_channels": 4, "attention_head_dim": 4, "encoder_block_types": ("ResBlock",
     "EfficientViTBlock"), "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
     "encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16), "encoder_layers_per_block": (1, 1),
     "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))},
     sample(1, 3, 16, 16)),
    ("AutoencoderKLWan", _WAN_VAE, sample(1, 3, 5, 16, 16)),
    ("AutoencoderKLQwenImage", _WAN_VAE, sample(1, 3, 1, 16, 16)),
    ("AutoencoderKLHunyuanVideo", {**_VAE, "block_out_channels": (8, 8, 16, 16)}, sample(1, 3, 5, 16, 16)),
    ("AutoencoderKLHunyuanVideo15", {"latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1,
     "spatial_compression_ratio": 4, "temporal_compression_ratio": 2, "downsample_match_channel": False,
     "upsample_match_channel": False}, sample(1, 3, 5, 16, 16)),
    ("AutoencoderKLLTX2Video", {"latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,),
     "layers_per_block": (1,), "decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,),
     "decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False), "downsample_type": ("spatial",),
     "upsample_residual": (False,), "upsample_factor": (1,), "patch_size": 1}, sample(1, 3, 5, 16, 16)),
    ("AutoencoderKLLTX2Audio", {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "resolution": 32,
     "latent_channels": 2, "mel_bins": 8}, sample(1, 2, 8, 8)),
    ("AutoencoderKLLTXVideo", {"latent_channels": 4, "block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
     "down_block_types": ("LTXVideoDownBlock3D",) * 2, "layers_per_block": (1, 1, 1),
     "decoder_layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, False),
     "decoder_spatio_temporal_scaling": (True, False), "decoder_inject_noise": (False,) * 3,
     "downsample_type": ("conv",) * 2, "upsample_residual": (False,) * 2, "upsample_factor": (1, 1)},
     sample(1, 3, 9, 16, 16)),
    ("AutoencoderKLCogVideoX", {**_VAE, "down_block_types": ("CogVideoXDownBlock3D",) * 2,
     "up_block_types": ("CogVideoXUpBlock3D",) * 2, "temporal_compression_ratio": 2}, sample(1, 3, 5, 16, 16)),
    ("AutoencoderKLMochi", {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
     "layers_per_block": (1,) * 5, "latent_channels": 4, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
     sample(1, 3, 7, 16, 16)),
    ("AutoencoderKLCosmos", {"latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8),
     "decode_block_out_channels": (8, 8, 8, 8), "attention_resolutions": (8,), "resolution": 64, "num_layers": 1,
     "patch_size": 4, "latents_mean": [0.0] * 64, "latents_std": [1.0] * 64}, sample(1, 3, 9, 32, 32)),
    ("AutoencoderKLMiniMaxH3", {"latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
     "spatial_downsample_factors": (2, 2), "temporal_downsample_factors": (2, 2), "norm_num_groups": 4,
     "decoder_num_layers": 2, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 8,
     "decoder_num_register_tokens": 2, "decoder_ffn_mult": 2, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
     sample(1, 3, 22, 8, 8)),
    ("AutoencoderKLMiniMaxH3Audio", {"encoder_dim": 4, "encoder_rates": (2, 2), "latent_dim": 24, "latent_channels": 6,
     "num_attention_heads": 2, "decoder_dim": 16, "decoder_rates": (2, 2), "decoder_kernel_sizes": (4, 4),
     "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),), "latents_mean": [0.0] * 6,
     "latents_std": [1.0] * 6}, sample(2, 1, 32)),
    ("AutoencoderOobleck", {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
     "decoder_channels": 8, "decoder_input_channels": 4}, sample(1, 2, 64)),
]
# fmt: on
# transformers saves these under the names of its earlier versions, with experts apart, or without tables of positions.
_RENAMED = {
    "BeitModel",
    "DeiTModel",
    "Dinov2Model",
    "GPTNeoXForCausalLM",
    "MarianMTModel",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "SegformerModel",
    "SwinModel",
    "ViTModel",
}
_WARNS = {
    "AutoencoderKLMiniMaxH3Audio": ".*weight_norm. is deprecated",
    "AutoencoderOobleck": ".*weight_norm. is deprecated",
    "MochiTransformer3DModel": "In CPU autocast, but the target dtype is not supported",
}

MODELS: dict[str, ForeignModel] = {
    **{
        name: ForeignModel(
            library="transformers",
            name=name,
            config=config,
            options=options,
            inputs=inputs,
            saves_as_it_is=name not in _RENAMED,
        )
        for name, config, options, inputs in _TRANSFORMERS
    },
    **{
        name: ForeignModel(library="diffusers", name=name, options=options, inputs=inputs, warns=_WARNS.get(name, ""))
        for name, options, inputs in _DIFFUSERS
    },
}
