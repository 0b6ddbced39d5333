"""vramkit: run PyTorch models that are larger than the memory of the device that computes them.

The names below load what they need when they are first used: importing vramkit imports neither transformers nor a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramkit.lazy import lazy_names

if TYPE_CHECKING:
    from vramkit.casting import apply_layerwise_casting
    from vramkit.errors import (
        CheckpointError,
        ConcurrentUseError,
        ConfigError,
        ConflictError,
        PlanInfeasible,
        RankError,
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
        parameters_on_meta,
    )
    from vramkit.pipelines import (
        AutoencoderKLCogVideoX,
        AutoencoderKLHunyuanVideo,
        AutoencoderKLLTXVideo,
        AutoencoderKLWan,
        AutoModel,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
        DecodeMemoryError,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
        LTXConditionPipeline,
        LTXImageToVideoPipeline,
        LTXPipeline,
        LTXVideoCondition,
        LTXVideoTransformer3DModel,
        Pipeline,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
        export_to_video,
        load_image,
        load_video,
    )
    from vramkit.planning import Fit, Plan, fit, plan
    from vramkit.quant import PipelineQuantizationConfig, quantize
    from vramkit.timeline import MemoryTimeline
    from vramkit.tracing import trace

__version__ = "0.1.0"

_HOMES = {
    "vramkit.casting": ("apply_layerwise_casting",),
    "vramkit.errors": (
        "CheckpointError",
        "ConcurrentUseError",
        "ConfigError",
        "ConflictError",
        "PlanInfeasible",
        "RankError",
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
        "parameters_on_meta",
    ),
    "vramkit.pipelines": (
        "AutoModel",
        "AutoencoderKLCogVideoX",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLLTXVideo",
        "AutoencoderKLWan",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        "DecodeMemoryError",
        "FlowMatchEulerDiscreteScheduler",
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        "LTXConditionPipeline",
        "LTXImageToVideoPipeline",
        "LTXPipeline",
        "LTXVideoCondition",
        "LTXVideoTransformer3DModel",
        "Pipeline",
        "UniPCMultistepScheduler",
        "WanImageToVideoPipeline",
        "WanPipeline",
        "WanTransformer3DModel",
        "export_to_video",
        "load_image",
        "load_video",
    ),
    "vramkit.planning": (
        "Fit",
        "Plan",
        "fit",
        "plan",
    ),
    "vramkit.quant": (
        "PipelineQuantizationConfig",
        "quantize",
    ),
    "vramkit.timeline": ("MemoryTimeline",),
    "vramkit.tracing": ("trace",),
}

__all__ = [
    "AutoModel",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLWan",
    "CheckpointError",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXTransformer3DModel",
    "ConcurrentUseError",
    "ConfigError",
    "ConflictError",
    "DecodeMemoryError",
    "Fit",
    "FlowMatchEulerDiscreteScheduler",
    "HunyuanVideoPipeline",
    "HunyuanVideoTransformer3DModel",
    "LTXConditionPipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
    "LTXVideoCondition",
    "LTXVideoTransformer3DModel",
    "MemoryTimeline",
    "Offload",
    "OffloadStats",
    "Pipeline",
    "PipelineQuantizationConfig",
    "Plan",
    "PlanInfeasible",
    "RankError",
    "StoreError",
    "TrainingError",
    "UniPCMultistepScheduler",
    "UnsupportedTensorError",
    "VramkitError",
    "WanImageToVideoPipeline",
    "WanPipeline",
    "WanTransformer3DModel",
    "__version__",
    "apply_group_offloading",
    "apply_layerwise_casting",
    "apply_model_offload",
    "export_to_video",
    "fit",
    "load_image",
    "load_mapped",
    "load_video",
    "offload_of",
    "parameters_on_meta",
    "plan",
    "quantize",
    "trace",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
