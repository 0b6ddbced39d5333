"""Reference pipelines: models written lean, checkpoints loaded mapped, one folder per model family.

The names below load the code of their own family when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramkit.lazy import lazy_names

if TYPE_CHECKING:
    from vramkit.pipelines.calling.decoding import DecodeMemoryError
    from vramkit.pipelines.calling.pipeline import Pipeline
    from vramkit.pipelines.calling.video import export_to_video, load_image, load_video
    from vramkit.pipelines.cogvideox.image_to_video import CogVideoXImageToVideoPipeline
    from vramkit.pipelines.cogvideox.pipeline import CogVideoXPipeline
    from vramkit.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
    from vramkit.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
    from vramkit.pipelines.hunyuan_video.pipeline import HunyuanVideoPipeline
    from vramkit.pipelines.hunyuan_video.transformer import HunyuanVideoTransformer3DModel
    from vramkit.pipelines.hunyuan_video.vae import AutoencoderKLHunyuanVideo
    from vramkit.pipelines.loading.auto_model import AutoModel
    from vramkit.pipelines.ltx.condition import LTXConditionPipeline, LTXVideoCondition
    from vramkit.pipelines.ltx.image_to_video import LTXImageToVideoPipeline
    from vramkit.pipelines.ltx.pipeline import LTXPipeline
    from vramkit.pipelines.ltx.transformer import LTXVideoTransformer3DModel
    from vramkit.pipelines.ltx.vae import AutoencoderKLLTXVideo
    from vramkit.pipelines.schedulers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )
    from vramkit.pipelines.wan.image_to_video import WanImageToVideoPipeline
    from vramkit.pipelines.wan.pipeline import WanPipeline
    from vramkit.pipelines.wan.transformer import WanTransformer3DModel
    from vramkit.pipelines.wan.vae import AutoencoderKLWan

_HOMES = {
    "vramkit.pipelines.cogvideox.image_to_video": ("CogVideoXImageToVideoPipeline",),
    "vramkit.pipelines.cogvideox.pipeline": ("CogVideoXPipeline",),
    "vramkit.pipelines.cogvideox.transformer": ("CogVideoXTransformer3DModel",),
    "vramkit.pipelines.cogvideox.vae": ("AutoencoderKLCogVideoX",),
    "vramkit.pipelines.hunyuan_video.pipeline": ("HunyuanVideoPipeline",),
    "vramkit.pipelines.hunyuan_video.transformer": ("HunyuanVideoTransformer3DModel",),
    "vramkit.pipelines.hunyuan_video.vae": ("AutoencoderKLHunyuanVideo",),
    "vramkit.pipelines.ltx.condition": ("LTXConditionPipeline", "LTXVideoCondition"),
    "vramkit.pipelines.ltx.image_to_video": ("LTXImageToVideoPipeline",),
    "vramkit.pipelines.ltx.pipeline": ("LTXPipeline",),
    "vramkit.pipelines.ltx.transformer": ("LTXVideoTransformer3DModel",),
    "vramkit.pipelines.ltx.vae": ("AutoencoderKLLTXVideo",),
    "vramkit.pipelines.loading.auto_model": ("AutoModel",),
    "vramkit.pipelines.calling.decoding": ("DecodeMemoryError",),
    "vramkit.pipelines.calling.pipeline": ("Pipeline",),
    "vramkit.pipelines.schedulers": (
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ),
    "vramkit.pipelines.calling.video": (
        "export_to_video",
        "load_image",
        "load_video",
    ),
    "vramkit.pipelines.wan.image_to_video": ("WanImageToVideoPipeline",),
    "vramkit.pipelines.wan.pipeline": ("WanPipeline",),
    "vramkit.pipelines.wan.transformer": ("WanTransformer3DModel",),
    "vramkit.pipelines.wan.vae": ("AutoencoderKLWan",),
}

__all__ = [
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
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
