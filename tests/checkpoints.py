"""Tiny checkpoints in the published folder layouts, written by the libraries that wrote the real ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vramkit.demo.tokenizer import write_tokenizer

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
# What Wan2.2 5B differs in.
WAN_5B = {
    "transformer": {"in_channels": 8, "out_channels": 8},
    "vae": {
        "z_dim": 8,
        "decoder_base_dim": 12,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "latents_mean": [-0.2, 0.1, 0.0, 0.3, 0.2, -0.1, 0.0, 0.1],
        "latents_std": [0.8, 1.1, 0.9, 1.2, 1.0, 0.7, 1.3, 1.0],
    },
    "options": {"expand_timesteps": True},
}
TEXT_ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
UNIPC = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
    "flow_shift": 3.0,
}


def write_wan_checkpoint(
    folder: Path,
    *,
    pipeline: str = "WanPipeline",
    scheduler: str = "unipc",
    seed: int = 0,
    transformer: Mapping[str, Any] = MappingProxyType({}),
    vae: Mapping[str, Any] = MappingProxyType({}),
    options: Mapping[str, Any] = MappingProxyType({}),
    **saving: Any,
) -> Path:
    """Write a whole checkpoint with random weights of a few hundred KB and return its folder.

    transformer and vae change their configs; options are the pipeline's, of which a boundary_ratio makes a second
    transformer; an image_dim makes an image encoder; saving is for save_pretrained.
    """
    import diffusers
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    vocab_size = write_tokenizer(folder / "tokenizer")
    schedulers: dict[str, Any] = {
        "unipc": lambda: UniPCMultistepScheduler(**UNIPC),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **TEXT_ENCODER))
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": _telling(text_encoder),
        "transformer": _noisy(WanTransformer3DModel(**TRANSFORMER | transformer)),
        "vae": _noisy(AutoencoderKLWan(**VAE | vae)),
        "scheduler": schedulers[scheduler](),
    }
    if options.get("boundary_ratio") is not None:
        parts["transformer_2"] = _noisy(WanTransformer3DModel(**TRANSFORMER | transformer))
    if "image_dim" in transformer:
        parts |= _image_encoder()
    getattr(diffusers, pipeline)(**parts, **options).save_pretrained(folder, **saving)
    return folder


def _image_encoder() -> dict[str, Any]:
    """A CLIP image encoder of 5 tokens, and the processor before it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3} | {
        key: value for key, value in CLIP.items() if key != "num_hidden_layers"
    }
    return {
        "image_encoder": _telling(CLIPVisionModel(CLIPVisionConfig(**sizes))),
        "image_processor": CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=3
        ),
    }


HUNYUAN_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "rope_axes_dim": (4, 6, 6),
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 32,
    "pooled_projection_dim": 16,
    "mlp_ratio": 2.0,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
}
HUNYUAN_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_hunyuan_checkpoint(
    folder: Path,
    *,
    guidance_embeds: bool = True,
    shift: float = 7.0,
    seed: int = 0,
    transformer: Mapping[str, Any] = MappingProxyType({}),
    vae: Mapping[str, Any] = MappingProxyType({}),
    **saving: Any,
) -> Path:
    """Write a whole HunyuanVideo checkpoint with random weights of a few hundred KB and return its folder.

    transformer and vae change their configs; saving is for save_pretrained.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = make_llama_tokenizer(), make_clip_tokenizer()
    llama = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **LLAMA))
    # As published: 2 stands for the highest id, that of the end.
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer_2), bos_token_id=0, eos_token_id=2, **CLIP))
    config = HUNYUAN_TRANSFORMER | {"guidance_embeds": guidance_embeds} | transformer
    pipeline = HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=_telling(llama),
        tokenizer_2=tokenizer_2,
        text_encoder_2=_telling(clip),
        transformer=_noisy(HunyuanVideoTransformer3DModel(**config)),
        vae=_noisy(AutoencoderKLHunyuanVideo(**HUNYUAN_VAE | vae)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipeline.save_pretrained(folder, **saving)
    return folder


LTX_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "in_channels": 8,
    "out_channels": 8,
    "caption_channels": 32,
    "num_layers": 2,
}
_LTX_TIMED_DECODER = {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
# By version of the published checkpoint: no timestep in the decoder, one and noise, one and folding in the encoder.
LTX_VAES: dict[str, dict[str, Any]] = {
    "0.9.0": {
        "block_out_channels": (4, 4, 8, 8),
        "decoder_block_out_channels": (4, 4, 8, 8),
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
    "0.9.1": _LTX_TIMED_DECODER
    | {
        "block_out_channels": (4, 4, 8, 8),
        "layers_per_block": (1,) * 5,
        "decoder_inject_noise": (True, True, True, False),
    },
    "0.9.5": _LTX_TIMED_DECODER
    | {
        "block_out_channels": (4, 8, 16, 16, 16),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 4,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}
LTX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "shift_terminal": 0.1,
}


def write_ltx_checkpoint(
    folder: Path,
    *,
    pipeline: str = "LTXPipeline",
    version: str = "0.9.0",
    scheduler: Mapping[str, Any] = MappingProxyType(LTX_SCHEDULER),
    seed: int = 0,
    transformer: Mapping[str, Any] = MappingProxyType({}),
    vae: Mapping[str, Any] = MappingProxyType({}),
    **saving: Any,
) -> Path:
    """Write a whole LTX-Video checkpoint with random weights of a few hundred KB and return its folder.

    transformer and vae change their configs; saving is for save_pretrained.
    """
    import diffusers
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    vocab_size = write_tokenizer(folder / "tokenizer")
    text_encoder = T5EncoderModel(T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", **TEXT_ENCODER))
    channels = LTX_TRANSFORMER["in_channels"]
    autoencoder = _noisy(AutoencoderKLLTXVideo(latent_channels=channels, **LTX_VAES[version] | vae))
    if version != "0.9.0":
        autoencoder.decoder.timestep_scale_multiplier.data.fill_(1000.0)
    autoencoder.latents_mean.normal_(0, 0.2)
    autoencoder.latents_std.uniform_(0.5, 1.5)
    getattr(diffusers, pipeline)(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=_telling(text_encoder),
        transformer=_noisy(LTXVideoTransformer3DModel(**LTX_TRANSFORMER | transformer)),
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    ).save_pretrained(folder, **saving)
    return folder


def make_llama_tokenizer() -> Any:
    """A LlamaTokenizerFast that cuts the published prompt template into a little more than 95 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizerFast

    from vramkit.pipelines.hunyuan_video.prompts import PROMPT_TEMPLATE

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=315, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([PROMPT_TEMPLATE["template"]], trainer)
    bpe = json.loads(trained.to_str())["model"]
    return LlamaTokenizerFast(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        pad_token="<pad>",
        additional_special_tokens=specials[4:],
        padding_side="right",
    )


def make_clip_tokenizer() -> Any:
    """A CLIPTokenizer of single characters, the end of a text with the highest id as in the published one."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    pieces = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


COGVIDEOX_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_height": 4,
    "sample_width": 6,
    "sample_frames": 9,
    "max_text_seq_length": 16,
}
COGVIDEOX_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_height": 96,
    "sample_width": 80,
}
COGVIDEOX_SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def write_cogvideox_checkpoint(
    folder: Path,
    *,
    pipeline: str = "CogVideoXPipeline",
    scheduler: str = "ddim",
    seed: int = 0,
    transformer: Mapping[str, Any] = MappingProxyType({}),
    vae: Mapping[str, Any] = MappingProxyType({}),
    **saving: Any,
) -> Path:
    """Write a whole CogVideoX checkpoint, sinusoidal as 2B is, with random weights of a few hundred KB.

    transformer and vae change their configs; saving is for save_pretrained.
    Prompts are of 16 tokens, to which sinusoidal ones are bound in diffusers.
    """
    import diffusers
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXTransformer3DModel,
    )
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    vocab_size = write_tokenizer(folder / "tokenizer")
    text_encoder = T5EncoderModel(T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", **TEXT_ENCODER))
    schedulers = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
    getattr(diffusers, pipeline)(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=_telling(text_encoder),
        transformer=_noisy(CogVideoXTransformer3DModel(**COGVIDEOX_TRANSFORMER | transformer)),
        vae=_noisy(AutoencoderKLCogVideoX(**COGVIDEOX_VAE | vae)),
        scheduler=schedulers[scheduler](**COGVIDEOX_SCHEDULER),
    ).save_pretrained(folder, **saving)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None as a value is written as null."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_oracle(folder: Path, kind: str = "DiffusionPipeline", **options: Any) -> Any:
    """Load the folder with diffusers, quietly, in float32 unless told otherwise, as what it names or another kind."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = getattr(diffusers, kind).from_pretrained(folder, **({"torch_dtype": torch.float32} | options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _noisy(model: torch.nn.Module) -> torch.nn.Module:
    """Move one-dimensional parameters off their ones and zeros, so that a swapped norm or bias shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or 1 in parameter.shape:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _telling(model: torch.nn.Module) -> torch.nn.Module:
    """Widen a text encoder's weights, at first so small that its output hardly depends on the prompt."""
    for parameter in model.parameters():
        scale = 0.2 if parameter.shape[-1] < 256 else parameter.shape[-1] ** -0.5
        parameter.data.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def write_lora(model: torch.nn.Module, folder: Path, *, rank: int = 4, seed: int = 5) -> Path:
    """Write an adapter for the attention layers of a transformer, with diffusers' names, and return its file."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_v"):
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.2
            weights |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(weights, path)
    return path
