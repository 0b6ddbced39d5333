"""vramkit: run PyTorch models that are larger than the memory of the device that computes them.

The names below load what they need when they are first used: importing vramkit imports neither transformers nor a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vramkit.casting import apply_layerwise_casting
    from vramkit.errors import (
        CheckpointError,
        ConcurrentUseError,
        ConfigError,
        ConflictError,
        StoreError,
        TrainingError,
        UnsupportedTensorError,
        VramkitError,
    )
    from vramkit.offload import (
        Offload,
        OffloadStats,
        apply_group_offloading,
        apply_model_offload,
        load_mapped,
        offload_of,
    )
    from vramkit.pipelines.cogvideox.pipeline import CogVideoXPipeline
    from vramkit.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
    from vramkit.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
    from vramkit.pipelines.hunyuan_video.pipeline import HunyuanVideoPipeline
    from vramkit.pipelines.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
    from vramkit.pipelines.hunyuan_video.vae import AutoencoderKLHunyuanVideo
    from vramkit.pipelines.ltx.pipeline import LTXPipeline
    from vramkit.pipelines.ltx.transformer import LTXVideoTransformer3DModel
    from vramkit.pipelines.ltx.vae import AutoencoderKLLTXVideo
    from vramkit.pipelines.modeling import AutoModel
    from vramkit.pipelines.pipeline import Pipeline
    from vramkit.pipelines.schedulers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )
    from vramkit.pipelines.video import export_to_video, load_image
    from vramkit.pipelines.wan.pipeline import WanPipeline
    from vramkit.pipelines.wan.transformer import WanTransformer3DModel
    from vramkit.pipelines.wan.vae import AutoencoderKLWan
    from vramkit.quant import PipelineQuantizationConfig, quantize
    from vramkit.trace import MemoryTimeline

__version__ = "0.1.0"

_HOMES = {
    "vramkit.casting": ("apply_layerwise_casting",),
    "vramkit.errors": (
        "CheckpointError",
        "ConcurrentUseError",
        "ConfigError",
        "ConflictError",
        "StoreError",
        "TrainingError",
        "UnsupportedTensorError",
        "VramkitError",
    ),
    "vramkit.offload": (
        "Offload",
        "OffloadStats",
        "apply_group_offloading",
        "apply_model_offload",
        "load_mapped",
        "offload_of",
    ),
    "vramkit.pipelines.cogvideox.pipeline": ("CogVideoXPipeline",),
    "vramkit.pipelines.cogvideox.transformer": ("CogVideoXTransformer3DModel",),
    "vramkit.pipelines.cogvideox.vae": ("AutoencoderKLCogVideoX",),
    "vramkit.pipelines.hunyuan_video.pipeline": ("HunyuanVideoPipeline",),
    "vramkit.pipelines.hunyuan_video.transformer": ("HunyuanVideoTransformer3DModel",),
    "vramkit.pipelines.hunyuan_video.vae": ("AutoencoderKLHunyuanVideo",),
    "vramkit.pipelines.ltx.pipeline": ("LTXPipeline",),
    "vramkit.pipelines.ltx.transformer": ("LTXVideoTransformer3DModel",),
    "vramkit.pipelines.ltx.vae": ("AutoencoderKLLTXVideo",),
    "vramkit.pipelines.modeling": ("AutoModel",),
    "vramkit.pipelines.pipeline": ("Pipeline",),
    "vramkit.pipelines.schedulers": (
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ),
    "vramkit.pipelines.video": (
        "export_to_video",
        "load_image",
    ),
    "vramkit.pipelines.wan.pipeline": ("WanPipeline",),
    "vramkit.pipelines.wan.transformer": ("WanTransformer3DModel",),
    "vramkit.pipelines.wan.vae": ("AutoencoderKLWan",),
    "vramkit.quant": (
        "PipelineQuantizationConfig",
        "quantize",
    ),
    "vramkit.trace": ("MemoryTimeline",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AutoModel",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLWan",
    "CheckpointError",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXPipeline",
    "CogVideoXTransformer3DModel",
    "ConcurrentUseError",
    "ConfigError",
    "ConflictError",
    "FlowMatchEulerDiscreteScheduler",
    "HunyuanVideoPipeline",
    "HunyuanVideoTransformer3DModel",
    "LTXPipeline",
    "LTXVideoTransformer3DModel",
    "MemoryTimeline",
    "Offload",
    "OffloadStats",
    "Pipeline",
    "PipelineQuantizationConfig",
    "StoreError",
    "TrainingError",
    "UniPCMultistepScheduler",
    "UnsupportedTensorError",
    "VramkitError",
    "WanPipeline",
    "WanTransformer3DModel",
    "__version__",
    "apply_group_offloading",
    "apply_layerwise_casting",
    "apply_model_offload",
    "export_to_video",
    "load_image",
    "load_mapped",
    "offload_of",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vramkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
