"""What a plan says: plain data, without a tensor or a device, to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from vramkit.errors import ConfigError
from vramkit.planning.reading import read_as

__all__ = ["ALLOWED", "Allowed", "ComponentPlan", "Decode", "PhasePlan", "Plan"]

Allowed = Literal["exact", "bounded", "any"]
ALLOWED: tuple[Allowed, ...] = ("exact", "bounded", "any")
_VERSION = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ComponentPlan:
    """One component. Sizes in bytes."""

    name: str
    phase: str
    granularity: Literal["resident", "block_level", "leaf_level"]
    weight_bytes: int
    """All of its weights and buffers, as they are stored."""
    resident_bytes: int
    """What stays on the device, chosen or because it is too small to travel."""
    chosen_bytes: int = 0
    """What of that was chosen to: `resident=` of apply_group_offloading."""
    streamed_bytes: int = 0
    """What travels in one pass."""
    slots: int = 0
    slot_bytes: int = 0
    unit_bytes: int | None = None
    """The bound given for what travels together; None: what the granularity suggests."""
    activation_bytes: int = 0
    """The most that is alive beside weights while it computes."""
    spare_bytes: int = 0
    """Kept free beside that, for holes that the allocator leaves."""
    table_bytes: int = 0
    """Embeddings that are looked up where they rest."""
    store: str | None = None
    """Where streamed weights rest; None: the fastest that works."""
    shares: bool = False
    """Whether each of several ranks reads a part of what travels, and gives it to the others."""
    wire_dtype: str = "as stored"
    quality_db: float | None = None
    """Signal to noise of weights that are stored in less."""
    pinned_bytes: int = 0
    """Host memory that may be page-locked."""
    host_bytes: int = 0
    """Process memory that its weights take at rest."""
    reason: str = ""

    @property
    def device_bytes(self) -> int:
        """Device memory while it is in use: what stays, and the ring."""
        return self.resident_bytes + self.slots * self.slot_bytes

    @property
    def room_bytes(self) -> int:
        """What all that is held leaves to it while it computes."""
        return self.activation_bytes + self.spare_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PhasePlan:
    """One part of the call."""

    name: str
    components: tuple[str, ...]
    """In the order of their first use."""
    activation_bytes: int
    """The most that is alive beside weights."""
    peak_bytes: int
    seconds: float
    binds: Literal["compute", "link"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """How the autoencoder decodes."""

    mode: Literal["whole", "stripes", "tiles"] = "whole"
    count: int = 1
    """Of stripes."""

    def __str__(self) -> str:
        return f"{self.count} stripes" if self.mode == "stripes" else self.mode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a pipeline runs under a budget."""

    model: str
    device: str
    vram_bytes: int
    ram_bytes: int | None
    allow: Allowed
    call: Mapping[str, Any]
    """What the call is planned to be: numbers as they are, everything else described."""
    components: tuple[ComponentPlan, ...]
    phases: tuple[PhasePlan, ...]
    order: tuple[str, ...]
    """Components as they take turns."""
    before_bytes: int
    """What the call needs before the first of them computes."""
    guidance: Literal["in turn", "paired"] | None
    chunk_tokens: int | None
    decode: Decode | None
    link_gbps: float
    tflops: float
    is_measured: bool
    """Whether link and rate were measured, or assumed."""
    margin_bytes: int
    """Of the budget, kept for what is no tensor."""
    floor_bytes: int
    """The smallest budget that would fit, of the ways that were looked at."""
    next_gib: str
    """What one more GiB would buy."""
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most device memory that tensors take at any time."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of the whole call."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Process memory that weights take at rest."""
        return sum(component.host_bytes for component in self.components)

    @property
    def pinned_bytes(self) -> int:
        """Host memory that may be page-locked."""
        return sum(component.pinned_bytes for component in self.components)

    def component(self, name: str) -> ComponentPlan:
        """Return the plan of one component.

        Raises:
            ConfigError: there is none of that name.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise ConfigError(f"the plan has no component {name!r}; it has {', '.join(c.name for c in self.components)}")

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the plan as JSON, from which `from_json` makes an equal one."""
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: it is no plan, one of another version, or one with keys or values that no plan has.
        """
        try:
            fields = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the text is no plan of vramkit: {error}; give what Plan.to_json() wrote") from error
        if not isinstance(fields, dict) or "version" not in fields:
            raise ConfigError("the text is no plan of vramkit: it has no version; give what Plan.to_json() wrote")
        version = fields.pop("version")
        if version != _VERSION:
            raise ConfigError(f"a plan of version {version!r} was given; this vramkit reads version {_VERSION}")
        return read_as(cls, fields, "the plan")
