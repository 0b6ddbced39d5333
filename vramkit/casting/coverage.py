"""How much of a module is stored in fewer bits, and what was left: by name, size and reason."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from vramkit.casting.weights import Reason, Weight
from vramkit.memory import format_bytes, tensor_bytes
from vramkit.tensors import is_plain

__all__ = ["Coverage", "CoverageWarning", "LeftWeight", "count", "warn_if_little"]

_NAMED = 3  # names of a kind that are printed


class CoverageWarning(UserWarning):
    """Most of a module was left as it was, because its weights are of kinds that are not taken."""


@dataclasses.dataclass(frozen=True, slots=True)
class LeftWeight:
    """A floating parameter that stays as it was."""

    name: str
    size_bytes: int
    reason: Reason


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """What of the floating parameters of a module is stored in fewer bits; tied ones count once. ``str()`` says it all."""

    covered: tuple[str, ...]
    """Names of the parameters that are."""
    covered_bytes: int
    """What they took before, in the dtype that they compute in."""
    stored_bytes: int
    """What they take now."""
    left: tuple[LeftWeight, ...]
    """The others, largest first."""

    @property
    def left_bytes(self) -> int:
        """Bytes of the others."""
        return sum(weight.size_bytes for weight in self.left)

    @property
    def total_bytes(self) -> int:
        """Bytes of all, before."""
        return self.covered_bytes + self.left_bytes

    @property
    def share(self) -> float:
        """Covered bytes of all, from 0 to 1."""
        return self.covered_bytes / max(1, self.total_bytes)

    @property
    def unknown_bytes(self) -> int:
        """Bytes that were left only because nobody knows, or no kernel takes, what they are."""
        return sum(weight.size_bytes for weight in self.left if weight.reason in (Reason.KIND, Reason.BACKEND))

    def __str__(self) -> str:
        covered, total, stored = map(format_bytes, (self.covered_bytes, self.total_bytes, self.stored_bytes))
        lines = [f"{covered} of {total} covered ({self.share:.0%}), stored in {stored}"]
        for reason in Reason:
            some = [weight for weight in self.left if weight.reason is reason]
            if some:
                size = format_bytes(sum(weight.size_bytes for weight in some))
                lines.append(f"left, {reason.value}: {size} ({_largest(some)})")
        return "\n".join(lines)


def count(weights: Iterable[Weight], reasons: Mapping[str, Reason | None]) -> Coverage:
    """Count the parameters of a module as they are now; `reasons` say why a plain one is, by name."""
    seen: set[int] = set()
    covered: list[str] = []
    covered_bytes = stored_bytes = 0
    left: list[LeftWeight] = []
    for weight in weights:
        parameter = weight.parameter
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if is_plain(parameter):
            left.append(LeftWeight(weight.name, parameter.nbytes, reasons[weight.name] or Reason.UNTOUCHED))
            continue
        covered.append(weight.name)
        covered_bytes += parameter.numel() * parameter.dtype.itemsize
        stored_bytes += tensor_bytes(parameter)
    left.sort(key=lambda weight: -weight.size_bytes)
    return Coverage(tuple(covered), covered_bytes, stored_bytes, tuple(left))


def warn_if_little(module: nn.Module, coverage: Coverage, *, stacklevel: int) -> None:
    """Warn, once per call, where more than half was left because of what it is."""
    if 2 * coverage.unknown_bytes <= coverage.total_bytes:
        return
    unknown = [weight for weight in coverage.left if weight.reason in (Reason.KIND, Reason.BACKEND)]
    warnings.warn(
        f"{type(module).__name__}: {format_bytes(coverage.covered_bytes)} of {format_bytes(coverage.total_bytes)} are "
        f"covered; {format_bytes(coverage.unknown_bytes)} are left as they were, because their kinds are not taken: "
        f"{_largest(unknown)}",
        CoverageWarning,
        stacklevel=stacklevel + 1,
    )


def _largest(weights: Iterable[LeftWeight]) -> str:
    """Name the largest, those that differ only by the numbers in their names as one."""
    sizes: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for weight in weights:
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", weight.name)
        sizes[kind] += weight.size_bytes
        names.setdefault(kind, []).append(weight.name)
    named = [
        f"{f'{len(names[kind])} x {kind}' if len(names[kind]) > 1 else names[kind][0]}, {format_bytes(size)}"
        for kind, size in sizes.most_common(_NAMED)
    ]
    return "; ".join([*named, f"and {len(sizes) - _NAMED} more"] if len(sizes) > _NAMED else named)
