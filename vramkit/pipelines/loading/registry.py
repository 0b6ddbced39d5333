"""Where the classes that checkpoints name are defined: the one table that a new family is added to.

Modules are named, not imported: a pipeline loads the code of its own family only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = [
    "IMAGE_ENCODERS",
    "IMAGE_PIPELINES",
    "IMAGE_PROCESSORS",
    "MODELS",
    "PIPELINES",
    "SCHEDULERS",
    "TEXT_ENCODERS",
    "TOKENIZERS",
    "published_rest",
]

_FAMILIES = "vramkit.pipelines"
_SCHEDULERS = "vramkit.pipelines.schedulers"

# Published class name -> the module that defines the class of that name here.
PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "WanPipeline": f"{_FAMILIES}.wan.pipeline",
        "WanImageToVideoPipeline": f"{_FAMILIES}.wan.image_to_video",
        "HunyuanVideoPipeline": f"{_FAMILIES}.hunyuan_video.pipeline",
        "LTXPipeline": f"{_FAMILIES}.ltx.pipeline",
        "LTXImageToVideoPipeline": f"{_FAMILIES}.ltx.image_to_video",
        "LTXConditionPipeline": f"{_FAMILIES}.ltx.condition",
        "CogVideoXPipeline": f"{_FAMILIES}.cogvideox.pipeline",
        "CogVideoXImageToVideoPipeline": f"{_FAMILIES}.cogvideox.image_to_video",
    }
)
# The class that makes clips of an image with the folders of another one.
IMAGE_PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "WanPipeline": "WanImageToVideoPipeline",
        "LTXPipeline": "LTXImageToVideoPipeline",
    }
)
# The repository that single files of a pipeline take their other components from: see `published_rest`.
_PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        "WanPipeline": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "WanImageToVideoPipeline": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "HunyuanVideoPipeline": "hunyuanvideo-community/HunyuanVideo",
        "LTXPipeline": "Lightricks/LTX-Video",
        "LTXImageToVideoPipeline": "Lightricks/LTX-Video",
        "LTXConditionPipeline": "Lightricks/LTX-Video",
        "CogVideoXPipeline": "THUDM/CogVideoX-5b",
        "CogVideoXImageToVideoPipeline": "THUDM/CogVideoX-5b-I2V",
    }
)
# What a transformer's config says of variants that come with other components than the published ones above.
_VARIANTS: Mapping[str, tuple[Mapping[str, int], str]] = MappingProxyType(
    {
        "WanPipeline": ({"in_channels": 48}, "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        "WanImageToVideoPipeline": ({"in_channels": 48}, "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        "CogVideoXPipeline": ({"num_attention_heads": 30}, "THUDM/CogVideoX-2b"),
    }
)
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "WanTransformer3DModel": f"{_FAMILIES}.wan.transformer",
        "AutoencoderKLWan": f"{_FAMILIES}.wan.vae",
        "HunyuanVideoTransformer3DModel": f"{_FAMILIES}.hunyuan_video.transformer",
        "AutoencoderKLHunyuanVideo": f"{_FAMILIES}.hunyuan_video.vae",
        "LTXVideoTransformer3DModel": f"{_FAMILIES}.ltx.transformer",
        "AutoencoderKLLTXVideo": f"{_FAMILIES}.ltx.vae",
        "CogVideoXTransformer3DModel": f"{_FAMILIES}.cogvideox.transformer",
        "AutoencoderKLCogVideoX": f"{_FAMILIES}.cogvideox.vae",
    }
)
SCHEDULERS: Mapping[str, str] = MappingProxyType(
    {
        "UniPCMultistepScheduler": f"{_SCHEDULERS}.unipc",
        "FlowMatchEulerDiscreteScheduler": f"{_SCHEDULERS}.flow_euler",
        "CogVideoXDDIMScheduler": f"{_SCHEDULERS}.cogvideox_ddim",
        "CogVideoXDPMScheduler": f"{_SCHEDULERS}.cogvideox_dpm",
    }
)

# Classes of transformers that checkpoints may name.
TEXT_ENCODERS = frozenset({"UMT5EncoderModel", "T5EncoderModel", "LlamaModel", "CLIPTextModel"})
IMAGE_ENCODERS = frozenset({"CLIPVisionModel", "CLIPVisionModelWithProjection"})
IMAGE_PROCESSORS = frozenset({"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"})
TOKENIZERS = frozenset(
    {
        "T5Tokenizer",
        "T5TokenizerFast",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        # What any tokenizer.json is loaded as whose own class would read it in another way, by version of transformers.
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    }
)


def published_rest(pipeline: str, transformer: Mapping[str, Any]) -> str | None:
    """Return the repository that a single file takes its other components from, by the config of its transformer."""
    told, variant = _VARIANTS.get(pipeline, ({}, ""))
    is_variant = variant and all(transformer.get(name) == value for name, value in told.items())
    return variant if is_variant else _PUBLISHED.get(pipeline)
