"""Group offloading: weights rest in a store and travel through a small ring of device slots, just in time."""

from vramkit.offload.api import ModelOffload, apply_group_offloading, apply_model_offload
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.handle import Offload, OffloadStats, offload_of
from vramkit.offload.mapped import load_mapped

__all__ = [
    "ModelOffload",
    "Offload",
    "OffloadStats",
    "apply_group_offloading",
    "apply_model_offload",
    "load_mapped",
    "offload_of",
    "read_checkpoint",
]
