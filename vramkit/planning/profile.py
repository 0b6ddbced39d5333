"""What a call needs, counted without weights or a device: sizes of units, live bytes and work, part by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from vramkit.memory import module_bytes
from vramkit.offload.assembly import footprints, streaming
from vramkit.offload.config import OffloadConfig
from vramkit.offload.partition import slot_bytes_for
from vramkit.planning.components import Component
from vramkit.planning.features import Settings
from vramkit.planning.holes import NO_ROOM, Room, room_for
from vramkit.planning.ledger import Segment
from vramkit.planning.narrowing import Stored

_SLOTS = (3, 2, 1)  # at leaf level, where units are formed for so many

__all__ = ["ComponentProfile", "Cut", "Profile", "Variant", "Work", "component_profile"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One way to cut a component into units. Sizes in bytes."""

    granularity: Literal["block_level", "leaf_level"]
    slots: int
    unit_bytes: int | None
    sizes: tuple[int, ...]
    fixed_bytes: int
    table_bytes: int
    whole_bytes: int
    _placed: dict[int, tuple[int, int, int]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def config(self, chosen_bytes: int = 0) -> OffloadConfig:
        """Return it as options of offloading; the device does not matter to sizes."""
        return OffloadConfig(
            device=torch.device("cpu"),
            granularity=self.granularity,
            slots=self.slots,
            unit_bytes=self.unit_bytes,
            resident_bytes=chosen_bytes,
        )

    def placed(self, chosen_bytes: int) -> tuple[int, int, int]:
        """Return what stays on the device, what streams, and the size of a slot, if `chosen_bytes` are to stay.

        Units are formed anew once it is known how they run, so what stays is not counted by these units, but by what may.
        """
        if chosen_bytes not in self._placed:  # a search asks again and again
            streams = streaming(self.sizes, self.config(chosen_bytes))
            travelling = [size for size, does in zip(self.sizes, streams, strict=True) if does]
            slot_bytes = slot_bytes_for(travelling, self.slots)
            streamed = self.fixed_bytes + chosen_bytes, sum(travelling), slot_bytes
            self._placed[chosen_bytes] = streamed if travelling else (self.whole_bytes, 0, 0)
        return self._placed[chosen_bytes]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ComponentProfile:
    """One component, its weights stored in one way."""

    name: str
    phase: str
    weight_bytes: int
    cuts: tuple[Cut, ...]
    is_in_files: bool = True
    """Whether its weights are views of files, which take no process memory."""
    wire_dtype: str = "as stored"
    quality_db: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one component does in one part of the call."""

    phase: str
    component: str
    activation_bytes: int
    """The most that is alive beside weights while it computes, other components' results included."""
    calls: int
    flops: int
    """Of all calls."""
    turns: int
    """How many times it begins after another component."""
    holes: Room = NO_ROOM
    """Kept free beside activations: the allocator leaves holes between them."""

    @property
    def room_bytes(self) -> int:
        """What weights have to leave to it."""
        return self.activation_bytes + self.holes.needed_bytes

    @property
    def ample_bytes(self) -> int:
        """What weights leave to it that could as well travel: where holes are filled all the time, the device waits."""
        return self.activation_bytes + self.holes.ample_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to make the call."""

    settings: Settings
    works: tuple[Work, ...]

    @property
    def decode_bytes(self) -> int:
        """The most activations of a decode, or of all where there is none."""
        decodes = [work.activation_bytes for work in self.works if work.phase == "decode"]
        return max(decodes or [work.activation_bytes for work in self.works], default=0)

    def with_more(self, more: Mapping[str, int]) -> Variant:
        """Return the same with so many bytes more of activations, by component."""
        works = [
            dataclasses.replace(work, activation_bytes=work.activation_bytes + more.get(work.component, 0))
            for work in self.works
        ]
        return dataclasses.replace(self, works=tuple(works))

    def spared(self, share: float) -> Variant:
        """Return the same with at least so large a share of activations for holes, and four times that where it is ample."""
        works = (
            dataclasses.replace(work, holes=work.holes.at_least(int(work.activation_bytes * share)))
            for work in self.works
        )
        return dataclasses.replace(self, works=tuple(works))

    def repeated(self, times: float) -> Variant:
        """Return the same with so many times the steps."""
        works = (
            dataclasses.replace(
                work,
                calls=round(work.calls * times),
                flops=round(work.flops * times),
                turns=work.turns if work.turns == 1 else round(work.turns * times),
            )
            if work.phase == "denoise"
            else work
            for work in self.works
        )
        return dataclasses.replace(self, works=tuple(works))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All that a search needs to know."""

    model: str
    call: Mapping[str, Any]
    components: tuple[ComponentProfile, ...]
    variants: tuple[Variant, ...]
    """The simplest first."""
    notes: tuple[str, ...] = ()


def component_profile(component: Component, *, is_in_files: bool, stored: Stored | None = None) -> ComponentProfile:
    """Cut a component (which may be on the meta device) in all ways that a plan may choose."""
    ways: list[tuple[Literal["block_level", "leaf_level"], int]] = [("block_level", 2)]
    ways += [("leaf_level", slots) for slots in _SLOTS]
    configs = [OffloadConfig(device=torch.device("cpu"), granularity=kind, slots=slots) for kind, slots in ways]
    cuts = [
        Cut(
            granularity=kind,
            slots=slots,
            unit_bytes=None,
            sizes=made.unit_bytes,
            fixed_bytes=made.fixed_bytes,
            table_bytes=made.table_bytes,
            whole_bytes=made.whole_bytes,
        )
        for (kind, slots), made in zip(ways, footprints(component.module, configs), strict=True)
    ]
    blocks = [dataclasses.replace(cuts[0], slots=slots) for slots in (3, 1)]  # blocks are the same, however many
    return ComponentProfile(
        name=component.name,
        phase=component.phase,
        weight_bytes=module_bytes(component.module),
        cuts=(cuts[0], *blocks, *cuts[1:]),
        is_in_files=is_in_files,
        wire_dtype="as stored" if stored is None else stored.name,
        quality_db=None if stored is None else stored.weights_db,
    )


def works_of(segments: Sequence[Segment], components: Mapping[str, Component]) -> tuple[Work, ...]:
    """Sum up what was recorded by part of the call and component."""
    phases = {name: component.phase for name, component in components.items()}
    at = [index for index, segment in enumerate(segments) if phases.get(segment.component) == "denoise"]
    first, last = (at[0], at[-1]) if at else (len(segments), len(segments))
    is_alone = "forward" in phases.values()
    found: dict[tuple[str, str], Work] = {}
    fullest: dict[tuple[str, str], Segment] = {}
    for index, segment in enumerate(segments):
        phase = "encode" if index < first else "denoise" if index <= last else "decode"
        if not at:
            phase = "forward" if is_alone else phases.get(segment.component, "encode")
        key = (phase, segment.component)
        nothing = Work(phase=phase, component=segment.component, activation_bytes=0, calls=0, flops=0, turns=0)
        before = found.get(key, nothing)
        if segment.peak_bytes >= before.activation_bytes:
            fullest[key] = segment
        found[key] = dataclasses.replace(
            before,
            activation_bytes=max(before.activation_bytes, segment.peak_bytes),
            calls=before.calls + segment.calls,
            flops=before.flops + segment.flops,
            turns=before.turns + 1,
        )
    works = (dataclasses.replace(work, holes=room_for(fullest[key].lives)) for key, work in found.items())
    return tuple(work for work in works if work.component or work.activation_bytes)


def order_of(works: Iterable[Work]) -> tuple[str, ...]:
    """Return components in the order of their first use."""
    return tuple(dict.fromkeys(work.component for work in works if work.component))
