"""Group offloading: weights rest in a store and travel through a small ring of device slots, just in time."""

from vramkit.offload.api import ModelOffload, apply_group_offloading, apply_model_offload
from vramkit.offload.checkpoint import read_checkpoint
from vramkit.offload.construction import parameters_on_meta
from vramkit.offload.handle import Offload
from vramkit.offload.mapped import load_mapped
from vramkit.offload.offloaded import offload_of
from vramkit.offload.pinning import PinBudget
from vramkit.offload.stats import OffloadStats
from vramkit.offload.turns import Turns

__all__ = [
    "ModelOffload",
    "Offload",
    "OffloadStats",
    "PinBudget",
    "Turns",
    "apply_group_offloading",
    "apply_model_offload",
    "load_mapped",
    "offload_of",
    "parameters_on_meta",
    "read_checkpoint",
]
