"""Schedulers of flow-matching and diffusion models, by their published class names."""

from vramkit.pipelines.schedulers.cogvideox_ddim import CogVideoXDDIMScheduler
from vramkit.pipelines.schedulers.cogvideox_dpm import CogVideoXDPMScheduler
from vramkit.pipelines.schedulers.common import Scheduler, SchedulerConfig, SchedulerOutput
from vramkit.pipelines.schedulers.flow_euler import FlowMatchEulerDiscreteScheduler
from vramkit.pipelines.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
]
