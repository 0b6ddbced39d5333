"""What vramkit exports, and what importing it must not import."""

import subprocess
import sys

import vramkit

PUBLIC = {
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
    "load_video",
    "load_mapped",
    "offload_of",
    "parameters_on_meta",
    "plan",
    "quantize",
    "trace",
}
HEAVY = ("accelerate", "bitsandbytes", "diffusers", "matplotlib", "optimum", "torch._dynamo", "transformers")


def test_exported_names():
    assert set(vramkit.__all__) == PUBLIC
    assert all(getattr(vramkit, name) is not None for name in PUBLIC)
    assert set(dir(vramkit)) >= PUBLIC


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(vramkit, "no_such_name")


def test_import_loads_nothing_heavy():
    code = f"import sys, vramkit, vramkit.offload, vramkit.casting; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
