"""The exceptions that vramkit raises on purpose.

::

    VramkitError
    ├── ConfigError (ValueError)         an option or argument that cannot be used, said before anything is changed
    │   └── PlanInfeasible               no plan fits the budget; names the nearest that does and what binds
    ├── ConflictError (RuntimeError, ValueError)  two mechanisms on one module; names both and the way out
    ├── CheckpointError (ValueError)     a file that is damaged, unsafe or does not fit; names file and tensor
    ├── UnsupportedTensorError (TypeError)  a tensor kind that cannot be taken apart and moved
    ├── TrainingError (RuntimeError)     gradients asked of streamed weights
    ├── ConcurrentUseError (RuntimeError)   two calls inside one offloaded module or pipeline
    ├── RankError (RuntimeError)         another of several ranks has failed, or does something else; names it and the cause
    ├── DecodeMemoryError (torch.OutOfMemoryError)  a decode that does not fit (pipelines.calling.decoding)
    └── StoreError (OSError)             a disk or memory store that could not be written or read

Each message says what was given, what was expected and what to do. What was given may be a file's, and as long as that: a
message keeps its beginning and its end, and loses what is between where it is longer than a terminal shows.
"""

from __future__ import annotations

__all__ = [
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
]


_MOST_CHARACTERS = 1000


class VramkitError(Exception):
    """Base of every error that vramkit raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shortened(each) if isinstance(each, str) else each for each in args))


class ConfigError(VramkitError, ValueError):
    """An option or argument that cannot be used."""


class PlanInfeasible(ConfigError):  # noqa: N818 - it says what the plan is
    """No plan fits the budget. `nearest_bytes` is the smallest budget that does, `binds` what asks for it."""

    def __init__(self, message: str, *, nearest_bytes: int, binds: str) -> None:
        super().__init__(message)
        self.nearest_bytes = nearest_bytes
        self.binds = binds


class ConflictError(VramkitError, RuntimeError, ValueError):
    """Two mechanisms that cannot share one module."""


class CheckpointError(VramkitError, ValueError):
    """A checkpoint that is damaged, unsafe or does not fit the model."""


class UnsupportedTensorError(VramkitError, TypeError):
    """A tensor kind that cannot be taken apart and moved."""


class TrainingError(VramkitError, RuntimeError):
    """Gradients were asked of weights that are streamed."""


class ConcurrentUseError(VramkitError, RuntimeError):
    """Two threads are inside one offloaded module, or two calls inside one pipeline."""


class RankError(VramkitError, RuntimeError):
    """Another of the ranks that work together has failed, or does something else."""


class StoreError(VramkitError, OSError):
    """A store that could not be written or read."""


def shortened(message: str) -> str:
    """Return a message without its middle if it is too long to be read."""
    if len(message) <= _MOST_CHARACTERS:
        return message
    kept = _MOST_CHARACTERS // 2 - 10
    return f"{message[:kept]} [...] {message[-kept:]}"
