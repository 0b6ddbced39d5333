"""Pipelines of diffusers, tiny, with random weights: `PIPELINES` maps a class to its parts and to a call."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from foreign_models import MODELS, normal, tensors_of
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

__all__ = ["MORE_PIPELINES", "PIPELINES", "ForeignPipeline", "outputs_of"]

_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "swims", "badly"]
_PROMPT = "a cat swims"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignPipeline:
    parts: Callable[[], dict[str, Any]]
    inputs: Callable[[], dict[str, Any]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # sizes that no argument of a call sets
    of_blocks: Callable[..., Any] | None = None  # makes the pipeline where diffusers has it as blocks alone

    def make(self, name: str) -> Any:
        torch.manual_seed(0)
        kind = self.of_blocks or getattr(importlib.import_module("diffusers"), name.split(maxsplit=1)[0])
        pipe = kind(**self.parts())
        pipe.set_progress_bar_config(disable=True)
        for name, value in self.settings.items():
            setattr(pipe, name, value)
        return pipe

    def call(self, pipe: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        given = {"num_inference_steps": 2, "generator": generator, "output_type": "pt", **self.inputs()}
        return list(outputs_of(pipe(**given)))


def outputs_of(output: Any) -> Any:
    yield from (
        torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for value in tensors_of([getattr(output, name) for name in vars(output)])
    )


def part(name: str, **changes: Any) -> nn.Module:
    """A model of `foreign_models`, with other options."""
    foreign = MODELS[name]
    return dataclasses.replace(foreign, options={**foreign.options, **changes}).make()


def tokenizer(length: int = 9) -> Any:
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(_WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template="{{ messages[-1].content }}",
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
    )


def t5(width: int = 16, kind: str = "T5EncoderModel") -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": part(kind, d_model=width)}


def scheduler(name: str, **options: Any) -> Any:
    return getattr(importlib.import_module("diffusers"), name)(**options)


def flow(**options: Any) -> Any:
    return scheduler("FlowMatchEulerDiscreteScheduler", **options)


def wan_parts() -> dict[str, Any]:
    vae = part("AutoencoderKLWan", scale_factor_temporal=2, scale_factor_spatial=2)
    return {**t5(kind="UMT5EncoderModel"), "vae": vae, "scheduler": flow(shift=7.0)}


def clip(kind: str = "CLIPTextModel", width: int = 16, projection: int = 8, **changes: Any) -> nn.Module:
    return part(kind, hidden_size=width, projection_dim=projection, **changes)


def frames(count: int = 5, size: int = 16) -> dict[str, Any]:
    return {"num_frames": count, "height": size, "width": size}


def square(size: int = 16) -> dict[str, Any]:
    return {"height": size, "width": size}


def embedded(width: int = 16, tokens: int = 9, *, mask: str = "", negative: bool = False) -> dict[str, Any]:
    """A prompt as embeddings, with what masks it by the name that the pipeline has for it."""
    given = {"prompt_embeds": normal(1, tokens, width)}
    given |= {mask: torch.ones(1, tokens, dtype=torch.long)} if mask else {}
    if negative:
        given |= {f"negative_{name}": value.clone() for name, value in given.items()}
        given["negative_prompt_embeds"] = normal(1, tokens, width) * 0.5
    return given


def inner(place: str, name: str, **options: Any) -> Any:
    """What diffusers does not export: modules of one pipeline alone, and guiders."""
    torch.manual_seed(0)
    made = getattr(importlib.import_module(f"diffusers.{place}"), name)(**options)
    return made.eval().requires_grad_(False) if isinstance(made, nn.Module) else made


def masked(width: int, *, mask: str) -> dict[str, Any]:
    """Embeddings of prompts of which the last tokens count for nothing."""
    given = embedded(width, mask=mask, negative=True)
    given[mask][:, 6:] = given[f"negative_{mask}"][:, 4:] = 0
    return given


def worded(**more: Any) -> dict[str, Any]:
    return {"prompt": _PROMPT, **more}


def picture() -> torch.Tensor:
    return normal(1, 3, 16, 16).sigmoid()


def photograph() -> Image.Image:
    return Image.fromarray((picture()[0] * 255).byte().permute(1, 2, 0).numpy())


class Harmless(nn.Module):
    """What Cosmos asks to look at prompts and videos, which are harmless here."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("word", torch.zeros(1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.word.device

    @property
    def dtype(self) -> torch.dtype:
        return self.word.dtype

    def check_text_safety(self, text: str) -> bool:
        return bool(text)

    def check_video_safety(self, video: Any) -> Any:
        return video


def minimax_h3(**parts: Any) -> Any:
    """The blocks from embeddings of a prompt on: its text encoder is read at its layer 50."""
    blocks = importlib.import_module("diffusers.modular_pipelines").MiniMaxH3Blocks()
    for name in ("before_encode", "text_encoder", "vae_encoder"):
        del blocks.sub_blocks[name]
    pipe = blocks.init_pipeline()
    pipe.update_components(**parts)
    return pipe


_SD_UNET = {"sample_size": 8, "cross_attention_dim": 16}
_XL_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
    "transformer_layers_per_block": (1, 2),
}
_EXPERTS = {
    "caption_channels": [16, 32],
    "text_emb_dim": 32,
    "num_routed_experts": 4,
    "max_resolution": (16, 16),
    "force_inference_output": False,
}
_SOUND_AND_SIGHT = {
    "in_channels": 4,
    "out_channels": 4,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "caption_channels": 16,
}
_CONNECTORS = {
    "caption_channels": 16,
    "text_proj_in_factor": 3,
    "video_connector_num_attention_heads": 2,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 2,
    "video_connector_num_learnable_registers": None,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_layers": 2,
    "audio_connector_num_learnable_registers": None,
    "connector_rope_base_seq_len": 32,
    "rope_theta": 10000.0,
    "rope_double_precision": False,
    "causal_temporal_positioning": False,
}
_VOCODER = {
    "in_channels": 16,
    "hidden_channels": 16,
    "upsample_kernel_sizes": [4, 4],
    "upsample_factors": [2, 2],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3]],
    "output_sampling_rate": 16000,
}
PIPELINES: dict[str, ForeignPipeline] = {
    # video
    "WanPipeline": ForeignPipeline(
        parts=lambda: {**wan_parts(), "transformer": part("WanTransformer3DModel")},
        inputs=lambda: worded(negative_prompt="badly", max_sequence_length=9, **frames()),
    ),
    "WanImageToVideoPipeline": ForeignPipeline(
        parts=lambda: {
            **wan_parts(),
            "transformer": part("WanTransformer3DModel", in_channels=10, image_dim=32),
            "image_encoder": part("CLIPVisionModel"),
            "image_processor": transformers.CLIPImageProcessorPil(crop_size=32, size=32),
        },
        inputs=lambda: worded(image=picture(), max_sequence_length=9, **frames()),
    ),
    "SkyReelsV2Pipeline": ForeignPipeline(
        parts=lambda: {
            **wan_parts(),
            "transformer": part("SkyReelsV2Transformer3DModel"),
            "scheduler": scheduler("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
        },
        inputs=lambda: worded(max_sequence_length=9, **frames()),
    ),
    "WanVACEPipeline": ForeignPipeline(
        parts=lambda: {**wan_parts(), "transformer": part("WanVACETransformer3DModel", vace_in_channels=12)},
        inputs=lambda: worded(max_sequence_length=9, **frames()),
    ),
    "LTXPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("LTXVideoTransformer3DModel", in_channels=4, out_channels=4),
            "vae": part("AutoencoderKLLTXVideo"),
            "scheduler": flow(),
        },
        inputs=lambda: worded(max_sequence_length=9, **frames(9, 32)),
    ),
    "HunyuanVideoPipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": tokenizer(),
            "text_encoder": part("LlamaForCausalLM").model,
            "tokenizer_2": tokenizer(),
            "text_encoder_2": clip(width=32, max_position_embeddings=80),
            "transformer": part("HunyuanVideoTransformer3DModel", text_embed_dim=32, pooled_projection_dim=32),
            "vae": part("AutoencoderKLHunyuanVideo"),
            "scheduler": flow(shift=7.0),
        },
        inputs=lambda: worded(prompt_template={"template": "{}", "crop_start": 0}, max_sequence_length=9, **frames()),
    ),
    "HunyuanVideo15Pipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": tokenizer(),
            "text_encoder": part("Qwen2ForCausalLM").model,
            "tokenizer_2": tokenizer(),
            "text_encoder_2": part("T5EncoderModel", d_model=12),
            "transformer": part("HunyuanVideo15Transformer3DModel", in_channels=9, text_embed_dim=32),
            "vae": part("AutoencoderKLHunyuanVideo15"),
            "scheduler": flow(shift=7.0),
            "guider": inner("guiders", "ClassifierFreeGuidance", guidance_scale=2.0),
        },
        inputs=lambda: worded(**frames()) | {"prompt": 'a cat swims "a cat"'},
        settings={
            "tokenizer_max_length": 9,
            "tokenizer_2_max_length": 9,
            "prompt_template_encode_start_idx": 0,
            "vision_num_semantic_tokens": 9,
        },
    ),
    "MiniMaxH3ModularPipeline": ForeignPipeline(
        parts=lambda: {
            "transformer": part("MiniMaxH3Transformer3DModel"),
            "vae": part("AutoencoderKLMiniMaxH3"),
            "audio_vae": part("AutoencoderKLMiniMaxH3Audio"),
            "scheduler": scheduler("MiniMaxH3Scheduler", shift=12.0),
            "audio_scheduler": scheduler("MiniMaxH3Scheduler", shift=3.0),
        },
        inputs=lambda: {
            "prompt_embeds": normal(1, 9, 16),
            "text_token_tags": torch.ones(9, dtype=torch.long),
            "num_inference_steps": 3,
            **frames(124, 8),
        },
        of_blocks=minimax_h3,
    ),
    "CogVideoXPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("CogVideoXTransformer3DModel"),
            "vae": part("AutoencoderKLCogVideoX"),
            "scheduler": scheduler("CogVideoXDDIMScheduler"),
        },
        inputs=lambda: worded(max_sequence_length=9, **frames(9)),
    ),
    "MochiPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("MochiTransformer3DModel", in_channels=12),
            "vae": part("AutoencoderKLMochi", latent_channels=12, latents_mean=(0.0,) * 12, latents_std=(1.0,) * 12),
            "scheduler": flow(),
        },
        inputs=lambda: worded(max_sequence_length=9, **frames(7)),
    ),
    "LattePipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("LatteTransformer3DModel", out_channels=8),
            "vae": part("AutoencoderKL"),
            "scheduler": scheduler("DDIMScheduler"),
        },
        inputs=lambda: worded(clean_caption=False, video_length=2, **square()),
    ),
    "CosmosTextToWorldPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("CosmosTransformer3DModel"),
            "vae": part("AutoencoderKLCosmos"),
            "scheduler": scheduler("EDMEulerScheduler"),
            "safety_checker": Harmless(),
        },
        inputs=lambda: worded(max_sequence_length=9, **frames(9, 32)),
    ),
    "Kandinsky5T2VPipeline": ForeignPipeline(
        parts=lambda: {
            "text_encoder": None,
            "tokenizer": None,
            "tokenizer_2": tokenizer(),
            "text_encoder_2": clip(),
            "transformer": part("Kandinsky5Transformer3DModel", in_text_dim2=16),
            "vae": part("AutoencoderKLHunyuanVideo"),
            "scheduler": flow(),
        },
        inputs=lambda: {
            "prompt_embeds_qwen": normal(1, 9, 16),
            "prompt_embeds_clip": normal(1, 16),
            "negative_prompt_embeds_qwen": normal(1, 9, 16),
            "negative_prompt_embeds_clip": normal(1, 16),
            "prompt_cu_seqlens": torch.tensor([0, 9], dtype=torch.int32),
            "negative_prompt_cu_seqlens": torch.tensor([0, 9], dtype=torch.int32),
            **frames(5, 32),
        },
    ),
    "StableVideoDiffusionPipeline": ForeignPipeline(
        parts=lambda: {
            "vae": part("AutoencoderKLTemporalDecoder"),
            "image_encoder": part("CLIPVisionModelWithProjection", image_size=224, patch_size=56),
            "unet": part("UNetSpatioTemporalConditionModel"),
            "scheduler": scheduler("EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True),
            "feature_extractor": transformers.CLIPImageProcessorPil(crop_size=32, size=32),
        },
        inputs=lambda: {"image": photograph(), "num_frames": 2, "decode_chunk_size": 1, **square()},
    ),
    # pictures
    "FluxPipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": tokenizer(),
            "text_encoder": clip(width=32),
            "tokenizer_2": tokenizer(),
            "text_encoder_2": part("T5EncoderModel", d_model=16),
            "transformer": part("FluxTransformer2DModel", in_channels=16, pooled_projection_dim=32),
            "vae": part("AutoencoderKL", shift_factor=0.1),
            "scheduler": flow(),
        },
        inputs=lambda: worded(max_sequence_length=9, **square()),
    ),
    "ChromaPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("ChromaTransformer2DModel", in_channels=16),
            "vae": part("AutoencoderKL", shift_factor=0.1),
            "scheduler": flow(),
        },
        inputs=lambda: worded(max_sequence_length=9, **square()),
    ),
    "QwenImagePipeline": ForeignPipeline(
        parts=lambda: {
            "text_encoder": None,
            "tokenizer": None,
            "transformer": part("QwenImageTransformer2DModel", in_channels=16, out_channels=4),
            "vae": part("AutoencoderKLQwenImage"),
            "scheduler": flow(),
        },
        inputs=lambda: {**embedded(mask="prompt_embeds_mask", negative=True), "true_cfg_scale": 2.0, **square()},
    ),
    "StableDiffusion3Pipeline": ForeignPipeline(
        parts=lambda: {
            **{f"tokenizer{at}": tokenizer() for at in ("", "_2", "_3")},
            "text_encoder": clip("CLIPTextModelWithProjection", projection=16),
            "text_encoder_2": clip("CLIPTextModelWithProjection", projection=16),
            "text_encoder_3": part("T5EncoderModel", d_model=32),
            "transformer": part("SD3Transformer2DModel", joint_attention_dim=32, pooled_projection_dim=32),
            "vae": part("AutoencoderKL", shift_factor=0.1),
            "scheduler": flow(),
        },
        inputs=lambda: worded(negative_prompt="badly", max_sequence_length=9, **square()),
    ),
    "StableDiffusionPipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": tokenizer(),
            "text_encoder": clip(width=16),
            "unet": part("UNet2DConditionModel", **_SD_UNET),
            "vae": part("AutoencoderKL"),
            "scheduler": scheduler("DDIMScheduler"),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
        inputs=lambda: worded(**square()),
    ),
    "StableDiffusionXLPipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": tokenizer(),
            "text_encoder": clip(width=16),
            "tokenizer_2": tokenizer(),
            "text_encoder_2": clip("CLIPTextModelWithProjection", projection=8),
            "unet": part("UNet2DConditionModel", **_XL_UNET),
            "vae": part("AutoencoderKL"),
            "scheduler": scheduler("EulerDiscreteScheduler"),
            "add_watermarker": False,
        },
        inputs=lambda: worded(**square()),
    ),
    "SanaPipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "transformer": part("SanaTransformer2DModel"),
            "vae": part("AutoencoderDC"),
            "scheduler": flow(),
        },
        inputs=lambda: {
            **embedded(mask="prompt_attention_mask", negative=True),
            "negative_prompt": None,
            "use_resolution_binning": False,
            **square(32),
        },
    ),
    "Lumina2Pipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "transformer": part("Lumina2Transformer2DModel"),
            "vae": part("AutoencoderKL", shift_factor=0.1),
            "scheduler": flow(),
        },
        inputs=lambda: {**embedded(mask="prompt_attention_mask", negative=True), **square(32)},
    ),
    "PixArtAlphaPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("PixArtTransformer2DModel", out_channels=8),
            "vae": part("AutoencoderKL"),
            "scheduler": scheduler("DDIMScheduler"),
        },
        inputs=lambda: worded(max_sequence_length=9, clean_caption=False, use_resolution_binning=False, **square()),
    ),
    "CogView4Pipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "transformer": part("CogView4Transformer2DModel"),
            "vae": part("AutoencoderKL"),
            "scheduler": flow(),
        },
        inputs=lambda: {**embedded(negative=True), **square()},
    ),
}


def sd_parts(**more: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "text_encoder": clip(width=16),
        "unet": part("UNet2DConditionModel", **_SD_UNET),
        "vae": part("AutoencoderKL"),
        "scheduler": scheduler("DDIMScheduler"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **more,
    }


def flux_parts() -> dict[str, Any]:
    return PIPELINES["FluxPipeline"].parts()


# Others that do what those above do not: begin with a picture or a clip, take a second network beside the first, make
# sound, choose experts.
MORE_PIPELINES: dict[str, ForeignPipeline] = {
    "LTX2Pipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "connectors": inner("pipelines.ltx2", "LTX2TextConnectors", **_CONNECTORS),
            "transformer": part("LTX2VideoTransformer3DModel", **_SOUND_AND_SIGHT),
            "vae": part("AutoencoderKLLTX2Video"),
            "audio_vae": part("AutoencoderKLLTX2Audio"),
            "vocoder": inner("pipelines.ltx2.vocoder", "LTX2Vocoder", **_VOCODER),
            "scheduler": flow(),
        },
        inputs=lambda: {
            **masked(48, mask="prompt_attention_mask"),
            "spatio_temporal_guidance_blocks": [1],
            **frames(5, 32),
        },
    ),
    "HiDreamImagePipeline": ForeignPipeline(
        parts=lambda: {
            **{f"tokenizer{at}": tokenizer() for at in ("", "_2", "_3", "_4")},
            "text_encoder": clip("CLIPTextModelWithProjection", projection=16),
            "text_encoder_2": clip("CLIPTextModelWithProjection", projection=16),
            "text_encoder_3": part("T5EncoderModel", d_model=16),
            "text_encoder_4": part("LlamaForCausalLM"),
            "transformer": part("HiDreamImageTransformer2DModel", **_EXPERTS),
            "vae": part("AutoencoderKL", shift_factor=0.1),
            "scheduler": flow(),
        },
        inputs=lambda: worded(max_sequence_length=9, **square(32)),
        settings={"default_sample_size": 16},
    ),
    "WanVideoToVideoPipeline": ForeignPipeline(
        parts=PIPELINES["WanPipeline"].parts,
        inputs=lambda: worded(video=[photograph()] * 5, max_sequence_length=9, strength=1.0, **square()),
    ),
    "SkyReelsV2DiffusionForcingPipeline": ForeignPipeline(
        parts=PIPELINES["SkyReelsV2Pipeline"].parts,
        inputs=lambda: worded(max_sequence_length=9, base_num_frames=5, **frames()),
    ),
    "LTXImageToVideoPipeline": ForeignPipeline(
        parts=PIPELINES["LTXPipeline"].parts,
        inputs=lambda: worded(image=picture(), max_sequence_length=9, **frames(9, 32)),
    ),
    "CogVideoXImageToVideoPipeline": ForeignPipeline(
        parts=lambda: {
            **PIPELINES["CogVideoXPipeline"].parts(),
            "transformer": part("CogVideoXTransformer3DModel", in_channels=8, out_channels=4),
        },
        inputs=lambda: worded(image=picture(), max_sequence_length=9, **frames(9)),
    ),
    "SanaVideoPipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "transformer": part("SanaVideoTransformer3DModel"),
            "vae": part("AutoencoderKLWan", scale_factor_temporal=2, scale_factor_spatial=2),
            "scheduler": flow(),
        },
        inputs=lambda: {
            **embedded(mask="prompt_attention_mask", negative=True),
            "negative_prompt": None,
            "use_resolution_binning": False,
            "frames": 5,
            **square(32),
        },
    ),
    "AuraFlowPipeline": ForeignPipeline(
        parts=lambda: {
            **t5(),
            "transformer": part("AuraFlowTransformer2DModel"),
            "vae": part("AutoencoderKL"),
            "scheduler": flow(),
        },
        inputs=lambda: worded(max_sequence_length=9, **square()),
    ),
    "ZImagePipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "transformer": part("ZImageTransformer2DModel"),
            "vae": part("AutoencoderKL", shift_factor=0.1),
            "scheduler": flow(),
        },
        inputs=lambda: {
            "prompt_embeds": [normal(9, 16)],
            "negative_prompt_embeds": [normal(9, 16)],
            **square(32),
        },
    ),
    "Flux2Pipeline": ForeignPipeline(
        parts=lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "transformer": part("Flux2Transformer2DModel"),
            "vae": None,
            "scheduler": flow(),
        },
        inputs=lambda: {"prompt_embeds": normal(1, 9, 16), "output_type": "latent", **square(32)},
    ),
    "FluxImg2ImgPipeline": ForeignPipeline(
        parts=flux_parts,
        inputs=lambda: worded(image=picture(), strength=1.0, max_sequence_length=9, **square()),
    ),
    "StableDiffusionImg2ImgPipeline": ForeignPipeline(
        parts=sd_parts, inputs=lambda: worded(image=picture(), strength=1.0)
    ),
    "StableDiffusionControlNetPipeline": ForeignPipeline(
        parts=lambda: sd_parts(controlnet=part("ControlNetModel", cross_attention_dim=16)),
        inputs=lambda: worded(image=picture(), **square()),
    ),
    "LatentConsistencyModelPipeline": ForeignPipeline(
        parts=lambda: sd_parts(
            unet=part("UNet2DConditionModel", **_SD_UNET, time_cond_proj_dim=8), scheduler=scheduler("LCMScheduler")
        ),
        inputs=lambda: worded(**square()),
    ),
    "StableDiffusion3Img2ImgPipeline": ForeignPipeline(
        parts=PIPELINES["StableDiffusion3Pipeline"].parts,
        inputs=lambda: worded(image=picture(), strength=1.0, max_sequence_length=9, **square()),
    ),
    "PixArtSigmaPipeline": ForeignPipeline(
        parts=PIPELINES["PixArtAlphaPipeline"].parts,
        inputs=lambda: worded(max_sequence_length=9, clean_caption=False, use_resolution_binning=False, **square()),
    ),
    "QwenImageImg2ImgPipeline": ForeignPipeline(
        parts=PIPELINES["QwenImagePipeline"].parts,
        inputs=lambda: {**PIPELINES["QwenImagePipeline"].inputs(), "image": picture(), "strength": 1.0},
    ),
    "WanPipeline with two experts": ForeignPipeline(
        parts=lambda: {
            **wan_parts(),
            "transformer": part("WanTransformer3DModel"),
            "transformer_2": part("WanTransformer3DModel"),
            "boundary_ratio": 0.5,
        },
        inputs=lambda: worded(negative_prompt="badly", max_sequence_length=9, **frames()),
    ),
    "StableDiffusionSAGPipeline": ForeignPipeline(parts=sd_parts, inputs=lambda: worded(**square())),
    "SemanticStableDiffusionPipeline": ForeignPipeline(
        parts=sd_parts,
        inputs=lambda: worded(
            editing_prompt=["cat", "badly"],
            reverse_editing_direction=[False, True],
            edit_warmup_steps=[0, 1],
            edit_cooldown_steps=[2, 2],
            edit_threshold=[0.9, 0.9],
            **square(),
        ),
    ),
    "DDPMPipeline": ForeignPipeline(
        parts=lambda: {"unet": part("UNet2DModel"), "scheduler": scheduler("DDPMScheduler")}, inputs=dict
    ),
}
