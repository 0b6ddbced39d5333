"""The twins of a pipeline's modules, with weights stored in one way or another, and what a call of them takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vramkit import tensors
from vramkit.offload.inventory import refuse_foreign_hooks
from vramkit.offload.memory_map import MemoryMap
from vramkit.planning.calls import PlannedCall
from vramkit.planning.components import Component, components_of
from vramkit.planning.deeds import Known
from vramkit.planning.features import Features, Settings
from vramkit.planning.narrowing import Stored, narrow_shadow
from vramkit.planning.profile import ComponentProfile, Variant, component_profile, works_of
from vramkit.planning.rehearsal import Rehearsal, rehearse
from vramkit.planning.shadow import shadow_of, shadows_of

__all__ = ["Twins"]

_LESS = 0.98  # of the memory that simpler ways take: what saves less is not worth being told apart


class Twins:
    """Modules without memory, and a pipeline around them if they are of one."""

    def __init__(self, target: Any, *, ranks: int = 1) -> None:
        """Make twins of the modules of `target`, which is only read; so many `ranks` share the decode of a pipeline.

        Raises:
            ConflictError: another library moves or casts the weights of one.
            ConfigError: one cannot be copied.
        """
        originals = components_of(target)
        for component in originals.values():
            for name, part in component.module.named_modules():
                refuse_foreign_hooks(name or type(part).__name__, part)
        self.shadows: dict[str, nn.Module] = shadows_of({name: each.module for name, each in originals.items()})
        self.components = {
            name: Component(name, self.shadows[name], each.entry_points, each.phase) for name, each in originals.items()
        }
        if ranks > 1 and is_pipeline(target):
            from vramkit.distributed.rehearsed_tiles import RehearsedTiles  # noqa: PLC0415 - most processes are no ranks

            RehearsedTiles.share(self.shadows.values(), ranks)
        self._entry_points = {name: component.entry_points for name, component in self.components.items()}
        self.callable = shadow_of(target, self.shadows) if is_pipeline(target) else self.shadows
        self.features = Features(self.callable, self.shadows)
        self._call: PlannedCall | None = None
        self._known = Known()
        self._variants: dict[Settings, Variant] = {}
        self._used_in_loops: dict[str, int] = {}
        self._profiles: dict[tuple[str, Stored | None], ComponentProfile | None] = {
            (name, None): component_profile(each, is_in_files=_is_in_files(originals[name].module))
            for name, each in self.components.items()
        }

    def profile(self, name: str, way: Stored | None = None) -> ComponentProfile | None:
        """Return what is to be known of a component whose weights are stored so; None where they cannot be."""
        if (name, way) not in self._profiles:
            assert way is not None
            twin = dataclasses.replace(self.components[name], module=shadows_of({name: self.shadows[name]})[name])
            is_narrow = narrow_shadow(twin, way)
            found = component_profile(twin, is_in_files=False, stored=way) if is_narrow else None
            self._profiles[name, way] = found
        return self._profiles[name, way]

    def widest_bytes(self, name: str, way: Stored) -> int:
        """Return the most bytes of wide weights that a component stored so has at once: the largest, or those of a loop.

        Of a stack it is one matrix. Loops are those of calls that were rehearsed.
        """
        weights = (p for p in self.shadows[name].parameters() if p.ndim > 1)
        largest = max((p.nbytes // (p.shape[0] if p.ndim > 2 else 1) for p in weights), default=0)
        return max(largest, self._used_in_loops.get(name, 0)) if way.is_widened_once else largest

    def activation_bytes(self, name: str, call: PlannedCall, settings: Settings, device: torch.device) -> int:
        """Rehearse `call` of components by themselves, and return the most that is alive while `name` computes."""
        try:
            self.features.set(settings)
            done = rehearse(self.shadows, self._entry_points, lambda: call.make(self.shadows), device=device)
        finally:
            self.features.reset()
        self._note_loops(done)
        return max((segment.peak_bytes for segment in done.segments if segment.component == name), default=0)

    def rehearsed(
        self,
        call: PlannedCall,
        *,
        chunk_tokens: int | None,
        device: torch.device,
        suffices: Callable[[Variant], bool],
    ) -> Iterator[Variant]:
        """Rehearse `call` in the ways that a plan may choose, the simplest first; none is rehearsed twice.

        Where one `suffices`, no smaller decode is tried; ways that save no memory are passed over.
        """
        if call is not self._call:
            self._call, self._known, self._variants = call, Known(), {}
        least: dict[Any, float] = {}  # by guidance; nothing where a decode suffices, than which none takes less
        try:
            for settings in self.features.settings(chunk_tokens):
                before = least.get(settings.guidance, math.inf)
                if not before:
                    continue
                if settings not in self._variants:
                    self._variants[settings] = self._rehearsed_in(settings, call, device)
                variant = self._variants[settings]
                if variant.decode_bytes < before * _LESS:
                    least[settings.guidance] = 0 if suffices(variant) else variant.decode_bytes
                    yield variant
        finally:
            self.features.reset()

    def _rehearsed_in(self, settings: Settings, call: PlannedCall, device: torch.device) -> Variant:
        """Rehearse `call` in one way, which stays chosen."""
        self.features.set(settings)
        self._known.settings = self.features.of_components(settings)
        done = rehearse(
            self.shadows, self._entry_points, lambda: call.make(self.callable), device=device, known=self._known
        )
        self._note_loops(done)
        return Variant(settings=settings, works=works_of(done.segments, self.components)).repeated(call.steps)

    def _note_loops(self, done: Rehearsal) -> None:
        for name, used in done.used_in_loops.items():  # of what was run before, nothing is told a second time
            self._used_in_loops[name] = max(used, self._used_in_loops.get(name, 0))


def is_pipeline(target: Any) -> bool:
    """Whether `target` is called as a whole."""
    return isinstance(getattr(target, "components", None), Mapping)


def _is_in_files(module: nn.Module) -> bool:
    """Whether most of the weights are views of files, or have no memory at all, as those that are yet to be loaded."""
    memory = MemoryMap.of_process()
    counted = {True: 0, False: 0}
    for parameter in module.parameters():
        for leaf in tensors.leaves(parameter):
            counted[leaf.is_meta or memory.classify(leaf).kind == "file"] += leaf.nbytes
    return counted[True] >= counted[False]
