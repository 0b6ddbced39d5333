"""What a plan has made of some modules: settings, how weights are stored, and where they are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vramkit.errors import ConcurrentUseError
from vramkit.memory import format_bytes
from vramkit.offload import Offload
from vramkit.planning.apply import Applied
from vramkit.planning.components import Component, components_of
from vramkit.planning.features import Features, Settings
from vramkit.planning.narrowing import STORED, Narrowed
from vramkit.planning.plans import Plan

__all__ = ["Regime"]


class Regime:
    """The modules of a target as they were when this was made, and the plan by which they run."""

    def __init__(self, target: Any, plan: Plan, *, disk_folder: Path | None, mesh: Any) -> None:
        """Nothing is done yet."""
        self.plan = plan
        self.modules = {name: component.module for name, component in components_of(target).items()}
        self._target, self._disk_folder, self._mesh = target, disk_folder, mesh
        self._features = Features(target, self.modules)
        self._narrowed = Narrowed()
        self._applied: Applied | None = None
        self._weights: dict[str, tuple[int, int, int]] = {}

    @property
    def offloads(self) -> dict[str, Offload]:
        """The handles of the components; none where no plan is applied."""
        return {} if self._applied is None else dict(self._applied.offloads)

    @property
    def is_on(self) -> bool:
        """Whether the modules run by the plan: not while one is open for changes, nor once all were removed one by one."""
        offloads = self.offloads.values()
        return any(each.is_active for each in offloads) and not any(each.is_edited for each in offloads)

    @property
    def ways(self) -> dict[str, str]:
        """By component, the way in which it is stored in less."""
        return self._narrowed.ways

    @property
    def is_outdated(self) -> bool:
        """Whether the target has other components or weights by now, such as adapters."""
        return self._weights != _weights_of(components_of(self._target))

    def apply(self, plan: Plan) -> None:
        """Let the modules run by `plan`, and by none where that fails."""
        if self._applied is not None:
            self._applied.remove()
        self._applied = None
        chosen = Settings.of(plan)
        self._features.set(chosen)
        for each in plan.components:
            if each.wire_dtype in STORED:
                self._narrowed.become(each.name, self.modules[each.name], STORED[each.wire_dtype])
            else:
                self._narrowed.undo(each.name)
        self._applied = Applied(self.modules, plan, disk_folder=self._disk_folder, mesh=self._mesh)
        self._applied.open()
        self.plan, self._weights = plan, _weights_of(components_of(self._target))
        is_other = chosen.decode is not None and chosen.decode != self._features.before.decode
        if plan.allow == "exact" and is_other and plan.decode is not None and plan.decode.mode == "tiles":
            warnings.warn(
                f"a whole decode does not fit {format_bytes(plan.vram_bytes)}: the autoencoder decodes in tiles, which "
                "gives the bytes of a resident run with vae.enable_tiling()",
                UserWarning,
                stacklevel=5,
            )

    def change(self, plan: Plan) -> None:
        """Let the modules run by `plan`; on an error by that of before.

        Raises:
            ConcurrentUseError: a component runs in another thread.
        """
        before = self.plan
        if _doings(plan) != _doings(before):
            self.refuse_running()
            try:
                self.apply(plan)
            except BaseException:
                self.apply(before)
                raise
        self.plan = plan

    def begin(self) -> None:
        """Make room for what a call of the pipeline needs before the first component computes."""
        if self._applied is not None:
            self._applied.begin()

    def refuse_running(self) -> None:
        """Raise ConcurrentUseError where a component runs in another thread, which another plan would stop."""
        for name, offload in self.offloads.items():
            if offload.is_running_elsewhere:
                raise ConcurrentUseError(
                    f"this call asks for more than was planned for, and {name} is running in another thread, which "
                    "planning anew would stop; make one call after the other, or plan for the largest first"
                )

    def take_off(self) -> None:
        """Give everything back: weights to host memory, settings as they were. Later calls finish what is left."""
        try:
            with contextlib.ExitStack() as steps:  # one that fails keeps no other from being taken
                steps.callback(self._features.reset)
                for name in self._narrowed.ways:
                    steps.callback(self._narrowed.undo, name)
                if self._applied is not None:
                    steps.callback(self._applied.remove)
        except Exception:
            self._applied = None
            raise
        self._applied = None  # not after Ctrl-C: then there is something left to be taken off

    def renewed(self) -> Regime:
        """Return one for the modules that the target has now."""
        return Regime(self._target, self.plan, disk_folder=self._disk_folder, mesh=self._mesh)


def _weights_of(components: Mapping[str, Component]) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether a plan is for these modules, or for others or with other weights.

    Asked before each call, so as plainly as torch can be asked: less than a millisecond for a thousand modules.
    """
    found = {}
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (torch's extension point)
        for name, each in components.items():
            held = [weight for weight in _parameters_of(each.module) if weight is not None]
            found[name] = id(each.module), len(held), sum([weight.numel() * weight.element_size() for weight in held])
    return found


def _parameters_of(module: nn.Module) -> list[nn.Parameter | None]:
    """Return what ``module.modules()`` hold, which makes up the name of each on the way and takes twice as long."""
    seen: set[nn.Module] = set()
    found: list[nn.Parameter | None] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None and part not in seen:
            seen.add(part)
            found += part._parameters.values()  # noqa: SLF001
            waiting += part._modules.values()  # noqa: SLF001
    return found


def _doings(plan: Plan) -> tuple[Any, ...]:
    return plan.components, plan.guidance, plan.chunk_tokens, plan.decode
