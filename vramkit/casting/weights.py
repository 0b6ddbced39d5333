"""The floating parameters of a module: what each is to its layer, and why one is left as it is.

Casting and quantization take what they can of this list; `coverage` counts the rest.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from vramkit.errors import ConfigError

__all__ = [
    "CONVOLUTIONS",
    "Reason",
    "Role",
    "Skips",
    "Weight",
    "label_of",
    "owner_of",
    "reasons_to_leave",
    "shared_dims",
    "weights_of",
]

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Classes whose weights are kernels."""
# Classes of other libraries that call F.linear or x @ weight.t(), by name, so that none of them is imported.
_PARALLEL_LINEAR = {
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "MergedReplicatedLinear",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
}
_TURNED_LINEAR = {"Conv1D"}  # transformers': weight [in, out]
_LEAST_EXTENT = 16  # of the matrices of a stack: what is smaller is a kernel of a convolution, or a table of few rows


class Role(enum.Enum):
    """What a parameter is to the layer that owns it."""

    MATRIX = "matrix [out, in]"
    TURNED = "matrix [in, out]"
    STACK = "stack of matrices [n, rows, columns]"
    KERNEL = "kernel of a convolution"
    TABLE = "embedding table"
    VECTOR = "vector"
    OTHER = "parameter of a class that is not known"


class Reason(enum.Enum):
    """Why a parameter is left as it is."""

    SKIPPED = "skipped by name or class"
    ADAPTER = "adapters"
    WRITTEN = "tables that their layers write to (max_norm)"
    VECTOR = "vectors"
    TABLE = "embedding tables"
    KIND = "of kinds that are not known"
    BACKEND = "of kinds that the backend does not take"
    UNTOUCHED = "not quantized or cast"


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One floating parameter, found by its owner: the tensor itself may be replaced and is not held."""

    name: str
    """As in ``named_parameters()``."""
    owner: nn.Module
    key: str
    role: Role
    left: Reason | None
    """Why nobody may touch it; None where its role decides."""

    @property
    def parameter(self) -> nn.Parameter:
        """What the owner has now."""
        found = getattr(self.owner, self.key)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def label(self) -> str:
        """The name of the layer for its ``weight``, else that of the parameter."""
        return label_of(self.name)


@dataclasses.dataclass(frozen=True, slots=True)
class Skips:
    """Which modules are left alone, with all that is below them."""

    patterns: tuple[re.Pattern[str], ...] = ()
    classes: tuple[type[nn.Module], ...] = ()

    @classmethod
    def of(cls, option: str, patterns: Sequence[str], classes: Sequence[type[nn.Module]] = ()) -> Skips:
        """Compile regular expressions, which are searched in names.

        Raises:
            ConfigError: one is none; names the `option`.
        """
        try:
            return cls(tuple(re.compile(pattern) for pattern in patterns), tuple(classes))
        except re.error as error:
            raise ConfigError(f"{option}={list(patterns)!r} is not a regular expression: {error}") from error

    def name(self, name: str) -> bool:
        """Tell if a module, or a parameter that stands for a layer, is skipped by its name."""
        return any(pattern.search(name) for pattern in self.patterns if name)


def weights_of(module: nn.Module, skips: Skips) -> Iterator[Weight]:
    """Walk the floating parameters of `module`, each module once."""
    seen: set[nn.Module] = set()  # a layer that stands in two places is one

    def walk(part: nn.Module, name: str, left: Reason | None) -> Iterator[Weight]:
        if part in seen:
            return
        seen.add(part)
        if left is None and (skips.name(name) or isinstance(part, skips.classes)):
            left = Reason.SKIPPED
        for key, parameter in part.named_parameters(recurse=False):
            if parameter.is_floating_point():
                yield _weight(f"{name}.{key}" if name else key, part, key, left, skips)
        has_adapters = hasattr(part, "base_layer")  # PEFT's, which are added to what the base layer computes
        for child_name, child in part.named_children():
            reason = Reason.ADAPTER if has_adapters and child_name != "base_layer" else left
            yield from walk(child, f"{name}.{child_name}" if name else child_name, reason)

    yield from walk(module, "", None)


def reasons_to_leave(
    weights: Sequence[Weight], reason_of: Callable[[Weight], Reason | None]
) -> dict[str, Reason | None]:
    """Decide by name: what one of its owners leaves, the others leave too, so that tied parameters stay tied."""
    reasons = {weight.name: reason_of(weight) for weight in weights}
    left = {id(weight.parameter): reason for weight in weights if (reason := reasons[weight.name]) is not None}
    return {weight.name: reasons[weight.name] or left.get(id(weight.parameter)) for weight in weights}


def owner_of(module: nn.Module, label: str) -> tuple[nn.Module, str]:
    """Return the module and the name of its parameter that a `Weight.label` stands for."""
    path, _, key = label.rpartition(".")
    parent = module.get_submodule(path)
    if not label:
        return module, "weight"
    found = getattr(parent, key)
    return (found, "weight") if isinstance(found, nn.Module) else (parent, key)


def label_of(name: str) -> str:
    """Return the name of the layer for the name of its ``weight``, else that name."""
    path, _, key = name.rpartition(".")
    return path if key == "weight" else name


def shared_dims(role: Role, ndim: int) -> tuple[int, ...]:
    """Return the dimensions over which numbers share a scale: what is summed over, in stacks the last (either may be)."""
    if role is Role.TURNED:
        return (0,)
    return tuple(range(2 if role is Role.STACK else 1, ndim)) or (0,)


def _weight(name: str, owner: nn.Module, key: str, left: Reason | None, skips: Skips) -> Weight:
    role = _role(owner, key)
    if left is None and role is Role.TABLE and getattr(owner, "max_norm", None) is not None:
        left = Reason.WRITTEN
    if left is None and role is Role.STACK and skips.name(name):
        left = Reason.SKIPPED
    return Weight(name, owner, key, role, left)


def _role(owner: nn.Module, key: str) -> Role:
    parameter = getattr(owner, key)
    if parameter.ndim < 2:
        return Role.VECTOR
    if isinstance(owner, CONVOLUTIONS):
        return Role.KERNEL
    if isinstance(owner, nn.Embedding):
        return Role.TABLE
    names = {kind.__name__ for kind in type(owner).__mro__}
    is_weight = key == "weight" and parameter.ndim == 2
    if isinstance(owner, nn.Linear) or (is_weight and names & _PARALLEL_LINEAR):
        return Role.MATRIX
    if is_weight and names & _TURNED_LINEAR:
        return Role.TURNED
    return Role.STACK if _is_stack(owner, parameter) else Role.OTHER


def _is_stack(owner: nn.Module, parameter: torch.Tensor) -> bool:
    """Tell whether a parameter is fused experts: several matrices, in a module that is none of torch's."""
    if parameter.ndim != 3 or type(owner).__module__.startswith("torch.nn."):
        return False
    return parameter.shape[0] > 1 and min(parameter.shape[1:]) >= _LEAST_EXTENT
