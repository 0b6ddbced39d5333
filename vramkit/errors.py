"""The exceptions that vramkit raises on purpose.

::

    VramkitError
    ├── ConfigError (ValueError)         an option or argument that cannot be used, said before anything is changed
    ├── ConflictError (RuntimeError)     two mechanisms on one module; names both and the way out
    ├── CheckpointError (ValueError)     a file that is damaged, unsafe or does not fit; names file and tensor
    ├── UnsupportedTensorError (TypeError)  a tensor kind that cannot be taken apart and moved
    ├── TrainingError (RuntimeError)     gradients asked of streamed weights
    ├── ConcurrentUseError (RuntimeError)   two threads inside one offloaded module
    └── StoreError (OSError)             a disk or memory store that could not be written or read

Each message says what was given, what was expected and what to do.
"""

__all__ = [
    "CheckpointError",
    "ConcurrentUseError",
    "ConfigError",
    "ConflictError",
    "StoreError",
    "TrainingError",
    "UnsupportedTensorError",
    "VramkitError",
]


class VramkitError(Exception):
    """Base of every error that vramkit raises on purpose."""


class ConfigError(VramkitError, ValueError):
    """An option or argument that cannot be used."""


class ConflictError(VramkitError, RuntimeError):
    """Two mechanisms that cannot share one module."""


class CheckpointError(VramkitError, ValueError):
    """A checkpoint that is damaged, unsafe or does not fit the model."""


class UnsupportedTensorError(VramkitError, TypeError):
    """A tensor kind that cannot be taken apart and moved."""


class TrainingError(VramkitError, RuntimeError):
    """Gradients were asked of weights that are streamed."""


class ConcurrentUseError(VramkitError, RuntimeError):
    """Two threads are inside one offloaded module."""


class StoreError(VramkitError, OSError):
    """A store that could not be written or read."""
