"""Calls of what was planned for, each looked at before it begins and after it ended."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vramkit.device_memory import memory_of
from vramkit.errors import ConcurrentUseError, ConflictError, PlanInfeasible
from vramkit.memory import format_apart, format_bytes
from vramkit.planning.calls import Example, PlannedCall, module_calls, pipeline_call
from vramkit.planning.components import components_of, entry_points_of, phase_of
from vramkit.planning.examples import example_of, key_of
from vramkit.planning.generation import Generation
from vramkit.planning.guard import Guard
from vramkit.planning.measured import PeakMeter
from vramkit.planning.regime import Regime

__all__ = ["WatchedCalls"]

_ASKED_FOR = 33  # 32nds of the budget: what a call counts as that ran out of memory and went on


class WatchedCalls:
    """The calls of a target: one that asks for more than was planned for is planned for, and what it took is compared."""

    def __init__(
        self,
        target: Any,
        planner: Any,
        regime: Regime,
        *,
        planned: PlannedCall | None,
        examples: Mapping[str, Example],
        mesh: Any = None,
    ) -> None:
        """Take the call that `regime` has a plan for, and the arguments that this was made of; nothing is watched yet."""
        self.regime = regime
        self._target, self._planner, self._planned = target, planner, planned
        self._examples = dict(examples)
        self._mesh = mesh
        self._guards: list[Guard] = []
        self._parts: list[PlannedCall] = []  # calls of parts of a pipeline that the plan holds for, too
        self._entered = threading.local()
        self._lock = threading.RLock()  # twins are for one rehearsal at a time
        device = torch.device(regime.plan.device)
        # Ranks plan anew together, for which they have to meet: too much for each call of a module.
        is_measured = device.type != "cpu" and (mesh is None or planner.is_of_pipeline)
        self._meter = PeakMeter(memory_of(device)) if is_measured else None
        self._is_measuring = threading.Lock()

    @staticmethod
    def end_idle(target: Any) -> None:
        """End what watches `target`, of which all was taken off by hand, for nobody may have its handle any more.

        Raises:
            ConflictError: a part of it runs by its plan still.
        """
        for name, watched in {
            "": target,
            **{name: each.module for name, each in components_of(target).items()},
        }.items():
            guard = Guard.of(watched)
            if guard is None:
                continue
            running = [other for other, offload in guard.owner.regime.offloads.items() if offload.is_active]
            if running:
                raise ConflictError(
                    f"{name or type(target).__name__} is part of what fit runs already, with {', '.join(running)}; call "
                    "remove() on that handle first"
                )
            guard.owner.end()

    def begin(self) -> None:
        """Watch calls, and let the modules run by their plan."""
        self._attach_all()
        self.regime.apply(self.regime.plan)

    def end(self) -> None:
        """Give everything back, and watch no more. Later calls finish what is left."""
        try:
            self.regime.take_off()
        finally:
            self._detach_all()

    def _attach_all(self) -> None:
        is_of_pipeline = self._planner.is_of_pipeline
        if is_of_pipeline:
            self._attach(Guard(self._target, self._around_pipeline, owner=self))
            if self._mesh is not None:  # ranks would have to plan together for what each does by itself
                return
        around = self._around_part if is_of_pipeline else self._around
        for name, module in self.regime.modules.items():
            methods = [method for method in entry_points_of(module) if method != "forward"]
            self._attach(Guard(module, functools.partial(around, name), methods, owner=self))

    def _attach(self, guard: Guard) -> None:
        self._guards.append(guard)  # first: an interrupt may come after any step
        guard.attach()

    def _detach_all(self) -> None:
        while self._guards:
            self._guards[-1].remove()
            self._guards.pop()

    @contextlib.contextmanager
    def _inside(self, name: str) -> Iterator[bool]:
        """Be in a call of a component, or of the pipeline (""); tell whether it is looked at: a part of one is not."""
        entered = vars(self._entered).setdefault("names", [])
        depth = len(entered)
        try:
            is_part = name in entered or "" in entered
            entered.append(name)
            yield not is_part
        finally:
            del entered[depth:]

    @contextlib.contextmanager
    def _around_pipeline(self, _method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        names = list(inspect.signature(type(self._target).__call__).parameters)[1:]
        with self._inside(""):
            self._meet(pipeline_call(self._target, {**dict(zip(names, args, strict=False)), **kwargs}))
            self.regime.begin()
            with self._measuring():
                yield

    @contextlib.contextmanager
    def _around_part(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Be around a call that goes past the pipeline, such as ``pipeline.vae.decode(latents)``."""
        with self._inside(name) as is_looked_at:
            if not is_looked_at:
                yield
                return
            self._meet_part(name, module_calls({key_of(name, method): example_of(args, kwargs)}))
            with self._measuring():
                yield

    @contextlib.contextmanager
    def _around(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        example: Example | None = None
        if method == "generate":
            example = Generation.of_call(self.regime.modules[name], args, kwargs)
            if example is None:  # the passes that it makes are looked at, each
                yield
                return
        with self._inside(name) as is_looked_at:
            if not is_looked_at:
                yield
                return
            with self._lock:
                examples = {**self._examples, key_of(name, method): example or example_of(args, kwargs)}
                examples = self._of_target(examples)
                if self._meet(module_calls(examples) if examples else None):
                    self._examples = examples
            with self._measuring():
                yield

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Compare what a call takes with its plan; other calls that run meanwhile are in one measurement with it."""
        meter = self._meter
        if meter is None or not self._is_measuring.acquire(blocking=False):
            yield
            return
        try:
            begun = meter.begin(sum(offload.held_bytes for offload in self.regime.offloads.values()))
            yield
            peak_bytes, ran_out = meter.end(begun)
        finally:
            self._is_measuring.release()
        if ran_out:  # nobody knows how much was asked for
            peak_bytes = self.regime.plan.vram_bytes * _ASKED_FOR // 32
        if self._mesh is not None:
            peak_bytes = self._planner.highest(peak_bytes)
        if peak_bytes is not None:
            self._correct(peak_bytes, ran_out=ran_out)

    def _correct(self, peak_bytes: int, *, ran_out: bool) -> None:
        """Plan anew, with as much kept free as a call took more than was predicted, if it took more than the budget."""
        with self._lock:
            plan = self.regime.plan
            if not self.regime.is_on or peak_bytes <= plan.vram_bytes:
                return
            more = peak_bytes - plan.peak_bytes
            given, taken = format_apart(plan.vram_bytes, peak_bytes)
            taken = f"a call took {taken}"
            if ran_out:  # cuDNN then takes another algorithm, which wants no workspace
                taken = "memory ran out within a call, which went on with less or by other, slower kernels,"
            told = f"{taken} where {format_bytes(plan.peak_bytes)} were predicted and {given} were given"
            try:
                self.regime.refuse_running()
                self._planner.keep_free(more, note=f"{told}: {format_bytes(more)} are kept free since")
                corrected = self._planner.plan(self._planned, self.regime.ways)
            except (PlanInfeasible, ConcurrentUseError) as error:
                warnings.warn(f"{told}, and nothing is changed: {error}", UserWarning, stacklevel=4)
                return
            try:
                self.regime.apply(corrected)
            except BaseException:
                self.regime.apply(plan)
                raise
            warnings.warn(f"{told}; later calls have a plan that keeps more free", UserWarning, stacklevel=4)

    def _of_target(self, examples: dict[str, Example]) -> dict[str, Example]:
        """Return those of modules that the target has still: of a mapping some may have been taken out."""
        names = components_of(self._target).keys()
        return {key: each for key, each in examples.items() if key in names or key.rpartition(".")[0] in names}

    def _meet(self, call: PlannedCall | None) -> bool:
        """Plan for `call` if it asks for more than what was planned for, and tell whether it did; None is of a module gone.

        Raises:
            PlanInfeasible: nothing fits; the plan of before stays.
            ConcurrentUseError: a component runs in another thread, which another plan would stop.
        """
        with self._lock:
            if not self.regime.is_on:
                return False
            if self.regime.is_outdated:
                self._begin_anew(call)
                return True
            if call is None or (self._planned is not None and self._planned.covers(call)):
                return False
            self._change(call)
            self._parts.clear()
            return True

    def _meet_part(self, name: str, call: PlannedCall) -> None:
        """Plan for `call` of a component beside what was planned for, if it needs more than that component was given.

        Raises:
            PlanInfeasible, ConcurrentUseError: as `_meet`.
        """
        with self._lock:
            planned = self._planned
            if not self.regime.is_on or planned is None or any(each.covers(call) for each in self._parts):
                return
            if self.regime.is_outdated:
                self._begin_anew(planned)
            plan = self.regime.plan
            if self._planner.activation_bytes(name, call, plan) > plan.component(name).activation_bytes:
                self._change(planned.beside(call, is_first=phase_of(name) == "encode"))
            self._parts.append(call)

    def _change(self, call: PlannedCall) -> None:
        """Run by another plan, for `call`; on an error that of before stays."""
        self.regime.change(self._planner.plan(call, self.regime.ways))
        self._planned = call

    def _begin_anew(self, call: PlannedCall | None) -> None:
        """Plan `call` for the modules as they are now; on an error those of before run as before."""
        self.regime.refuse_running()
        before, ways = self.regime, self.regime.ways
        self.end()
        try:
            self._planner = self._planner.renewed(self._target)
            self.regime = before.renewed()
            rounded = {name: way for name, way in ways.items() if self.regime.modules.get(name) is before.modules[name]}
            plan = self._planner.plan(call, rounded)
            self._attach_all()
            self.regime.apply(plan)
        except BaseException:
            self.end()
            self.regime = before
            self.begin()
            raise
        self._planned = call
        self._parts.clear()
