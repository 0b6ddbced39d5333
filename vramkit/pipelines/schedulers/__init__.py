"""Schedulers of flow-matching models, by their published class names."""

from vramkit.pipelines.schedulers.common import Scheduler, SchedulerConfig, SchedulerOutput
from vramkit.pipelines.schedulers.flow_euler import FlowMatchEulerDiscreteScheduler
from vramkit.pipelines.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "FlowMatchEulerDiscreteScheduler",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
]
