"""Calls of an offloaded module that are refused for how they are made, whatever its weights are."""

from __future__ import annotations

import os

import torch
from torch import nn

from vramkit.errors import ConcurrentUseError, ConflictError, TrainingError

__all__ = ["refuse_fork", "refuse_tracing", "refuse_training"]


def refuse_fork(module: nn.Module, process: int) -> None:
    """Raise ConcurrentUseError in a process that is a fork of the one where `module` was offloaded."""
    if os.getpid() != process:
        raise ConcurrentUseError(
            f"{type(module).__name__} was offloaded in process {process}, of which this one is a fork: the "
            "threads that load weights stayed there. Call remove() on its handle here and apply it again, or start "
            "processes with multiprocessing's 'spawn' and load the model in each"
        )


def refuse_tracing(module: nn.Module) -> None:
    """Raise ConflictError where torch records the call, to make a program of it."""
    is_traced = torch._C._get_tracing_state() is not None  # noqa: SLF001 (`torch.jit.is_tracing` costs an import of it)
    is_exported = getattr(torch.compiler, "is_exporting", bool)()  # since torch 2.7
    if is_traced or is_exported:
        raise ConflictError(
            f"{type(module).__name__} is offloaded and is being traced by torch.jit or torch.export, which would "
            "keep slots for weights; trace it before it is offloaded, or inside `with offload_of(module).edit():`"
        )


def refuse_training(module: nn.Module) -> None:
    """Raise TrainingError where the call would be the forward of a training step."""
    if module.training and torch.is_grad_enabled():
        raise TrainingError(
            f"{type(module).__name__} is offloaded and in training mode with gradients on; streamed weights are "
            "overwritten before a backward could use them. Call it under torch.no_grad() (or .eval()), or remove() first"
        )
