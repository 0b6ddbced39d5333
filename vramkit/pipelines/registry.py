"""Where the classes that checkpoints name are defined: the one table that a new family is added to.

Modules are named, not imported: a pipeline loads the code of its own family only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["MODELS", "PIPELINES", "SCHEDULERS", "TEXT_ENCODERS", "TOKENIZERS"]

_FAMILIES = "vramkit.pipelines"
_SCHEDULERS = "vramkit.pipelines.schedulers"

# Published class name -> the module that defines the class of that name here.
PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "WanPipeline": f"{_FAMILIES}.wan.pipeline",
        "HunyuanVideoPipeline": f"{_FAMILIES}.hunyuan_video.pipeline",
        "LTXPipeline": f"{_FAMILIES}.ltx.pipeline",
        "CogVideoXPipeline": f"{_FAMILIES}.cogvideox.pipeline",
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
